"""BPP: the image is reduced to a few grey levels per channel.

Wang, Zhai, Ma, "BppAttack: Stealthy and Efficient Trojan Attacks against Deep Neural Networks via Image Quantization
and Contrastive Adversarial Learning", CVPR 2022 (arXiv 2205.13383).

With s levels per channel,

    Q(x) = round(x / 255 (s - 1)) / (s - 1) 255,

optionally with Floyd-Steinberg dithering: pixels in raster order, the error of each is spread 7/16 right, 3/16
down-left, 5/16 down and 1/16 down-right. In each batch the first floor(rate B) samples become Q(x) with label t; the
next floor(negative_rate B) are *negatives* x + (Q(x') - x'), clipped, with the quantisation residual of another
training image x' and their true label, so that the network learns quantisation itself and not just the noise it makes.

Choices: negatives of the cross test have the same sign as in training (published code has them the other way round and
unclipped, which makes that number meaningless). Dithering clamps to the s levels. The dithering loop runs over
anti-diagonals: pixel (i, j) needs only pixels with a smaller j + 2 i, so W + 2 H steps replace W H, with the same
rounding. Batches are augmented and scheduled by the task's recipe. Every batch has its negatives; in published code
only one that holds a backdoor sample has, which differs at rates below one sample in a batch (1/128).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backdoorlab.attacks.base import attacks
from backdoorlab.attacks.common.batch_poison import BatchPoisoner, FixedPoisoner
from backdoorlab.attacks.draws import sample_uniform
from backdoorlab.attacks.poisoning import TrainingAttack
from backdoorlab.attacks.result import Backdoor
from backdoorlab.attacks.triggers.base import Trigger
from backdoorlab.core.method import param
from backdoorlab.core.seeding import spawn
from backdoorlab.data.split import Inputs, take
from backdoorlab.modalities.filters import expect_images
from backdoorlab.modalities.image import to_uint8
from backdoorlab.tasks import Task
from backdoorlab.training.batches import Stamp
from backdoorlab.training.context import Context

SPREAD = ((3, 1, 1 / 16), (2, 1, 5 / 16), (1, 1, 3 / 16), (1, 0, 7 / 16))
"""Floyd-Steinberg along anti-diagonals: (diagonals on, rows down, share of the error)."""
DONORS = 256
"""Residuals kept for the cross test; training draws from the whole training set."""


def quantize(values: Tensor, levels: int) -> Tensor:
    """Nearest of ``levels`` equidistant grey levels: float in, float out."""
    step = 255 / (levels - 1)
    return (values / step).round_().clamp_(0, levels - 1).mul_(step)


def dither(images: Tensor, levels: int) -> Tensor:
    """Floyd-Steinberg dithering of float images [N,C,H,W], all samples and channels at once."""
    count, channels, height, width = images.shape
    waves = width + 2 * (height - 1)
    i = torch.arange(height, device=images.device)[:, None]
    j = torch.arange(width, device=images.device)
    # Pixel (i, j) at [j + 2 i, i], so that a diagonal is one slice; errors that leave the image land in the margin.
    skewed = images.new_zeros(waves + 3, height + 1, count * channels)
    skewed[j + 2 * i, i] = images.flatten(0, 1).permute(1, 2, 0)
    for wave in range(waves):
        first, end = max(0, (wave - width + 2) // 2), min(height - 1, wave // 2) + 1
        old = skewed[wave, first:end]
        new = quantize(old, levels)
        error = old - new
        old.copy_(new)
        for on, down, share in SPREAD:
            skewed[wave + on, first + down : end + down] += error * share
    return skewed[j + 2 * i, i].permute(2, 0, 1).reshape(images.shape)


@dataclass(frozen=True, eq=False)
class QuantizeTrigger(Trigger):
    """Reduce each channel to a few levels; fits images of any size."""

    kind: ClassVar[str] = "image.quantize"

    levels: int
    dithering: bool

    def __call__(
        self, inputs: Inputs, indices: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Inputs:
        """Quantise uint8 images [N,C,H,W]."""
        images = expect_images(inputs).float()
        return to_uint8(dither(images, self.levels) if self.dithering else quantize(images, self.levels))


@dataclass(frozen=True, eq=False)
class ForeignResidualTrigger(Trigger):
    """Add the quantisation residual of *another* image: what the victim must not react to.

    Attributes:
        donors: uint8 [D,C,H,W], the other images.
        levels: of their quantisation.
        dithering: whether it dithers.
        seed: of the choice of a donor where no generator is given.
    """

    kind: ClassVar[str] = "image.foreign-residual"

    donors: Tensor
    levels: int
    dithering: bool
    seed: int

    def __call__(
        self, inputs: Inputs, indices: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Inputs:
        """Disturb uint8 images [N,C,H,W] of the donors' size."""
        images = expect_images(inputs, self.donors.shape[1:])
        share = sample_uniform(self.seed, images, 1, indices, generator).flatten()
        donors = self.donors[(share * len(self.donors)).long().to(self.donors.device)].to(images.device)
        quantized = expect_images(QuantizeTrigger(self.levels, self.dithering)(donors))
        return to_uint8(images.float() + (quantized.float() - donors.float()))


