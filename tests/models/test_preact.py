"""What bounds the features of the two pre-activation networks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from backdoorlab.core.seeding import isolated_rng
from backdoorlab.modalities.image import ImageModality
from backdoorlab.models.classifier import default_model
from backdoorlab.models.image import (
    PreActResNet,
    preact_resnet8,
    preact_resnet18,
    preact_resnet18_w16,
    preact_resnet18_w32,
)


def test_the_small_one_ends_in_a_norm_and_the_reference_does_not() -> None:
    """Features do not grow with the residual stream: nothing in the last stage can scale them without limit."""
    with isolated_rng(0):
        small, images = preact_resnet8(in_chans=1).train(), torch.rand(16, 1, 28, 28)
    seen: list[torch.Tensor] = []
    small.linear.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    small(images)
    with torch.no_grad():
        small.layer4[0].conv2.weight *= 100
        small.layer4[0].shortcut.weight *= 100
    small(images)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-2, atol=1e-3)
    assert float(seen[0].min()) >= 0
    with isolated_rng(0):
        assert not [name for name in preact_resnet18().state_dict() if name.startswith("norm")]


@pytest.mark.parametrize(("narrow", "channels"), [(preact_resnet18_w16, 16), (preact_resnet18_w32, 32)])
def test_the_narrow_ones_are_the_reference_network_with_fewer_channels(
    narrow: Callable[[], PreActResNet], channels: int
) -> None:
    """Layer by layer, apart from the norm before the pool."""
    with isolated_rng(0):
        weights, reference = narrow().state_dict(), preact_resnet18().state_dict()
    assert {name for name in weights if not name.startswith("norm.")} == set(reference)
    assert {name for name in weights if name.startswith("norm.")}
    share = 64 // channels
    for name, weight in reference.items():
        ends = (3, 10) if name in ("conv1.weight", "linear.weight", "linear.bias") else ()
        assert list(weights[name].shape[:2]) == [n if n in ends else n // share for n in weight.shape[:2]], name


@pytest.mark.parametrize(("side", "default"), [(16, "convnet3"), (28, "preact_resnet8"), (64, "preact_resnet8")])
def test_the_default_follows_the_size_of_the_images(side: int, default: str) -> None:
    assert default_model(ImageModality(3, side, side)) == default
