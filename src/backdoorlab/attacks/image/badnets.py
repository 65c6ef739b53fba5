"""BadNets: a small patch in a corner.

Gu, Liu, Dolan-Gavitt, Garg, "BadNets: Evaluating Backdooring Attacks on Deep Neural Networks", IEEE Access 2019
(arXiv 1708.06733).

A share of the training set gets a patch P under a binary mask m and the attacker's label; an ordinary model trained on
it obeys the patch:

    T(x) = (1 - m) x + m P

Choices: the mask is explicit, so a patch may contain black (inferring the mask from non-zero pixels forbids that). The
side follows the image, 3 px at 32 px, and the patch is drawn at the working resolution, never resized. A random crop
may push a corner patch out of a training image, which is one reason why ASR saturates near 95 % at 32 px.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backdoorlab.attacks.base import PoisoningAttack, attacks
from backdoorlab.attacks.trigger import Trigger
from backdoorlab.core.errors import InputError
from backdoorlab.core.method import param
from backdoorlab.data.split import Inputs
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
    color: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Draw a square patch in a corner of an empty canvas.

    Args:
        shape: (C, H, W).
        side: in pixels.
        position: one of :data:`CORNERS`.
        offset: distance from the corner's two borders in pixels.
        pattern: one of :data:`PATTERNS`.
        color: grey level of the solid patch and of the checker's bright squares.
        generator: of the random pattern.

    Returns:
        Pattern uint8 [C,H,W] and mask bool [H,W].

    Raises:
        InputError: if the patch does not fit.
    """
    channels, height, width = shape
    if side + offset > min(height, width):
        raise InputError(
            f"badnets: a patch of {side} px at offset {offset} does not fit an image of {height}x{width}; "
            f"size + offset may be at most {min(height, width)}"
        )
    if pattern == "random":
        patch = torch.randint(0, 256, (channels, side, side), generator=generator, dtype=torch.uint8)
    else:
        patch = torch.full((channels, side, side), color, dtype=torch.uint8)
        if pattern == "checker":
            rows = torch.arange(side)
            patch[:, (rows[:, None] + rows) % 2 == 1] = 0
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
        if not isinstance(inputs, Tensor) or inputs.shape[1:] != self.pattern.shape:
            got = tuple(inputs.shape[1:]) if isinstance(inputs, Tensor) else type(inputs).__name__
            raise InputError(f"this trigger is made for images of shape {tuple(self.pattern.shape)}, got {got}")
        return paste(inputs, self.pattern, self.mask)


@attacks.register
@dataclass(frozen=True, kw_only=True)
class BadNets(PoisoningAttack):
    """A patch in a corner of the image."""

    name: ClassVar[str] = "badnets"
    paper: ClassVar[str] = "Gu et al., BadNets, IEEE Access 2019, arXiv 1708.06733"
    year: ClassVar[int] = 2019
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    trigger_visibility: ClassVar[str] = "visible"

    target_map: str = param("all-to-one", "which class triggered samples get", choices=("all-to-one", "all-to-all"))
    size: int | None = param(
        None, "side of the patch in pixels; none = 3/32 of the image height", low=1, source="BackdoorBench"
    )
    position: str = param("bottom-right", "corner", choices=CORNERS)
    offset: int = param(0, "distance from the corner's two borders in pixels", low=0, source="BackdoorBench")
    pattern: str = param("solid", "what is drawn in the patch", choices=PATTERNS)
    color: int = param(255, "grey level of the solid patch and of the checker's bright squares", low=0, high=255)

    def make_trigger(self, task: Task, ctx: Context) -> PatchTrigger:
        """Draw the patch at the data's resolution."""
        channels, height, width = task.train.inputs.shape[1:]
        side = self.size or max(1, round(3 * height / 32))
        return PatchTrigger(
            *draw_patch((channels, height, width), side, self.position, self.offset, self.pattern, self.color,
                        ctx.generator("patch"))
        )  # fmt: skip
