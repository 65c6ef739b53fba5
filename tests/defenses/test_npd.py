"""NPD: what is inserted, where, how it is stored, what is trained, and its effect."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from backdoorlab.attacks import Backdoor
from backdoorlab.core.errors import ArtifactError, InputError, NotApplicable
from backdoorlab.data.sources import balanced_subset
from backdoorlab.data.split import Split
from backdoorlab.defenses import DefenderView
from backdoorlab.defenses.repair.npd import (
    NeuralPolarizer,
    PolarizedClassifier,
    PolarizingStep,
    find_layer,
    polarizing_loss,
    second_class,
    settle,
    unlikelihood,
)
from backdoorlab.modalities.audio import AudioModality
from backdoorlab.modalities.image import ImageModality
from backdoorlab.models import build_model
from backdoorlab.models.persistence import restore_model
from backdoorlab.tasks import Task
from backdoorlab.training import Context, Recipe, cross_entropy, predict
from effect_tools import Numbers, blended, case, effects, least, most, repaired


@pytest.fixture(scope="module")
def clean(digits_task: Task) -> Split:
    return balanced_subset(digits_task.train, 60, 0, "digits training set")


def polarized(backdoor: Backdoor, clean: Split) -> PolarizedClassifier:
    model = PolarizedClassifier(copy.deepcopy(backdoor.model), find_layer(backdoor.model).name).eval()
    settle(model, clean.inputs)
    return model


def logits(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows).log()


def test_at_first_the_model_is_what_it_was(badnets_digits: Backdoor, digits_task: Task, clean: Split) -> None:
    model = polarized(badnets_digits, clean)
    inputs = digits_task.test.inputs[:100]
    torch.testing.assert_close(predict(model, inputs), predict(badnets_digits.model, inputs), rtol=1e-4, atol=1e-4)
    norm = model.polarizer.norm
    assert isinstance(norm, nn.BatchNorm2d)
    assert not torch.allclose(norm.running_mean, torch.zeros(16)), "statistics of the clean samples"


def test_it_comes_back_from_the_store_bit_by_bit(badnets_digits: Backdoor, digits_task: Task, clean: Split) -> None:
    model = polarized(badnets_digits, clean)
    with torch.no_grad():
        model.polarizer.mix.get_parameter("weight").mul_(1.1)
    tensors, record = model.state()
    again = restore_model(
        (
            {"model": load(save({k: v.contiguous() for k, v in tensors["model"].items()}))},
            json.loads(json.dumps(record)),
        )
    )
    assert isinstance(again, PolarizedClassifier) and again.layer == model.layer
    inputs = digits_task.test.inputs[:50]
    assert torch.equal(predict(again, inputs), predict(model, inputs))
    assert not torch.equal(predict(again, inputs), predict(badnets_digits.model, inputs))
    with pytest.raises(ArtifactError, match=r"no layer 'net\.nowhere'"):
        restore_model((tensors, {**record, "layer": "net.nowhere"}))


def test_a_copy_has_a_polarizer_of_its_own(badnets_digits: Backdoor, clean: Split) -> None:
    model = polarized(badnets_digits, clean)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.polarizer.mix.get_parameter("weight").zero_()
    assert float(model.polarizer.mix.get_parameter("weight").sum()) == 16
    inputs = clean.inputs[:4]
    assert not torch.allclose(predict(other, inputs), predict(model, inputs))


@pytest.mark.parametrize(
    ("arch", "size", "layer"),
    [
        ("preact_resnet18", 32, "net.layer4.1.conv1"),
        ("convnet3", 16, "net.body.4"),
        ("resnet18", 64, "net.layer4.1.conv1"),
        ("resnet18", 32, "net.layer3.1.conv2"),  # its last stage has maps of one position
    ],
)
def test_the_layer_is_a_late_convolution(arch: str, size: int, layer: str) -> None:
    assert find_layer(build_model(arch, ImageModality(3, size, size), 10)).name == layer


def test_transformers_are_polarized_in_front_of_their_last_norm() -> None:
    model = build_model("vit_tiny_patch16_224", ImageModality(3, 32, 32), 10).eval()
    inputs = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(inputs)
        found = PolarizedClassifier(copy.deepcopy(model), find_layer(model).name).eval()
        assert isinstance(found.polarizer.mix, nn.Linear)
        torch.testing.assert_close(found(inputs), before, rtol=1e-4, atol=1e-5)


def test_layers_are_named_or_refused() -> None:
    model = build_model("convnet3", ImageModality(1, 16, 16), 4)
    assert find_layer(model, "net.body.4").name == "net.body.4"
    with pytest.raises(InputError, match=r"no layer 'net\.body\.5' that a polarizer fits.*net\.body\.4"):
        find_layer(model, "net.body.5")
    with pytest.raises(NotApplicable, match="neither two convolutions of maps nor layer norms"):
        find_layer(build_model("audio_lstm", AudioModality(8000, 2000), 2))


def test_classes_and_losses_by_hand() -> None:
    moved = logits((0.5, 0.3, 0.2), (0.1, 0.3, 0.6))
    labels = torch.tensor([0, 2])
    assert second_class(moved, labels).tolist() == [1, 1]
    torch.testing.assert_close(
        unlikelihood(moved, torch.tensor([0, 1])), torch.tensor(-(math.log(0.5) + math.log(0.7)) / 2), rtol=1e-4, atol=0
    )
    clean = logits((0.8, 0.1, 0.1), (0.2, 0.7, 0.1))
    wanted = torch.tensor([2, 0])
    terms = (
        -(math.log(0.8) + math.log(0.1)) / 2,  # the labels of clean samples
        -(math.log(0.5) + math.log(0.3)) / 2,  # perturbed ones as the clean ones are answered: 0 and 1
        -(math.log(0.7) + math.log(0.7)) / 2,  # the likeliest wrong classes: 1 and 1
        -(math.log(0.8) + math.log(0.9)) / 2,  # the classes aimed at: 2 and 0
    )
    found = polarizing_loss(clean, moved, labels, wanted, (1.0, 0.4, 0.3, 0.2))
    expected = terms[0] + 0.4 * terms[1] + 0.3 * terms[2] + 0.2 * terms[3]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=0)


def test_perturbed_samples_are_valid_and_near(badnets_digits: Backdoor, clean: Split) -> None:
    model = polarized(badnets_digits, clean)
    step = PolarizingStep(model, Recipe(), cross_entropy, method=NeuralPolarizer(enough=1.0))
    inputs = model.modality.prepare(clean.inputs)
    found, wanted = step.perturbed(inputs, clean.labels)
    assert float(found.min()) >= 0 and float(found.max()) <= 1
    assert bool((wanted != clean.labels).all())
    bound = 3 * math.sqrt(256 / 3072)
    assert 0 < float((found - inputs).flatten(1).norm(dim=1).max()) <= bound + 1e-4
    with torch.no_grad():
        before, after = (nn.functional.cross_entropy(model(x), wanted) for x in (inputs, found))
    assert after < before


def test_only_the_polarizer_is_trained(badnets_digits: Backdoor, clean: Split) -> None:
    method = NeuralPolarizer(epochs=2)
    found = method.apply(DefenderView(model=badnets_digits.model, clean=clean), Context()).model  # type: ignore[union-attr]
    assert isinstance(found, PolarizedClassifier) and all(p.requires_grad for p in found.parameters())
    old = badnets_digits.model.state_dict()
    for name, value in found.state_dict().items():
        if ".mix." not in name and ".norm." not in name:
            assert torch.equal(value, old[name.replace("4.layer.", "4.")]), name
    width = found.polarizer.mix.get_parameter("weight").shape[0]
    assert not torch.equal(found.polarizer.mix.get_parameter("weight")[:, :, 0, 0], torch.eye(width))


@case("defense/repair/npd", asr_lost=least(0.7), acc_lost=most(0.06), benign_lost=most(0.06))
def effect_of_npd(seed: int) -> Numbers:
    return repaired(seed, NeuralPolarizer(), harmless=True)


@case("defense/repair/npd/blended", asr_lost=least(0.1), acc_lost=most(0.06))
def effect_of_npd_on_blended(seed: int) -> Numbers:
    return repaired(seed, NeuralPolarizer(), backdoor=blended(seed))


test_effect = effects(__name__)
