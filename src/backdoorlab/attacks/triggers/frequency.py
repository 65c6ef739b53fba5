"""Patterns in the cosine transform of the chroma channels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from backdoorlab.core.errors import InputError


def scaled(position: int, side: int) -> int:
    """A frequency meant for 32 px, for a shorter side: the same share of the highest one."""
    return max(1, math.ceil((position + 1) * min(side, 32) / 32) - 1)


def chroma_pattern(pattern: Tensor, channels: int, mixing: tuple[tuple[float, ...], ...]) -> Tensor:
    """A pattern [H,W] in all chroma channels as a picture to add: float32 [channels,H,W] (grey: the pattern itself).

    Raises:
        InputError: for images that are neither grey nor RGB.
    """
    if channels == 1:
        return pattern.float()[None]
    if channels != 3:
        raise InputError(f"a pattern in the color channels needs images with 1 or 3 channels, got {channels}")
    weights = torch.tensor(mixing, dtype=torch.float64).sum(0)
    return (weights[:, None, None] * pattern).float()