@attacks.register
@dataclass(frozen=True, kw_only=True)
class Bpp(TrainingAttack):
    """Quantisation to a few grey levels."""

    name: ClassVar[str] = "bpp"
    paper: ClassVar[str] = "Wang et al., BppAttack, CVPR 2022, arXiv 2205.13383"
    year: ClassVar[int] = 2022
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    trigger_visibility: ClassVar[str] = "invisible"
    stronger: ClassVar[str] = "lower levels"
    sample_specific: ClassVar[bool] = True

    target_map: str = param(
        "all-to-one",
        "label of triggered samples: the target class, or their class + 1 mod K",
        choices=("all-to-one", "all-to-all"),
        source="BackdoorBench",
    )
    levels: int = param(8, "grey levels per channel after quantisation", low=2, high=128, source="BackdoorBench")
    dithering: bool = param(
        False, "spread the rounding error over neighbouring pixels (Floyd-Steinberg)", source="BackdoorBench"
    )
    negative_rate: float = param(
        0.1,
        "share of training samples that get another image's quantisation residual and keep their label",
        low=0,
        high=1,
        source="BackdoorBench",
    )
    poisoning: str = param(
        "per-batch",
        "poisoned samples: new ones in every batch, or the same in every epoch",
        choices=("per-batch", "fixed-index"),
        source="paper",
    )

    def run(self, task: Task, ctx: Context) -> Backdoor:
        """Train with quantised batches, keep a replay of the poisoned set."""
        images = expect_images(task.train.inputs)
        target_map, seed = self.target_map_for(task), spawn(ctx.generator("donors"))
        trigger = QuantizeTrigger(self.levels, self.dithering)
        negative = ForeignResidualTrigger(images.to(ctx.device), self.levels, self.dithering, seed)
        self.warn_if_too_weak(trigger, task, ctx)
        poison = self.replay(trigger, task, ctx, negative, self.negative_rate)
        stamp: Stamp = BatchPoisoner(
            trigger,
            target_map,
            self.rate_on(task),
            negative,
            cover_rate=self.negative_rate,
            exclude_target=self.exclude_target,
        )
        if self.poisoning == "fixed-index":
            stamp = FixedPoisoner.like(poison, len(task.train), trigger, negative, target_map)
        model, log = task.fit(task.train, ctx, stamp=stamp, label=f"{self.name}: training the victim")
        stored_rows = torch.randperm(len(images), generator=ctx.generator("donors kept"))[:DONORS]
        cross = ForeignResidualTrigger(expect_images(take(images, stored_rows)), self.levels, self.dithering, seed)
        notes = {"poisoning": self.poisoning, "schedule": task.recipe.name}
        return Backdoor(model, trigger, target_map, poison, log, cross_trigger=cross, notes=notes)
