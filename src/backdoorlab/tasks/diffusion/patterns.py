"""Triggers and target images of attacks on diffusion models, drawn by rule for any image size.

All are float32 [C,H,W] in [-1, 1]; -1 is the background of a trigger.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backdoorlab.core.errors import InputError, unknown

BACKGROUND = -1.0
TARGET_GROUND = -0.4
"""Grey of a target's background: a target of mostly -1 would be close to a trigger's background and to dark data."""


def grey_box(shape: tuple[int, int, int], side: int | None = None, grey: float = 0.0) -> Tensor:
    """A square near the bottom-right corner, on black.

    Args:
        shape: channels, height and width.
        side: of the square in pixels; None keeps the proportion of the usual 14 of 32 pixels.
        grey: its value in [-1, 1].

    Raises:
        InputError: if the square and its margin (2 of 32 pixels) do not fit.
    """
    height, width = shape[1:]
    small = min(height, width)
    side, gap = max(1, small * 14 // 32) if side is None else side, max(1, small * 2 // 32)
    if side + gap > small:
        raise InputError(
            f"a box of {side} px with a margin of {gap} px does not fit {height}x{width} images; "
            f"the side may be at most {small - gap}"
        )
    canvas = torch.full(shape, BACKGROUND)
    canvas[:, height - gap - side : height - gap, width - gap - side : width - gap] = grey
    return canvas


def _plus(x: Tensor, y: Tensor) -> Tensor:
    return ((x.abs() < 0.2) & (y.abs() < 0.75)) | ((y.abs() < 0.2) & (x.abs() < 0.75))


def _hat(x: Tensor, y: Tensor) -> Tensor:
    crown = (x.abs() < 0.45) & (y > -0.6) & (y < 0.3)
    brim = (x.abs() < 0.85) & (y >= 0.3) & (y < 0.6)
    return crown | brim


TARGETS = {"plus": _plus, "hat": _hat}


def target_image(name: str, shape: tuple[int, int, int]) -> Tensor:
    """A white figure on grey: "plus", or "hat" (crown and brim, in place of the usual photograph of a fedora)."""
    if name not in TARGETS:
        raise unknown("target image", name, TARGETS)
    height, width = shape[1:]
    y = (torch.arange(height) + 0.5)[:, None] * 2 / height - 1
    x = (torch.arange(width) + 0.5)[None] * 2 / width - 1
    figure = TARGETS[name](x, y)
    return torch.where(figure, 1.0, TARGET_GROUND).expand(shape).contiguous()
