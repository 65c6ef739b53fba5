"""ReFool: the reflection of another scene, as if the picture were taken through a window.

Liu, Ma, Bailey, Lu, "Reflection Backdoor: A Natural Backdoor Attack on Deep Neural Networks", ECCV 2020
(arXiv 2007.02343).

Image b and a scene r from a pool, in linear light (gamma 2.2), are superimposed in one of two ways:

    ghost         a b + (1 - a) g,   g = c r1 + (1 - c) r2: two views of r, a few pixels apart
    out of focus  a b + (1 - a/2) V f,   f = r blurred, its over-exposure reduced, V a vignette

then clipped, brought back to gamma 1/2.2 and rounded. The scene and all parameters are drawn per sample: c in
|round(u) - U(0.15, 0.5)|, blur sigma in U(1, 5), ghost with probability 0.49. Over-exposure: with mu the mean of f + b
over the pixels of a channel where it exceeds 1 (at least 1), f loses (mu - 1)(1.08 + U(0, 0.1)).

Choices: scenes are drawn from a seed (published lists of photographs cannot be shipped), under one exposure for the
whole pool that gives it the mean of the published pictures, 53 grey levels (as drawn they have 133); or they are read
from the user's folder, as bright as they are. Two pools are made, one for the attack, one that it never used; ASR
with the latter is noted as ``asr_held_out``. A folder's images, shuffled by the scene seed, are dealt to both pools in
turn. Ghost offsets and blur are given for 224 px and scale with the image, offsets being at least one pixel. Blur and
vignette have closed forms: rows of the blur matrix sum to 1 at the border, the vignette is exp(-z^2 / 4) with z from -3
to 3 along each axis. Paper: clean label; the common re-implementation relabels, which is the default here.
``clean_label=true`` poisons only target-class samples. Without a generator everything is a function of the sample's
index. The paper's search for the best reflections is left out.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backdoorlab.attacks.base import attacks
from backdoorlab.attacks.common.pictures import read_folder, scenes
from backdoorlab.attacks.draws import sample_uniform
from backdoorlab.attacks.poisoning import PoisoningAttack
from backdoorlab.attacks.result import Backdoor
from backdoorlab.attacks.selection import class_rate
from backdoorlab.attacks.triggers.base import Trigger
from backdoorlab.core.errors import InputError
from backdoorlab.core.method import param
from backdoorlab.core.seeding import derive_seed, make_generator
from backdoorlab.data.split import Inputs
from backdoorlab.modalities.filters import expect_images, gaussian_blur
from backdoorlab.modalities.image import to_uint8
from backdoorlab.tasks import Task
from backdoorlab.training.context import Context

GAMMA = 2.2
DRAWS = 9
CHUNK = 512
"""Images processed at once: the blur has a matrix per image."""


def shifted_views(scene: Tensor, down: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The part that a scene shares with itself moved by an offset, seen from both ends and stretched to full size.

    Args:
        scene: float [N,C,H,W].
        down: int64 [N], rows of offset.
        right: int64 [N], columns of offset.

    Returns:
        The view that starts at the offset and the one that starts at the corner, float [N,C,H,W], bilinear.
    """
    first, second = scene, scene
    for axis, offset in ((2, down), (3, right)):
        side = scene.shape[axis]
        overlap = (side - offset).to(scene.dtype)[:, None]
        place = (torch.arange(side, device=scene.device) + 0.5) * (overlap / side) - 0.5
        place = torch.minimum(place.clamp_min(0), overlap - 1)
        low = place.floor().long()
        high = torch.minimum(low + 1, overlap.long() - 1)
        shape = [len(scene), 1, 1, 1]
        shape[axis] = side
        share = (place - low).reshape(shape)

        start = offset[:, None]
        far = [first.gather(axis, (at + start).reshape(shape).expand_as(first)) for at in (low, high)]
        near = [second.gather(axis, at.reshape(shape).expand_as(second)) for at in (low, high)]
        first = torch.lerp(far[0], far[1], share.expand_as(first))
        second = torch.lerp(near[0], near[1], share.expand_as(second))
    return first, second


