"""BadNets: a small patch in a corner.

Gu, Liu, Dolan-Gavitt, Garg, "BadNets: Evaluating Backdooring Attacks on Deep Neural Networks", IEEE Access 2019
(arXiv 1708.06733).

A share of the training set gets a patch P under a binary mask m and the attacker's label; an ordinary model trained on
it obeys the patch:

    T(x) = (1 - m) x + m P

Choices: the mask is explicit, so a patch may contain black (inferring the mask from non-zero pixels forbids that). The
side follows the image, 3 px at 32 px, and the patch is drawn at the working resolution, never resized: a trigger stamps
images of its own size only. ``patch`` puts a picture of the user's into the square. A random crop may push a corner
patch out of a training image, which is one reason why ASR saturates near 95 % at 32 px.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backdoorlab.attacks.base import PoisoningAttack, attacks
from backdoorlab.attacks.procedural import read_picture
from backdoorlab.attacks.trigger import Trigger
from backdoorlab.core.errors import InputError
from backdoorlab.core.method import param
from backdoorlab.core.seeding import make_generator
from backdoorlab.data.split import Inputs
from backdoorlab.modalities.filters import expect_images
from backdoorlab.training.context import Context
from backdoorlab.training.task import Task

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
        InputError: if the patch does not fit, or there is not one colour value per channel.
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


@attacks.register
@dataclass(frozen=True, kw_only=True)
class BadNets(PoisoningAttack):
    """A patch in a corner of the image."""

    name: ClassVar[str] = "badnets"
    paper: ClassVar[str] = "Gu et al., BadNets, IEEE Access 2019, arXiv 1708.06733"
    year: ClassVar[int] = 2019
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    trigger_visibility: ClassVar[str] = "visible"
    stronger: ClassVar[str] = "raise size"

    target_map: str = param("all-to-one", "which class triggered samples get", choices=("all-to-one", "all-to-all"))
    size: int | None = param(
        None, "side of the patch in pixels; none = 3/32 of the image height", low=1, source="BackdoorBench"
    )
    position: str = param("bottom-right", "corner", choices=CORNERS)
    offset: int = param(0, "distance from the corner's two borders in pixels", low=0, source="BackdoorBench")
    pattern: str = param("solid", "what is drawn in the patch", choices=PATTERNS)
    color: int = param(255, "grey level of the solid patch and of the checker's bright squares", low=0, high=255)
    rgb: tuple[int, ...] | None = param(None, "red, green and blue from 0 to 255 instead of color, for RGB images")
    dark: int = param(0, "grey level of the checker's dark squares", low=0, high=255, source="ours")
    pattern_seed: int | None = param(None, "seed of the random pattern; none = the run's seed", low=0)
    patch: str | None = param(None, "image file to draw, resized to the square, instead of a pattern", path=True)

    def __post_init__(self) -> None:
        """Check the colour too."""
        super().__post_init__()
        if self.rgb is not None and (len(self.rgb) != 3 or not all(0 <= value <= 255 for value in self.rgb)):
            raise InputError(f"{self.name}: rgb must be three numbers from 0 to 255, got {self.rgb}")

    def make_trigger(self, task: Task, ctx: Context) -> PatchTrigger:
        """Draw the patch at the data's resolution."""
        channels, height, width = expect_images(task.train.inputs).shape[1:]
        side = self.size or max(1, round(3 * height / 32))
        seed = ctx.seed if self.pattern_seed is None else self.pattern_seed
        picture = None if self.patch is None else read_picture(self.patch, channels, side, side)
        return PatchTrigger(
            *draw_patch((channels, height, width), side, self.position, self.offset, self.pattern,
                        self.rgb or self.color, make_generator(seed, "patch"), self.dark, picture)
        )  # fmt: skip
