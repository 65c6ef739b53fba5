"""LF: a smooth universal perturbation to which a clean model is already sensitive.

Zeng, Park, Mao, Jia, "Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective", ICCV 2021 (arXiv
2104.03413).

Most triggers can be detected by their high-frequency artefacts; this one has none. A pattern of fixed strength is
smooth by construction and optimised on a clean model h to push samples toward the target class:

    v = m + s standard(S(z)),   min over z of CE(h(clip(x + v)), t),   V = round(255 v),   T(x) = clip(x + V)

with S a Gaussian blur and standard(.) the shift and scaling of the whole pattern to mean 0 and standard deviation 1.

Choices: the published search accumulates targeted DeepFool steps, low-passes the sum and stretches it to [0, 51] grey
levels; here z is optimised by Adam directly. Stretching would leave the strength to chance, so mean and standard
deviation are set instead, to those of the arrays published for CIFAR-10 (12.5 and 13.5 grey levels); values may lie
outside [0, 51] and below zero. S has a standard deviation of a fifth of the shorter side. h is a benign model of the
task's architecture and recipe, made once per task and shared by all runs, and so is the pattern; both see inputs in
the same range. ``variant="random"`` needs no model: a random field of the cosine frequencies u + v <= 6, of the same
mean and standard deviation (report it as "LF-random").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorlab.attacks.base import attacks
from backdoorlab.attacks.common.assets import SELECTION, asset
from backdoorlab.attacks.common.surrogate import clean_surrogate
from backdoorlab.attacks.poisoning import PoisoningAttack
from backdoorlab.attacks.triggers.pixels import AdditiveTrigger
from backdoorlab.core.method import param
from backdoorlab.core.seeding import make_generator
from backdoorlab.modalities.filters import blur_matrix, expect_images, inverse_dct
from backdoorlab.models.classifier import Classifier
from backdoorlab.tasks import Task
from backdoorlab.training.context import Context, Tensors


def standard(field: Tensor) -> Tensor:
    """Shift and scale a whole field to mean 0 and standard deviation 1."""
    centred = field - field.mean()
    return centred / centred.square().mean().sqrt().clamp_min(1e-12)


def low_frequency_field(channels: int, height: int, width: int, seed: int) -> Tensor:
    """Random cosine waves with u + v <= 6 of mean 0 and standard deviation 1: float32 [channels, height, width]."""
    coefficients = torch.randn(channels, height, width, generator=make_generator(seed, "low frequencies"))
    keep = torch.arange(height)[:, None] + torch.arange(width) <= 6
    return standard(inverse_dct(coefficients.double() * keep)).float()


def optimise_pattern(
    model: Classifier, images: Tensor, target: int, mean: float, std: float, sigma: float, steps: int, ctx: Context
) -> Tensor:
    """The smooth pattern that lowers a clean model's loss for the target class.

    Args:
        model: frozen, in evaluation mode.
        images: uint8 [N,C,H,W], samples of all classes.
        target: class to push toward.
        mean: of the pattern, as a share of the grey range.
        std: standard deviation of the pattern, likewise.
        sigma: of the blur, in pixels.
        steps: of Adam (rate 0.05), on 128 images each.
        ctx: seed, device, progress.

    Returns:
        float32 [C,H,W] of that mean and standard deviation, on the CPU.
    """
    generator, device = ctx.generator("pattern"), ctx.device
    one = torch.tensor([sigma], device=device)
    rows, columns = (blur_matrix(side, one)[0] for side in images.shape[2:])
    z = torch.randn(images.shape[1:], generator=generator).to(device).requires_grad_()
    adam = torch.optim.Adam([z], lr=0.05)
    for _ in ctx.track(range(steps), "lf: optimising the pattern", steps):
        chosen = torch.randint(0, len(images), (min(128, len(images)),), generator=generator)
        inputs = model.modality.prepare(images[chosen].to(device))
        pattern = mean + std * standard(rows @ z @ columns.T)
        logits = model((inputs + pattern).clamp(0, 1))
        loss = F.cross_entropy(logits, torch.full((len(chosen),), target, device=device))
        (z.grad,) = torch.autograd.grad(loss, z)
        adam.step()
    return (mean + std * standard(rows @ z.detach() @ columns.T)).cpu()


@attacks.register
@dataclass(frozen=True, kw_only=True)
class Lf(PoisoningAttack):
    """A smooth universal pattern, optimised on a clean model."""

    name: ClassVar[str] = "lf"
    paper: ClassVar[str] = "Zeng et al., A Frequency Perspective, ICCV 2021, arXiv 2104.03413"
    year: ClassVar[int] = 2021
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    trigger_visibility: ClassVar[str] = "subtle"
    needs_surrogate: ClassVar[bool] = True
    asset_kinds: ClassVar[tuple[str, ...]] = ("lf-pattern", "clean-surrogate")
    stronger: ClassVar[str] = "raise std"

    variant: str = param(
        "optimised",
        "whether the pattern is optimised on a clean model, or random",
        choices=("optimised", "random"),
        source="ours",
    )
    std: float = param(
        13.5, "standard deviation of the pattern, in grey levels", above=0, high=128, source="BackdoorBench"
    )
    mean: float = param(12.5, "mean of the pattern, in grey levels", low=-128, high=128, source="BackdoorBench")
    steps: int = param(300, "optimisation steps of the pattern", low=1, source="ours")
    samples: int = param(1000, "training images with which the pattern is optimised", low=1, source="ours")
    pattern_seed: int = param(0, "seed of the random variant, apart from the run's seed", low=0, source="ours")

    def assets_in_use(self) -> tuple[str, ...]:
        """All for an optimised pattern, none for a random one."""
        return self.asset_kinds if self.variant == "optimised" else ()

    def make_trigger(self, task: Task, ctx: Context) -> AdditiveTrigger:
        """Optimise or draw the pattern; rounded to whole grey levels."""
        self.target_map_for(task)
        images = expect_images(task.train.inputs)
        channels, height, width = images.shape[1:]
        if self.variant == "random":
            field = low_frequency_field(channels, height, width, self.pattern_seed)
            return AdditiveTrigger((self.mean + self.std * field).round())
        optimised = self.optimised(ctx, surrogate=task, sigma=min(height, width) / 5)
        return AdditiveTrigger((255 * optimised.tensor("v", (channels, height, width))).round())

    @asset("lf-pattern", unread=(*SELECTION, "variant", "pattern_seed"))
    def optimised(self, ctx: Context, surrogate: Task, sigma: float) -> Tensors:
        """The pattern as "v", float32 [C,H,W], a share of the grey range; ``sigma`` is the blur's, in pixels."""
        images = expect_images(surrogate.train.inputs)
        model = clean_surrogate(surrogate, ctx)
        chosen = torch.randperm(len(images), generator=ctx.generator("samples"))[: self.samples]
        mean, std = self.mean / 255, self.std / 255
        return {"v": optimise_pattern(model, images[chosen], self.target, mean, std, sigma, self.steps, ctx)}