def ghost(scene: Tensor, down: Tensor, right: Tensor, weight: Tensor) -> Tensor:
    """A doubled reflection: ``weight`` (float [N]) of the far view over the near one."""
    far, near = shifted_views(scene, down, right)
    share = weight[:, None, None, None]
    return share * far + (1 - share) * near


def vignette(height: int, width: int, device: torch.device) -> Tensor:
    """Brightness falling off from the centre: float [height, width], peak 1 at the centre."""
    y, x = torch.linspace(-3, 3, height, device=device), torch.linspace(-3, 3, width, device=device)
    mask = torch.exp(-(y[:, None] ** 2 + x**2) / 4)
    return mask / mask.amax()


def out_of_focus(image: Tensor, scene: Tensor, sigma: Tensor, extra: Tensor) -> Tensor:
    """A blurred reflection with reduced over-exposure, under a vignette: float [N,C,H,W].

    Args:
        image: float [N,C,H,W] in linear light.
        scene: likewise.
        sigma: float [N], of the blur in pixels.
        extra: float [N] in [0, 0.1].
    """
    soft = gaussian_blur(scene, sigma, truncate=2.0)
    total = soft + image
    over = total > 1
    mean = (total * over).sum((2, 3)) / over.sum((2, 3)).clamp_min(1)
    excess = (mean.clamp_min(1) - 1) * (1.08 + extra[:, None])
    return (soft - excess[:, :, None, None]).clamp(0, 1) * vignette(image.shape[2], image.shape[3], image.device)


