"""Triggers that several image attacks share: adding a fixed pattern, and laying pictures over the image."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorlab.attacks.common.pictures import resize
from backdoorlab.attacks.triggers.base import Trigger
from backdoorlab.core.errors import InputError
from backdoorlab.data.split import Inputs
from backdoorlab.modalities.filters import expect_channels, expect_images
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
        resizable: whether the pictures may be resized to images of another size; pictures with exact positions, or of
            noise, may not.
    """

    kind: ClassVar[str] = "image.blend"

    keys: Tensor
    opacity: Tensor
    resizable: bool = False

    def __call__(
        self, inputs: Inputs, indices: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Inputs:
        """Blend; images must be uint8 [N,C,H,W], of the pictures' size unless those are resizable."""
        out = images = expect_images(inputs)
        for key, share in zip(*self._sized(images), strict=True):
            out = overlay(out, key.to(images.device), share.to(images.device))
        return to_uint8(out)

    def _sized(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if images.shape[1:] == self.keys.shape[1:]:
            return self.keys, self.opacity
        if not self.resizable:
            expect_images(images, self.keys.shape[1:])
        expect_channels(images, self.keys.shape[1])
        size = (images.shape[2], images.shape[3])
        return resize(self.keys, *size), F.interpolate(self.opacity[None], size, mode="nearest-exact")[0]


def key_of(trigger: Trigger) -> Tensor:
    """The first picture of a blend trigger, uint8 [C,H,W].

    Raises:
        InputError: for another kind of trigger.
    """
    if not isinstance(trigger, BlendTrigger):
        raise InputError(f"a trigger of kind {trigger.kind!r} has no key image; expected {BlendTrigger.kind!r}")
    return trigger.keys[0]


@dataclass(frozen=True, eq=False)
class AdditiveTrigger(Trigger):
    """A fixed pattern, float32 [C,H,W] in grey levels, added to the image."""

    kind: ClassVar[str] = "image.additive"

    pattern: Tensor

    def __call__(
        self, inputs: Inputs, indices: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Inputs:
        """Add, clip, round; images must be uint8 [N,C,H,W] of a size that the pattern fits."""
        images = expect_images(inputs)
        return to_uint8(images.float().add_(self.pattern_for(images).to(images.device)))

    def pattern_for(self, images: Tensor) -> Tensor:
        """The pattern for images of that size.

        Raises:
            InputError: if it is made for another size only.
        """
        expect_images(images, self.pattern.shape)
        return self.pattern


@dataclass(frozen=True, eq=False)
class FormulaTrigger(AdditiveTrigger):
    """A pattern with a closed form, drawn anew for images of another size.

    The pattern of the original size is stored nevertheless: it is what the victim learned, to the last bit.
    """

    def pattern_for(self, images: Tensor) -> Tensor:
        """The stored pattern, or the formula at the images' size."""
        if images.shape[1:] == self.pattern.shape:
            return self.pattern
        channels, height, width = expect_channels(images, len(self.pattern)).shape[1:]
        return self.draw(channels, height, width)

    @abstractmethod
    def draw(self, channels: int, height: int, width: int) -> Tensor:
        """The pattern in grey levels: float32 [channels, height, width].

        Raises:
            InputError: if it cannot be drawn at that size.
        """


def picture_hash(picture: Tensor) -> str:
    """SHA-256 of a uint8 picture's pixels, so that a key image can be published without being shipped."""
    return hashlib.sha256(np.ascontiguousarray(picture.cpu().numpy()).data).hexdigest()


def constant_blend(key: Tensor, alpha: float, resizable: bool = False) -> BlendTrigger:
    """Blend a key uint8 [C,H,W] with the same ratio everywhere."""
    return BlendTrigger(key[None], torch.full((1, *key.shape[1:]), alpha), resizable)
