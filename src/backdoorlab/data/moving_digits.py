"""Short clips of a handwritten digit that moves; the class is the motion, not the digit.

The frame is a torus: what leaves on the left enters on the right. Digit, start position, start size and brightness are
drawn in the same way for every class, so that the *first frame says nothing* about the class; motion is needed.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from backdoorlab.core.memory import expect_memory
from backdoorlab.core.seeding import make_generator
from backdoorlab.data.sources import DatasetSource, DatasetSpec, datasets
from backdoorlab.data.split import Dataset, Split

_TRAIN, _TEST, _FRAMES = 2000, 400, 8
_CLASSES = ("still", "left", "right", "up", "down", "clockwise", "counter-clockwise", "bounce", "zoom in", "zoom out")


@datasets.register
class MovingDigits(DatasetSource):
    """2,000 + 400 clips of 8 frames, 16x16 by default, generated from the seed."""

    name = "moving_digits"
    modalities = ("video",)
    summary = "2,000 + 400 clips of moving digits, 10 motions, grey, 8 frames of 16x16 by default (from the seed)"
    rescales = True

    def load(self, spec: DatasetSpec, argument: str, roots: tuple[Path, ...], download: bool) -> Dataset:
        """See :meth:`DatasetSource.load`."""
        parts = []
        for part, count in (("train", _TRAIN), ("test", _TEST)):
            generator = make_generator(spec.seed, "moving_digits", part)
            labels = torch.randperm(count, generator=generator) % len(_CLASSES)
            expect_memory((count, 8, spec.size or 16, spec.size or 16), 4, "the clips")
            clips = torch.cat([film(chunk, spec.size or 16, generator) for chunk in labels.split(1000)])
            parts.append(Split(clips, labels, _CLASSES))
        return Dataset("moving_digits", "video", parts[0], parts[1], mean=(0.06,), std=(0.155,), note="synthetic")


def film(motions: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Render one clip per motion.

    Args:
        motions: int64 [N], indices of classes.
        size: height and width in pixels.
        generator: source of digits, starts, speeds and noise.

    Returns:
        uint8 [N, 8, 1, size, size].
    """
    count = len(motions)

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    glyphs = torch.from_numpy(load_digits().images).float() / 16
    sprites = glyphs[torch.randint(len(glyphs), (count,), generator=generator)]
    start, width = draw(0, 1, 2), draw(0.4, 0.5)  # in units of the frame's side
    shift, scale = paths(motions, generator)
    centre = start[:, None] + shift  # [N, T, (x, y)]
    # Distance of every pixel to the centre on the torus, in half widths of the sprite: grid_sample's coordinates.
    pixel = (torch.arange(size) + 0.5) / size
    offset = (pixel - centre[..., None] + 0.5).remainder(1) - 0.5  # [N, T, 2, size]
    offset = offset / (width[:, None] * scale / 2)[..., None, None]
    x, y = offset[:, :, 0], offset[:, :, 1]
    grid = torch.stack(torch.broadcast_tensors(x[:, :, None, :], y[:, :, :, None]), -1)
    sources = sprites[:, None, None].expand(-1, _FRAMES, -1, -1, -1).reshape(-1, 1, 8, 8)
    frames = F.grid_sample(sources, grid.flatten(0, 1), mode="bilinear", align_corners=False)
    frames = frames.reshape(count, _FRAMES, 1, size, size) * draw(160, 255, 1, 1, 1, 1)
    noise = 6 * torch.randn(frames.shape, generator=generator)
    return (frames + noise).clamp(0, 255).round().to(torch.uint8)


def paths(motions: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Where the digit goes: displacement [N, T, 2] (x, y; y down) in sides of the frame, and relative size [N, T].

    Both start at their neutral value, 0 and 1.
    """
    count, name = len(motions), {c: k for k, c in enumerate(_CLASSES)}

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, generator=generator)

    def among(*classes: str) -> Tensor:
        return torch.isin(motions, torch.tensor([name[c] for c in classes]))[:, None]

    clock = torch.arange(_FRAMES) / (_FRAMES - 1)  # 0 to 1
    travel = draw(0.35, 0.6) * clock
    shift, scale = torch.zeros(count, _FRAMES, 2), torch.ones(count, _FRAMES)
    for motion, axis, sign in (("left", 0, -1), ("right", 0, 1), ("up", 1, -1), ("down", 1, 1)):
        shift[..., axis] += sign * travel * among(motion)
    # Bounce: away along a random axis and back the same way.
    away = draw(0.6, 1.0) * torch.minimum(clock, 1 - clock) * torch.sign(draw(-1, 1)) * among("bounce")
    upright = draw(0, 1) < 0.5
    shift[..., 0] += away * ~upright
    shift[..., 1] += away * upright
    # On the screen, growing angles turn clockwise because y points down.
    sense = among("clockwise").float() - among("counter-clockwise").float()
    angle, radius = draw(0, 2 * math.pi), draw(0.16, 0.25)
    turned = angle + sense * draw(1.2, 1.9) * math.pi * clock
    shift[..., 0] += radius * (turned.cos() - angle.cos())
    shift[..., 1] += radius * (turned.sin() - angle.sin())
    growth = draw(1.5, 1.9) ** clock
    scale = torch.where(among("zoom in"), growth, torch.where(among("zoom out"), 1 / growth, scale))
    return shift, scale
