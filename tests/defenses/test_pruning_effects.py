"""Effects of channel pruning (ANP, CLP) on a backdoor that lives in few channels, and on a benign model.

The victim is made as in subnet replacement (Qi et al., CVPR 2022): of a benign digits model only one channel a layer,
the one with the smallest Lipschitz bound, is trained on BadNets-poisoned data. The BadNets victim of the other tests
would not do: in a net of 112 channels the backdoor is spread so thinly that silencing any single channel leaves an ASR
of 0.88 or more.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from backdoorlab.attacks import Backdoor
from backdoorlab.data.sources import balanced_subset
from backdoorlab.data.split import Split
from backdoorlab.defenses.repair.anp import AdversarialNeuronPruning
from backdoorlab.defenses.repair.clp import ChannelLipschitzPruning, channel_lipschitz
from backdoorlab.models import Classifier
from backdoorlab.models.anatomy import conv_norm_pairs, head
from backdoorlab.training import Context, Task
from backdoorlab.training.loop import fit
from backdoorlab.training.recipes import Recipe

ANP = AdversarialNeuronPruning(iterations=100, batch_size=64, threshold=0.2)


def train_one_channel_a_layer(model: Classifier) -> None:
    """Let gradients reach one channel of every conv-norm pair and its weights in the head, nothing else."""

    def only(parameter: Tensor, index: tuple[slice | int, ...]) -> None:
        keep = torch.zeros_like(parameter)
        keep[index] = 1
        parameter.register_hook(lambda grad: grad * keep)

    for conv, norm in conv_norm_pairs(model):
        channel = int(channel_lipschitz(conv, norm).argmin())
        for parameter in (conv.weight, norm.weight, norm.bias):
            only(parameter, (channel,))
    last = head(model)
    only(last.weight, (slice(None), channel))
    last.bias.requires_grad_(False)


@pytest.fixture(scope="module")
def subnet_victim(benign_digits: Classifier, badnets_digits: Backdoor, digits_task: Task) -> Classifier:
    model = copy.deepcopy(benign_digits)
    train_one_channel_a_layer(model)
    recipe = Recipe(epochs=20, batch_size=64, lr=0.2, weight_decay=0)
    fit(model, badnets_digits.poison.apply(digits_task.train).as_seen(), recipe, context=Context())
    clone = copy.deepcopy(benign_digits)
    clone.load_state_dict(model.state_dict())
    return clone


@pytest.fixture(scope="module")
def clean(digits_task: Task) -> Split:
    """A tenth of the training set."""
    return balanced_subset(digits_task.train, 144, 0, "digits training set")


@pytest.mark.parametrize("method", [ANP, ChannelLipschitzPruning()], ids=lambda m: m.name)
def test_removes_the_backdoor_and_keeps_the_accuracy(
    method: AdversarialNeuronPruning | ChannelLipschitzPruning,
    subnet_victim: Classifier,
    badnets_digits: Backdoor,
    digits_task: Task,
    clean: Split,
) -> None:
    before = badnets_digits.measure(digits_task, Context(), subnet_victim)
    assert before["asr"] > 0.9 and before["acc"] > 0.95
    after = badnets_digits.measure(digits_task, Context(), method.repair(subnet_victim, clean, Context()))
    assert after["asr"] < before["asr"] / 2
    assert after["acc"] > before["acc"] - 0.05


@pytest.mark.parametrize("method", [ANP, ChannelLipschitzPruning()], ids=lambda m: m.name)
def test_leaves_a_benign_model_alone(
    method: AdversarialNeuronPruning | ChannelLipschitzPruning,
    benign_digits: Classifier,
    badnets_digits: Backdoor,
    digits_task: Task,
    clean: Split,
) -> None:
    before = badnets_digits.measure(digits_task, Context(), benign_digits)["acc"]
    repaired = method.repair(benign_digits, clean, Context())
    assert badnets_digits.measure(digits_task, Context(), repaired)["acc"] > before - 0.03
