"""Patches: drawn, placed in a corner or anywhere, and pasted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backdoorlab.attacks.draws import sample_uniform
from backdoorlab.attacks.triggers.base import Trigger
from backdoorlab.core.errors import InputError
from backdoorlab.data.split import Inputs
from backdoorlab.modalities.filters import expect_images

CORNERS = ("bottom-right", "bottom-left", "top-right", "top-left")


PATTERNS = ("solid", "checker", "random")


def paste(images: Tensor, pattern: Tensor, mask: Tensor) -> Tensor:
    """Replace the pixels under a mask.

    Args:
        images: uint8 [N,C,H,W], or videos [N,T,C,H,W].
        pattern: uint8 [C,H,W].
        mask: bool [H,W].

    Returns:
        uint8, a copy of the shape of ``images``.
    """
    return torch.where(mask.to(images.device), pattern.to(images.device), images)


def draw_patch(
    shape: tuple[int, int, int],
    side: int,
    position: str,
    offset: int,
    pattern: str,
    color: int | Sequence[int],
    generator: torch.Generator,
    dark: int = 0,
    picture: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw a square patch in a corner of an empty canvas.

    Args:
        shape: (C, H, W).
        side: in pixels.
        position: one of :data:`CORNERS`.
        offset: distance from the corner's two borders in pixels.
        pattern: one of :data:`PATTERNS`.
        color: grey level of the solid patch and of the checker's bright squares, or one per channel.
        generator: of the random pattern.
        dark: grey level of the checker's dark squares.
        picture: uint8 [C,side,side] to be drawn instead of a pattern.

    Returns:
        Pattern uint8 [C,H,W] and mask bool [H,W].

    Raises:
        InputError: if the patch does not fit, or there is not one color value per channel.
    """
    channels, height, width = shape
    colors = [color] * channels if isinstance(color, int) else list(color)
    if len(colors) != channels:
        raise InputError(
            f"badnets: rgb gives {len(colors)} values, but the images have {channels} channel; use color, a grey level"
        )
    if side + offset > min(height, width):
        raise InputError(
            f"badnets: a patch of {side} px at offset {offset} does not fit an image of {height}x{width}; "
            f"size + offset may be at most {min(height, width)}"
        )
    if picture is not None:
        patch = picture
    elif pattern == "random":
        patch = torch.randint(0, 256, (channels, side, side), generator=generator, dtype=torch.uint8)
    else:
        patch = torch.tensor(colors, dtype=torch.uint8).reshape(-1, 1, 1).repeat(1, side, side)
        if pattern == "checker":
            rows = torch.arange(side)
            patch[:, (rows[:, None] + rows) % 2 == 1] = dark
    top = offset if position.startswith("top") else height - side - offset
    left = offset if position.endswith("left") else width - side - offset
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[top : top + side, left : left + side] = True
    canvas = torch.zeros(channels, height, width, dtype=torch.uint8)
    canvas[:, mask] = patch.flatten(1)
    return canvas, mask


@dataclass(frozen=True, eq=False)
class PatchTrigger(Trigger):
    """A pattern uint8 [C,H,W] under a mask bool [H,W]."""

    kind: ClassVar[str] = "image.patch"

    pattern: Tensor
    mask: Tensor

    def __call__(
        self, inputs: Inputs, indices: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Inputs:
        """Paste the patch; images must be uint8 [N,C,H,W] of the pattern's size."""
        return paste(expect_images(inputs, self.pattern.shape), self.pattern, self.mask)


@dataclass(frozen=True, eq=False)
class PlacedPatchTrigger(Trigger):
    """A patch pasted at a random place, which belongs to the sample.

    Attributes:
        patch: uint8 [C,h,w].
        seed: of the places.
    """

    kind: ClassVar[str] = "image.placed_patch"

    patch: Tensor
    seed: int

    def __call__(
        self, inputs: Inputs, indices: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Inputs:
        """Paste; images must be uint8 [N,C,H,W], not smaller than the patch.

        Raises:
            InputError: if they are not.
        """
        images, patch = expect_images(inputs), self.patch
        if images.shape[1] != len(patch) or any(a < b for a, b in zip(images.shape[2:], patch.shape[1:], strict=True)):
            raise InputError(
                f"this trigger is made for images of {len(patch)} channels and at least {patch.shape[1]}x"
                f"{patch.shape[2]}, got {tuple(images.shape[1:])}"
            )
        share = sample_uniform(self.seed, images, 2, indices, generator)
        return paste_at(images, patch.to(images.device), corners_from(share, images, patch))


def corners_from(share: Tensor, images: Tensor, patch: Tensor) -> Tensor:
    """Top left corners, int64 [N,2], that let the patch lie inside the images, each equally likely.

    Args:
        share: uniform numbers in [0, 1), float [N,2].
        images: [N,C,H,W].
        patch: [C,h,w].
    """
    free = [images.shape[2] - patch.shape[1] + 1, images.shape[3] - patch.shape[2] + 1]
    return (share.double() * torch.tensor(free, device=share.device)).long()


def paste_at(images: Tensor, patch: Tensor, corners: Tensor) -> Tensor:
    """Paste one patch [C,h,w] at a place per image: a copy of ``images`` [N,C,H,W] with ``corners`` int64 [N,2]."""
    (height, width), (patch_height, patch_width) = images.shape[2:], patch.shape[1:]
    row = torch.arange(height, device=images.device) - corners[:, :1]
    column = torch.arange(width, device=images.device) - corners[:, 1:]
    inside = ((row >= 0) & (row < patch_height))[:, :, None] & ((column >= 0) & (column < patch_width))[:, None, :]
    shifted = patch[
        :, row.clamp(0, patch_height - 1)[:, :, None], column.clamp(0, patch_width - 1)[:, None, :]
    ].transpose(0, 1)
    return torch.where(inside[:, None], shifted, images)
