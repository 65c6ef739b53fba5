"""Unpaired translation of images into another style: two slim generators and two discriminators, trained on the spot.

Zhu, Park, Isola, Efros, "Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks", ICCV 2017.

With G: A -> B, F: B -> A and discriminators of both sides, least squares in place of logarithms:

    |D_B(G(a)) - 1|^2 + |D_A(F(b)) - 1|^2 + l (|F(G(a)) - a|_1 + |G(F(b)) - b|_1) + i (|G(b) - b|_1 + |F(a) - a|_1)

Choices: networks are slim (16 channels, one halving, two residual blocks), there is no buffer of older fakes, and a
generator's last layer shifts the logits of its input, by 2.5 at most: training starts at the identity and takes
hundreds of steps instead of hundreds of thousands, and networks trained so briefly do not paint over what the image
shows.
"""

from __future__ import annotations

from itertools import chain
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorlab.attacks.common.generators import seeded
from backdoorlab.models.networks.style import PatchNet, StyleNet
from backdoorlab.training.context import Context

BATCH = 8


def train_style(
    images: Tensor, styled: Tensor, steps: int, lr: float, cycle: float, identity: float, ctx: Context
) -> StyleNet:
    """The generator from the images' look to the other one.

    Args:
        images: uint8 [N,C,H,W], side A.
        styled: uint8 [M,C,H,W], side B.
        steps: of generators and discriminators each, on 8 images of both sides; the rate falls over the last half.
        lr: Adam's.
        cycle: l.
        identity: i.
        ctx: seed, device, progress.
    """
    channels, device, draws = images.shape[1], ctx.device, ctx.generator("style batches")
    to_b, to_a = (seeded(lambda: StyleNet(channels), ctx.seed, name).to(device).train() for name in ("G", "F"))
    of_a, of_b = (seeded(lambda: PatchNet(channels), ctx.seed, name).to(device).train() for name in ("D_A", "D_B"))
    makers = torch.optim.Adam(chain(to_a.parameters(), to_b.parameters()), lr, (0.5, 0.999))
    judges = torch.optim.Adam(chain(of_a.parameters(), of_b.parameters()), lr, (0.5, 0.999))
    for step in ctx.track(range(steps), "training a style", steps):
        for group in (*makers.param_groups, *judges.param_groups):
            group["lr"] = lr * min(1.0, 2 * (steps - step) / steps)
        a, b = (
            side[torch.randint(0, len(side), (BATCH,), generator=draws)].to(device).float() / 255
            for side in (images, styled)
        )
        fake_b, same_b = to_b(torch.cat([a, b])).chunk(2)
        fake_a, same_a = to_a(torch.cat([b, a])).chunk(2)
        back = F.l1_loss(to_a(fake_b), a) + F.l1_loss(to_b(fake_a), b)
        same = F.l1_loss(same_b, b) + F.l1_loss(same_a, a)
        loss = (of_b(fake_b) - 1).square().mean() + (of_a(fake_a) - 1).square().mean() + cycle * back + identity * same
        makers.zero_grad(set_to_none=True)
        loss.backward()
        makers.step()
        judges.zero_grad(set_to_none=True)
        for judge, real, fake in ((of_a, a, fake_a), (of_b, b, fake_b)):
            truth, lie = judge(torch.cat([real, fake.detach()])).chunk(2)
            ((truth - 1).square().mean() + lie.square().mean()).backward()
        judges.step()
    return cast(StyleNet, to_b.eval().requires_grad_(False))
