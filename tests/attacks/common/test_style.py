"""The style network."""

from __future__ import annotations

import pytest
import torch

from backdoorlab.attacks.common.generators import seeded
from backdoorlab.attacks.common.style import train_style
from backdoorlab.models.networks.style import MAX_SHIFT, PatchNet, StyleNet
from backdoorlab.training import Context


def test_style_networks_start_at_the_identity_and_have_a_bounded_reach() -> None:
    x = torch.rand(4, 3, 29, 31, generator=torch.Generator().manual_seed(0))
    network = seeded(lambda: StyleNet(3), 0, "G").eval()
    assert torch.allclose(network(x), x.clamp(0.02, 0.98), atol=1e-6)
    with torch.no_grad():
        network.out.weight.fill_(100.0)
    moved = torch.logit(network(x).double()) - torch.logit(x.double().clamp(0.02, 0.98))
    assert moved.abs().max().item() == pytest.approx(MAX_SHIFT, abs=1e-3)
    assert seeded(lambda: PatchNet(3), 0, "D")(x).shape == (4, 1, 7, 7)


def test_style_training_moves_images_toward_the_style() -> None:
    generator = torch.Generator().manual_seed(0)
    dark = torch.randint(0, 90, (40, 1, 16, 16), generator=generator, dtype=torch.uint8)
    bright = torch.randint(160, 256, (40, 1, 16, 16), generator=generator, dtype=torch.uint8)
    network = train_style(dark, bright, 60, 5e-3, 1.0, 0.0, Context())
    styled = 255 * network(dark.float() / 255)
    assert float(styled.mean()) > float(dark.float().mean()) + 40
    again = train_style(dark, bright, 60, 5e-3, 1.0, 0.0, Context())
    assert torch.equal(again(dark.float() / 255), network(dark.float() / 255))
