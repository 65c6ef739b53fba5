"""Colored shapes with captions: for classification and text-to-image methods without any file.

The class is the shape. Color, background, size, position and a slight rotation vary; the caption names shape, color,
size and background in one of several wordings. Shapes are drawn from signed distances, with edges one pixel soft.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from backdoorlab.core.memory import expect_memory
from backdoorlab.core.seeding import make_generator
from backdoorlab.data.sources import DatasetSource, DatasetSpec, datasets
from backdoorlab.data.split import Dataset, Split

_TRAIN, _TEST = 4000, 800
_CLASSES = ("circle", "square", "triangle", "hexagon", "star", "cross", "ring", "bar")
_COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 210, 50),
    "purple": (150, 60, 180),
    "orange": (240, 140, 40),
    "cyan": (60, 200, 210),
    "pink": (240, 130, 180),
}
_GROUNDS = {"white": (235, 235, 235), "black": (20, 20, 20), "grey": (120, 120, 120), "brown": (100, 70, 45)}
_SIZES = {"small": (0.16, 0.22), "large": (0.28, 0.34)}  # radius in sides of the image
_WORDINGS = (
    "a {size} {color} {shape} on a {ground} background",
    "one {color} {shape}, {size}, in front of {ground}",
    "{ground} background with a {size} {color} {shape}",
    "a picture of a {size} {color} {shape} on {ground}",
)


@datasets.register
class Shapes(DatasetSource):
    """4,000 + 800 pictures, 32x32 by default, generated from the seed."""

    name = "shapes"
    modalities = ("image",)
    summary = "4,000 + 800 synthetic shapes with captions, 8 classes, RGB, 32x32 by default (from the seed)"
    rescales = True

    def load(self, spec: DatasetSpec, argument: str, roots: tuple[Path, ...], download: bool) -> Dataset:
        """See :meth:`DatasetSource.load`."""
        parts, captions = [], []
        for part, count in (("train", _TRAIN), ("test", _TEST)):
            generator = make_generator(spec.seed, "shapes", part)
            labels = torch.randperm(count, generator=generator) % len(_CLASSES)
            expect_memory((count, 3, spec.size or 32, spec.size or 32), 16, "the shapes")  # drawn in floats
            images, choices = draw_shapes(labels, spec.size or 32, generator)
            parts.append(Split(images, labels, _CLASSES))
            captions.append(_captions(labels, choices))
        return Dataset(
            "shapes",
            "image",
            parts[0],
            parts[1],
            flip=True,
            mean=(0.44, 0.41, 0.39),
            std=(0.29, 0.28, 0.3),
            captions=(captions[0], captions[1]),
            note="synthetic",
        )


def draw_shapes(shapes: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw one picture per shape.

    Args:
        shapes: int64 [N], indices of classes.
        size: height and width in pixels.
        generator: source of everything else.

    Returns:
        uint8 [N, 3, size, size] and the choices int64 [N, 4] (color, background, size, wording).
    """
    count = len(shapes)
    options = (_COLORS, _GROUNDS, _SIZES, _WORDINGS)
    choices = torch.stack([torch.randint(len(o), (count,), generator=generator) for o in options], 1)
    uniform = torch.rand(count, 4, generator=generator)
    low, high = torch.tensor(list(_SIZES.values()))[choices[:, 2]].T
    radius = low + (high - low) * uniform[:, 0]
    # Anywhere as long as a circle of that radius is inside.
    centre = radius[:, None] + (1 - 2 * radius[:, None]) * uniform[:, 1:3]
    angle = (uniform[:, 3] - 0.5) * math.pi / 6
    pixel = (torch.arange(size) + 0.5) / size
    x = (pixel - centre[:, :1])[:, None, :] / radius[:, None, None]
    y = (pixel - centre[:, 1:])[:, :, None] / radius[:, None, None]
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    x, y = cos * x + sin * y, cos * y - sin * x  # in units of the radius, y down
    inside = torch.empty(count, size, size)
    for k, name in enumerate(_CLASSES):
        of_shape = shapes == k
        distance = _distance(name, x[of_shape], y[of_shape])
        inside[of_shape] = (0.5 - distance * radius[of_shape, None, None] * size).clamp(0, 1)
    ink = torch.tensor(list(_COLORS.values())).float()[choices[:, 0], :, None, None]
    ground = torch.tensor(list(_GROUNDS.values())).float()[choices[:, 1], :, None, None]
    light = 0.85 + 0.15 * torch.rand(count, 1, 1, 1, generator=generator)
    images = torch.lerp(ground, ink, inside[:, None]) * light
    images += 4 * torch.randn(images.shape, generator=generator)
    return images.clamp_(0, 255).round_().to(torch.uint8), choices


def _distance(name: str, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance to the shape of circumradius 1 around the origin (negative inside, exact at straight edges)."""
    match name:
        case "circle":
            return torch.hypot(x, y) - 0.95
        case "ring":
            return (torch.hypot(x, y) - 0.75).abs() - 0.22
        case "square":
            return _box(x, y, 0.72, 0.72)
        case "bar":
            return _box(x, y, 0.97, 0.25)
        case "cross":
            return torch.minimum(_box(x, y, 0.95, 0.25), _box(x, y, 0.25, 0.95))
        case "triangle":
            return _polygon(x, y, 3)
        case "hexagon":
            return _polygon(x, y, 6)
        case _:  # star: five points, edges from each tip to the second next
            turn = 2 * math.pi / 5
            folded = torch.atan2(x, -y).remainder(turn)
            folded = torch.minimum(folded, turn - folded)  # angle to the nearest tip
            px, py = torch.hypot(x, y) * folded.cos(), torch.hypot(x, y) * folded.sin()
            return (px - 1) * math.sin(math.pi / 10) + py * math.cos(math.pi / 10)


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


def _polygon(x: Tensor, y: Tensor, corners: int) -> Tensor:
    """Regular polygon, one corner at the top: the largest of the distances to its edges."""
    angles = (torch.arange(corners) + 0.5) * (2 * math.pi / corners)
    edges = [x * math.sin(a) - y * math.cos(a) for a in angles.tolist()]
    return torch.stack(edges).amax(0) - math.cos(math.pi / corners)


def _captions(shapes: Tensor, choices: Tensor) -> tuple[str, ...]:
    colors, grounds, sizes = list(_COLORS), list(_GROUNDS), list(_SIZES)
    return tuple(
        _WORDINGS[w].format(color=colors[c], ground=grounds[g], size=sizes[s], shape=_CLASSES[k])
        for k, (c, g, s, w) in zip(shapes.tolist(), choices.tolist(), strict=True)
    )
