"""What bounds the features of the two pre-activation networks."""

from __future__ import annotations

import torch

from backdoorlab.core.seeding import isolated_rng
from backdoorlab.models.image import preact_resnet8, preact_resnet18


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
