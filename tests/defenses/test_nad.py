"""NAD: attention maps and loss by hand, where maps are taken, and its effect."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backdoorlab.attacks import Backdoor
from backdoorlab.core.errors import InputError, NotApplicable
from backdoorlab.defenses.repair.nad import (
    NeuralAttentionDistillation,
    attention,
    attention_distance,
    find_taps,
    tapped,
)
from backdoorlab.modalities.image import ImageModality
from backdoorlab.modalities.text import TextModality
from backdoorlab.models import build_model
from backdoorlab.models.anatomy import example_input
from effect_tools import Numbers, blended, case, effects, least, most, repaired


def test_an_attention_map_is_the_normalised_sum_of_squares_over_channels() -> None:
    maps = torch.tensor([[[1.0, 2.0], [2.0, -2.0]], [[0.0, 0.0], [3.0, 4.0]]])  # [2 samples, 2 channels, 2 positions]
    by_hand = torch.tensor([[5 / 89**0.5, 8 / 89**0.5], [9 / 337**0.5, 16 / 337**0.5]])
    torch.testing.assert_close(attention(maps), by_hand)
    first = torch.tensor([[3 / 5, 4 / 5]])
    torch.testing.assert_close(attention(maps[:1], p=1.0), first)


def test_the_distance_is_a_weighted_mean_squared_difference() -> None:
    one, other = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 5.0]]])
    same = torch.ones(1, 2, 2)
    # Maps [1, 0] and [0, 1]: the mean of 1 and 1.
    loss = attention_distance([one, same], [other, 3 * same], (500.0, 1000.0), 2.0)
    torch.testing.assert_close(loss, torch.tensor(500.0))


def test_of_one_position_nothing_is_learned() -> None:
    """Why such maps are never taken."""
    maps = torch.rand(4, 8, 1, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.equal(attention(maps).detach(), torch.ones(4, 1))


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("preact_resnet18_w16", ["net.layer2", "net.layer3", "net.layer4"]),
        ("convnet3", ["net.body.2", "net.body.6", "net.body"]),
    ],
)
def test_maps_are_the_last_of_each_resolution(arch: str, expected: list[str]) -> None:
    taps = find_taps(build_model(arch, ImageModality(3, 32, 32), 10))
    assert [tap.name for tap in taps] == expected
    assert [tap.extent for tap in taps] == sorted((tap.extent for tap in taps), reverse=True)
    assert min(tap.extent for tap in taps) > 1


def test_transformers_give_the_tokens_that_layer_norms_receive() -> None:
    model = build_model("vit_tiny_patch16_224", ImageModality(3, 32, 32), 10)
    taps = find_taps(model)
    assert len(taps) == 3 and all(tap.received and tap.extent > 1 for tap in taps)
    with tapped(model, taps) as held:
        model(example_input(model, 2))
    for tap in taps:
        assert held[tap.name].shape == (2, 192, tap.extent)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_network_without_maps_is_refused_with_a_reason() -> None:
    modality = TextModality(("<pad>", "<unk>", "cf", "mn", "bb", "tq", "mb", "example"), max_len=8)
    with pytest.raises(NotApplicable, match="lstm has no feature map with more than one position"):
        find_taps(build_model("lstm", modality, 2))


def test_maps_survive_operations_in_place() -> None:
    tap = find_taps(build_model("convnet3", ImageModality(1, 8, 8), 4))[0]
    value: Tensor = torch.ones(1, 2, 2, 2)
    kept = tap.maps(value)
    value.zero_()
    assert torch.equal(kept, torch.ones(1, 2, 4))


@pytest.mark.parametrize("betas", [(), (-1.0,), (float("nan"), 1.0)])
def test_weights_must_be_numbers_from_zero_on(betas: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="nad: betas must be"):
        NeuralAttentionDistillation(betas=betas)


def test_of_fewer_layers_the_weights_are_the_last(badnets_digits: Backdoor) -> None:
    assert len(find_taps(badnets_digits.model, 1)) == 1
    assert find_taps(badnets_digits.model, 1)[0] == find_taps(badnets_digits.model, 3)[-1]


@case("defense/repair/nad", asr_lost=least(0.7), acc_lost=most(0.06), benign_lost=most(0.07))
def effect_of_nad(seed: int) -> Numbers:
    return repaired(seed, NeuralAttentionDistillation(), harmless=True)


@case("defense/repair/nad/blended", asr_lost=least(0.2), acc_lost=most(0.07))
def effect_of_nad_on_blended(seed: int) -> Numbers:
    return repaired(seed, NeuralAttentionDistillation(), backdoor=blended(seed))


test_effect = effects(__name__)
