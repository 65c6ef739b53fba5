"""WaNet: the whole image is bent a little, by one smooth warping field.

Nguyen, Tran, "WaNet - Imperceptible Warping-based Backdoor Attack", ICLR 2021 (arXiv 2102.10369).

Control points n ~ U(-1, 1) on a k x k grid, divided by their mean magnitude, are upsampled bicubically to the image;
with the identity grid g0 over [-1, 1]^2 (x to the right, y down) the image is sampled bilinearly at

    g = clamp((g0 + s n / side) r, -1, 1)      (attack: label t)
    g' = clamp(g + u / side, -1, 1), u ~ U(-1, 1) per pixel and axis      ("noise mode": label stays)

where side is the width for x and the height for y. Noise mode trains the network to respond to this field only.
In each batch the first floor(rate B) samples are attacked and ``cross_ratio`` times as many are warped with noise.

Choices: the field is stored, so new images can be warped later. The victim sees warped images rounded to uint8, as an
attacker would deliver them. Batches are augmented and scheduled by the task's recipe; the published loop used a
constant rate, and other padding, rotation and flips. Width and height are kept apart, so images need not be
square. ``poisoning="fixed-index"`` warps the same samples in every epoch. The field is the same for all samples, only
its effect depends on the image, hence ``sample_specific`` is false. The mean displacement is s / 2 pixels whatever the
size of the image, a quarter pixel by default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorlab.attacks.base import attacks
from backdoorlab.attacks.common.batch_poison import BatchPoisoner, FixedPoisoner
from backdoorlab.attacks.draws import sample_uniform
from backdoorlab.attacks.poisoning import TrainingAttack
from backdoorlab.attacks.result import Backdoor
from backdoorlab.attacks.triggers.base import Trigger
from backdoorlab.core.method import param
from backdoorlab.core.seeding import spawn
from backdoorlab.data.split import Inputs
from backdoorlab.modalities.filters import expect_images
from backdoorlab.modalities.image import to_uint8
from backdoorlab.tasks import Task
from backdoorlab.training.batches import Stamp
from backdoorlab.training.context import Context


def draw_field(k: int, generator: torch.Generator) -> Tensor:
    """Control points with a mean magnitude of 1: float32 [2, k, k], channel 0 horizontal, channel 1 vertical."""
    field = torch.rand(2, k, k, generator=generator) * 2 - 1
    return field / field.abs().mean()


def warp_grid(field: Tensor, strength: float, rescale: float, height: int, width: int) -> Tensor:
    """Where each output pixel is sampled: float32 [height, width, 2] in [-1, 1], x first."""
    bend = F.interpolate(field[None], (height, width), mode="bicubic", align_corners=True)[0].permute(1, 2, 0)
    y, x = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    identity = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1)
    grid = (identity + strength * bend.cpu() / torch.tensor([width, height])) * rescale
    return grid.clamp(-1, 1)


def sample(images: Tensor, grid: Tensor) -> Tensor:
    """Bilinear look-up of uint8 images [N,C,H,W] at grid [N,H,W,2] or [H,W,2]; uint8 out."""
    grid = grid.to(images.device).expand(len(images), *grid.shape[-3:])
    return to_uint8(F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=True))


@dataclass(frozen=True, eq=False)
class WarpTrigger(Trigger):
    """Warp by the field float32 [2,k,k]; fits images of any size."""

    kind: ClassVar[str] = "image.warp"

    field: Tensor
    strength: float
    rescale: float

    def __call__(
        self, inputs: Inputs, indices: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Inputs:
        """Warp uint8 images [N,C,H,W]."""
        images = expect_images(inputs)
        return sample(images, warp_grid(self.field, self.strength, self.rescale, *images.shape[2:]))


@dataclass(frozen=True, eq=False)
class NoiseWarpTrigger(Trigger):
    """Warp by the same field plus noise that differs per sample: what the victim must *not* react to."""

    kind: ClassVar[str] = "image.warp-noise"

    field: Tensor
    strength: float
    rescale: float
    seed: int

    def __call__(
        self, inputs: Inputs, indices: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Inputs:
        """Warp uint8 images [N,C,H,W]; without a generator the noise is a function of the sample's index."""
        images = expect_images(inputs)
        height, width = images.shape[2:]
        noise = sample_uniform(self.seed, images, height * width * 2, indices, generator) * 2 - 1
        noise = noise.reshape(-1, height, width, 2) / torch.tensor([width, height], device=images.device)
        grid = warp_grid(self.field, self.strength, self.rescale, height, width).to(images.device)
        return sample(images, (grid + noise).clamp(-1, 1))


@attacks.register
@dataclass(frozen=True, kw_only=True)
class WaNet(TrainingAttack):
    """One smooth warping field for all images."""

    name: ClassVar[str] = "wanet"
    paper: ClassVar[str] = "Nguyen and Tran, WaNet, ICLR 2021, arXiv 2102.10369"
    year: ClassVar[int] = 2021
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    trigger_visibility: ClassVar[str] = "invisible"
    stronger: ClassVar[str] = "raise s"

    target_map: str = param(
        "all-to-one",
        "label of triggered samples: the target class, or their class + 1 mod K",
        choices=("all-to-one", "all-to-all"),
        source="BackdoorBench",
    )
    k: int = param(4, "control points of the warping field per axis", low=2, source="paper")
    s: float = param(
        0.5, "strength of the warp: mean displacement of a control point, in half pixels", low=0, source="paper"
    )
    grid_rescale: float = param(1.0, "factor on the coordinates of the sampling grid", above=0, high=2, source="paper")
    cross_ratio: float = param(
        2.0, "samples warped with noise that keep their label, per poisoned sample", low=0, high=10, source="paper"
    )
    poisoning: str = param(
        "per-batch",
        "poisoned samples: new ones in every batch, or the same in every epoch",
        choices=("per-batch", "fixed-index"),
        source="paper",
    )

    def run(self, task: Task, ctx: Context) -> Backdoor:
        """Draw the field, train with warped batches, keep a replay of the poisoned set."""
        expect_images(task.train.inputs)
        target_map, seed = self.target_map_for(task), spawn(ctx.generator("noise"))
        field = draw_field(self.k, ctx.generator("field"))
        trigger = WarpTrigger(field, self.s, self.grid_rescale)
        noise = NoiseWarpTrigger(field, self.s, self.grid_rescale, seed)
        self.warn_if_too_weak(trigger, task, ctx)
        poison = self.replay(trigger, task, ctx, noise, self.cross_ratio * self.rate_on(task))
        stamp: Stamp = BatchPoisoner(
            trigger,
            target_map,
            self.rate_on(task),
            noise,
            cover_ratio=self.cross_ratio,
            exclude_target=self.exclude_target,
        )
        if self.poisoning == "fixed-index":
            stamp = FixedPoisoner.like(poison, len(task.train), trigger, noise, target_map)
        model, log = task.fit(task.train, ctx, stamp=stamp, label=f"{self.name}: training the victim")
        notes = {"poisoning": self.poisoning, "schedule": task.recipe.name}
        return Backdoor(model, trigger, target_map, poison, log, cross_trigger=noise, notes=notes)
