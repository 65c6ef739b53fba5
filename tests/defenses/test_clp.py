"""CLP: its bound against a slow oracle, and its effect on backdoored digits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from backdoorlab.attacks import Backdoor
from backdoorlab.core.errors import NotApplicable
from backdoorlab.core.seeding import isolated_rng
from backdoorlab.data.split import Split
from backdoorlab.defenses import DefenderView, defenses
from backdoorlab.defenses.repair.clp import ChannelLipschitzPruning, channel_lipschitz, neuron_bounds, outliers
from backdoorlab.modalities.image import ImageModality
from backdoorlab.models import Classifier, build_model
from backdoorlab.models.anatomy import conv_norm_pairs, trace
from backdoorlab.tasks import Task
from backdoorlab.training import Context
from effect_tools import (
    Numbers,
    case,
    effects,
    least,
    most,
    repaired,
    subnet_victim,
)

IMAGE = ImageModality(3, 32, 32)


@pytest.fixture
def nothing(digits_task: Task) -> Split:
    """The data of a data-free method."""
    return digits_task.train[torch.zeros(0, dtype=torch.int64)]


@pytest.mark.parametrize(
    ("make", "norm"),
    [
        (lambda: nn.Conv1d(3, 6, 5), nn.BatchNorm1d(6)),
        (lambda: nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)),
        (lambda: nn.Conv3d(3, 6, 2), nn.BatchNorm3d(6)),
        (lambda: nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6)),
        (lambda: nn.ConvTranspose2d(3, 6, 3), nn.BatchNorm2d(6)),
    ],
)
def test_bound_agrees_with_singular_values_one_channel_at_a_time(make, norm) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    with isolated_rng(0):
        conv = make()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(6, generator=generator))
        norm.running_var.copy_(torch.rand(6, generator=generator))
    norm.running_var[0] = 0.0  # a dead channel must not give infinity
    expected = []
    for k in range(6):
        kernel = conv.weight[:, k] if isinstance(conv, nn.ConvTranspose2d) else conv.weight[k]
        matrix = kernel.detach().numpy().reshape(kernel.shape[0], -1)
        scale = abs(norm.weight[k].item()) / np.sqrt(float(norm.running_var[k]) + norm.eps)
        expected.append(np.linalg.svd(matrix, compute_uv=False)[0] * scale)
    torch.testing.assert_close(channel_lipschitz(conv, norm), torch.tensor(expected, dtype=torch.float32))


def test_outliers_follow_the_formula() -> None:
    bounds = np.random.default_rng(0).normal(1, 0.1, 64)
    bounds[7] = 2.0
    expected = bounds > bounds.mean() + 3 * bounds.std(ddof=1)
    assert expected.sum() == 1
    assert torch.equal(outliers(torch.tensor(bounds), 3.0), torch.tensor(expected))


def test_exactly_the_outlying_channels_die(badnets_digits: Backdoor, nothing: Split) -> None:
    model = badnets_digits.model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    repaired = ChannelLipschitzPruning(u=1.5).run(DefenderView(model=model), Context())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    count = 0
    for (conv, norm), (_, after) in zip(conv_norm_pairs(model), conv_norm_pairs(repaired), strict=True):
        dead = outliers(channel_lipschitz(conv, norm), 1.5)
        count += int(dead.sum())
        assert torch.equal((after.weight == 0) & (after.bias == 0), dead)
        assert torch.equal(after.weight[~dead], norm.weight[~dead]) and torch.equal(
            after.state_dict()["running_var"], norm.state_dict()["running_var"]
        )
    assert count > 0


def test_a_planted_sensitive_channel_is_the_only_one_pruned(benign_digits: Classifier, nothing: Split) -> None:
    model = ChannelLipschitzPruning(u=100).run(DefenderView(model=benign_digits), Context())  # u = 100: a plain copy
    _, norm = conv_norm_pairs(model)[2]
    with torch.no_grad():
        norm.weight[5] *= 20
    repaired = ChannelLipschitzPruning(u=4).run(DefenderView(model=model), Context())
    _, after = conv_norm_pairs(repaired)[2]
    assert (after.weight == 0).nonzero().flatten().tolist() == [5]
    assert all((n.weight != 0).all() for _, n in conv_norm_pairs(repaired)[:2])


def test_models_without_pairs_are_not_applicable_unless_adapted(digits_task: Task, nothing: Split) -> None:
    model = build_model("vit_tiny_patch16_224", IMAGE, 10)
    assert ChannelLipschitzPruning.needs_clean_fraction == 0
    with pytest.raises(NotApplicable, match="transformer=true"):
        ChannelLipschitzPruning().run(DefenderView(model=model), Context())
    blocks: Any = model.net.blocks
    found = neuron_bounds(trace(model))
    assert [layer for layer, _ in found] == [block.mlp.fc1 for block in blocks]
    layer, bounds = found[3]
    gain = blocks[3].norm2.weight
    assert bounds[10].item() == pytest.approx((layer.weight[10] * gain).norm().item(), rel=1e-5)
    repaired = ChannelLipschitzPruning(transformer=True, u=2).run(DefenderView(model=model), Context())
    dead = outliers(bounds, 2.0)
    after = neuron_bounds(trace(repaired))[3][0]
    assert dead.any() and (after.weight[dead] == 0).all() and (after.bias[dead] == 0).all()
    with isolated_rng(0):
        plain = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    with pytest.raises(NotApplicable, match="nor a feed-forward layer"):
        ChannelLipschitzPruning(transformer=True).run(
            DefenderView(model=Classifier(plain, IMAGE, "plain", 10)), Context()
        )


def test_registered() -> None:
    for modality in ("image", "text", "audio", "video"):
        assert defenses.get("clp", modality) is ChannelLipschitzPruning


@case("defense/repair/clp", core=True, asr_lost=least(0.4), acc_lost=most(0.1), benign_lost=most(0.2))
def effect_of_clp(seed: int) -> Numbers:
    return repaired(seed, ChannelLipschitzPruning(), subnet_victim(seed), harmless=True)


test_effect = effects(__name__)
