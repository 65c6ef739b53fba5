"""Triggers that several image attacks share: adding a fixed pattern, and laying pictures over the image."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from backdoorlab.attacks.trigger import Trigger
from backdoorlab.data.split import Inputs
from backdoorlab.modalities.filters import expect_images
from backdoorlab.modalities.image import to_uint8


def overlay(images: Tensor, keys: Tensor, opacity: Tensor) -> Tensor:
    """Lay a picture over images: (1 - opacity) x + opacity key, in float and unrounded.

    Args:
        images: [N,C,H,W], any dtype.
        keys: [C,H,W] or [N,C,H,W], grey levels.
        opacity: [H,W] or [N,1,H,W], in [0, 1].

    Returns:
        float32 [N,C,H,W].
    """
    return (1 - opacity) * images.float() + opacity * keys.float()


@dataclass(frozen=True, eq=False)
class BlendTrigger(Trigger):
    """L pictures laid over the image one after the other, rounded once at the end.

    Attributes:
        keys: uint8 [L,C,H,W].
        opacity: float32 [L,H,W], in [0, 1].
    """

    kind: ClassVar[str] = "image.blend"

    keys: Tensor
    opacity: Tensor

    def __call__(
        self, inputs: Inputs, indices: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Inputs:
        """Blend; images must be uint8 [N,C,H,W] of the pictures' size."""
        images = expect_images(inputs, self.keys.shape[1:])
        keys, opacity, out = self.keys.to(images.device), self.opacity.to(images.device), images
        for key, share in zip(keys, opacity, strict=True):
            out = overlay(out, key, share)
        return to_uint8(out)


@dataclass(frozen=True, eq=False)
class AdditiveTrigger(Trigger):
    """A fixed pattern, float32 [C,H,W] in grey levels, added to the image."""

    kind: ClassVar[str] = "image.additive"

    pattern: Tensor

    def __call__(
        self, inputs: Inputs, indices: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Inputs:
        """Add, clip, round; images must be uint8 [N,C,H,W] of the pattern's size."""
        images = expect_images(inputs, self.pattern.shape)
        return to_uint8(images.float() + self.pattern.to(images.device))


def picture_hash(picture: Tensor) -> str:
    """SHA-256 of a uint8 picture's pixels, so that a key image can be published without being shipped."""
    return hashlib.sha256(np.ascontiguousarray(picture.cpu().numpy()).data).hexdigest()