@dataclass(frozen=True, eq=False)
class ReflectionTrigger(Trigger):
    """Superimpose a random scene of the pool.

    Attributes:
        pool: uint8 [R,C,H,W], scenes.
        transmission: share of the image; 0 draws it from U(0.55, 0.95) per sample.
        ghost_rate: probability of a ghost instead of an out-of-focus reflection.
        seed: of the draws where no generator is given.
    """

    kind: ClassVar[str] = "image.reflection"

    pool: Tensor
    transmission: float
    ghost_rate: float
    seed: int

    def __call__(
        self, inputs: Inputs, indices: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Inputs:
        """Reflect in uint8 images [N,C,H,W] of the scenes' size."""
        images = expect_images(inputs, self.pool.shape[1:])
        draws = sample_uniform(self.seed, images, DRAWS, indices, generator)
        pool = (self.pool.to(images.device).float() / 255) ** GAMMA
        parts = [self._reflect(a, d, pool) for a, d in zip(images.split(CHUNK), draws.split(CHUNK), strict=True)]
        return torch.cat(parts) if parts else images.clone()

    def _reflect(self, images: Tensor, draws: Tensor, pool: Tensor) -> Tensor:
        scene_index, kind, down, right, side, weight, blur, extra, share = draws.unbind(1)
        height, width = images.shape[2:]
        image = (images.float() / 255) ** GAMMA
        scene = pool[(scene_index * len(pool)).long()]
        alpha = torch.full_like(share, self.transmission) if self.transmission else 0.55 + 0.4 * share
        alpha = alpha[:, None, None, None]
        weights = ((side < 0.5).float() - (0.15 + 0.35 * weight)).abs()
        sigma = (1 + 4 * blur) * min(height, width) / 224
        added, offsets = torch.empty_like(image), (_offset(down, height), _offset(right, width))
        g, s = (kind < self.ghost_rate).nonzero().flatten(), (kind >= self.ghost_rate).nonzero().flatten()
        added[g] = (1 - alpha[g]) * ghost(scene[g], offsets[0][g], offsets[1][g], weights[g])
        added[s] = (1 - alpha[s] / 2) * out_of_focus(image[s], scene[s], sigma[s], 0.1 * extra[s])
        mixed = alpha * image + added
        return to_uint8(mixed.clamp_(0, 1) ** (1 / GAMMA) * 255)


def expose(pool: Tensor, brightness: float) -> Tensor:
    """Pictures under the one exposure that gives all of them together a mean of ``brightness`` grey levels.

    An exposure, a gain of linear light, is a gain of grey levels too, as gamma is a power. What it makes brighter than
    white is cut off, so that the mean stays below ``brightness`` where much is.

    Args:
        pool: uint8 [R,C,H,W].
        brightness: in grey levels.
    """
    return to_uint8(pool.float() * (brightness / pool.float().mean().clamp_min(1)))


def _offset(uniform: Tensor, side: int) -> Tensor:
    """3 to 8 px at 224 px, in proportion for other sides but at least 1: int64 [N]."""
    low, high = max(1, round(3 * side / 224)), max(1, round(8 * side / 224))
    return low + (uniform * (high - low + 1)).long()


@attacks.register
@dataclass(frozen=True, kw_only=True)
class Refool(PoisoningAttack):
    """Reflections of other scenes."""

    name: ClassVar[str] = "refool"
    paper: ClassVar[str] = "Liu et al., Reflection Backdoor, ECCV 2020, arXiv 2007.02343"
    year: ClassVar[int] = 2020
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    trigger_visibility: ClassVar[str] = "visible"
    stronger: ClassVar[str] = "lower transmission"

    poison_rate: float | None = class_rate("0.1, or 0.05 with clean_label")
    clean_label: bool = param(
        False, "poison target-class samples only and keep their labels, as in the paper", source="BackdoorBench"
    )
    transmission: float = param(
        0.4,
        "share of the image in the mixture with a reflection; 0 = drawn from 0.55 to 0.95 for each sample",
        low=0,
        high=1,
        source="BackdoorBench",
    )
    ghost_rate: float = param(
        0.49, "share of doubled (ghost) reflections; the others are out of focus", low=0, high=1, source="paper"
    )
    reflections: str | None = param(
        None, "folder of at least two images to reflect; none = drawn scenes", path=True, source="ours"
    )
    pool: int = param(
        100, "largest number of scenes in the attacker's pool, and in the held-out one", low=1, source="ours"
    )
    brightness: float = param(
        53.0,
        "mean of the drawn scenes, in grey levels; a folder's pictures are taken as they are",
        above=0,
        high=128,
        source="published pictures",
    )
    scene_seed: int = param(
        0, "seed of the drawn scenes and of the draws, apart from the run's seed", low=0, source="ours"
    )

    def __post_init__(self) -> None:
        """The label mode is a fact of the class, but this attack comes in both."""
        super().__post_init__()
        object.__setattr__(self, "label_mode", "clean" if self.clean_label else "dirty")

    def make_trigger(self, task: Task, ctx: Context) -> ReflectionTrigger:
        """Draw the pool."""
        return self._trigger(task, "attack")

    def run(self, task: Task, ctx: Context) -> Backdoor:
        """As every poisoning attack; notes ASR with scenes that the attacker never used."""
        backdoor = super().run(task, ctx)
        held_out_backdoor = dataclasses.replace(backdoor, trigger=self._trigger(task, "held out"))
        held_out = held_out_backdoor.measure(task, ctx)["asr"]
        return dataclasses.replace(backdoor, notes=backdoor.notes | {"asr_held_out": held_out})

    def _trigger(self, task: Task, part: str) -> ReflectionTrigger:
        channels, height, width = expect_images(task.train.inputs).shape[1:]
        seed = derive_seed(self.scene_seed, part)
        if self.reflections is None:
            views = expose(scenes(self.pool, channels, height, width, seed), self.brightness)
        else:
            views = self._dealt(read_folder(self.reflections, channels, height, width))[part == "held out"]
        return ReflectionTrigger(views, self.transmission, self.ghost_rate, seed)

    def _dealt(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        if len(pictures) < 2:
            raise InputError(
                f"refool: {self.reflections!r} has one image; at least two are needed, one to attack with and one to "
                "see whether reflections that the attack never used work too"
            )
        order = torch.randperm(len(pictures), generator=make_generator(self.scene_seed, "deal"))
        first, second = order[0::2][: self.pool], order[1::2][: self.pool]
        return pictures[first], pictures[second]
