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
from torch import Tensor, nn

from backdoorlab.attacks.common.generators import seeded
from backdoorlab.models.networks.style import PatchNet, StyleNet
from backdoorlab.training.batches import Repeat
from backdoorlab.training.context import Context
from backdoorlab.training.steps import run_steps

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
    step = StyleStep(to_b, to_a, of_a, of_b, lr=lr, cycle=cycle, identity=identity)

    def draw() -> tuple[Tensor, Tensor]:
        a, b = (
            side[torch.randint(0, len(side), (BATCH,), generator=draws)].to(device).float() / 255
            for side in (images, styled)
        )
        return a, b

    run_steps(
        step,
        Repeat(steps, draw),
        1,
        schedule=lambda number: min(1.0, 2 * (steps - number) / steps),
        context=ctx,
        label="training a style",
    )
    return cast(StyleNet, to_b.eval().requires_grad_(False))


class StyleStep:
    """One step of both generators, then one of both discriminators.

    Attributes:
        modules: G: A -> B, F: B -> A, the discriminators of A and of B.
        optimizers: of generators and of discriminators.
    """

    def __init__(
        self,
        to_b: nn.Module,
        to_a: nn.Module,
        of_a: nn.Module,
        of_b: nn.Module,
        *,
        lr: float,
        cycle: float,
        identity: float,
    ) -> None:
        """``cycle`` is l, ``identity`` is i, ``lr`` Adam's rate."""
        self.modules, self.cycle, self.identity = (to_b, to_a, of_a, of_b), cycle, identity
        pairs = (chain(to_a.parameters(), to_b.parameters()), chain(of_a.parameters(), of_b.parameters()))
        self.optimizers = [torch.optim.Adam(pair, lr, (0.5, 0.999)) for pair in pairs]

    def __call__(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Take both steps on pictures of both sides, float [B,C,H,W] in [0, 1]; returns the generators' loss."""
        (a, b), (to_b, to_a, of_a, of_b), (makers, critics) = batch, self.modules, self.optimizers
        fake_b, same_b = to_b(torch.cat([a, b])).chunk(2)
        fake_a, same_a = to_a(torch.cat([b, a])).chunk(2)
        back = F.l1_loss(to_a(fake_b), a) + F.l1_loss(to_b(fake_a), b)
        same = F.l1_loss(same_b, b) + F.l1_loss(same_a, a)
        fooled = (of_b(fake_b) - 1).square().mean() + (of_a(fake_a) - 1).square().mean()
        loss = fooled + self.cycle * back + self.identity * same
        makers.zero_grad(set_to_none=True)
        loss.backward()
        makers.step()
        critics.zero_grad(set_to_none=True)
        for critic, real, fake in ((of_a, a, fake_a), (of_b, b, fake_b)):
            on_real, on_fake = critic(torch.cat([real, fake.detach()])).chunk(2)
            ((on_real - 1).square().mean() + on_fake.square().mean()).backward()
        critics.step()
        return loss.detach()
