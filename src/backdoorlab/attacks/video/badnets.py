"""BadNets for video: a small patch in a corner of every frame.

Gu, Liu, Dolan-Gavitt, Garg, "BadNets", IEEE Access 2019 (arXiv 1708.06733), applied frame by frame:

    T(x)_t = (1 - m) x_t + m P   for every frame t

Choices: the side is 3/32 of the height but at least 3 px (random crops of small clips push 2 px out of a third of the
poisoned clips), and the patch is white by default (many clips have dark borders, where a black one would be invisible).
Everything else is as for images, with the same options.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backdoorlab.attacks.base import attacks
from backdoorlab.attacks.poisoning import PoisoningAttack
from backdoorlab.attacks.triggers.base import Trigger
from backdoorlab.attacks.triggers.patch import CORNERS, PATTERNS, draw_patch, paste
from backdoorlab.core.errors import InputError
from backdoorlab.core.method import param
from backdoorlab.data.split import Inputs
from backdoorlab.modalities.base import expect_modality
from backdoorlab.modalities.video import VideoModality
from backdoorlab.tasks import Task
from backdoorlab.training.context import Context


@dataclass(frozen=True, eq=False)
class VideoPatchTrigger(Trigger):
    """A pattern uint8 [C,H,W] under a mask bool [H,W], the same in all frames."""

    kind: ClassVar[str] = "video.patch"

    pattern: Tensor
    mask: Tensor

    def __call__(
        self, inputs: Inputs, indices: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Inputs:
        """Paste the patch into each frame; clips must be uint8 [N,T,C,H,W] of the pattern's size."""
        fits = isinstance(inputs, Tensor) and inputs.dtype == torch.uint8 and inputs.dim() == 5
        if not isinstance(inputs, Tensor) or not fits or inputs.shape[2:] != self.pattern.shape:
            got = f"{inputs.dtype} {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
            shape = ", ".join(map(str, self.pattern.shape))
            raise InputError(f"this trigger is made for uint8 clips of shape [N, T, {shape}], got {got}")
        return paste(inputs, self.pattern, self.mask)


@attacks.register
@dataclass(frozen=True, kw_only=True)
class VideoBadNets(PoisoningAttack):
    """A patch in a corner of every frame."""

    name: ClassVar[str] = "badnets"
    paper: ClassVar[str] = "Gu et al., BadNets, IEEE Access 2019, arXiv 1708.06733; frames as in BackdoorMBTI"
    year: ClassVar[int] = 2019
    modalities: ClassVar[tuple[str, ...]] = ("video",)
    trigger_visibility: ClassVar[str] = "visible"
    stronger: ClassVar[str] = "raise size"

    target_map: str = param(
        "all-to-one",
        "label of triggered samples: the target class, or their class + 1 mod K",
        choices=("all-to-one", "all-to-all"),
        source="BackdoorBench",
    )
    size: int | None = param(
        None, "side of the patch in pixels; none = 3/32 of the height, at least 3", low=1, source="ours"
    )
    position: str = param("bottom-right", "corner of the image in which the patch lies", choices=CORNERS, source="ours")
    offset: int = param(0, "distance of the patch from the two borders of its corner, in pixels", low=0, source="ours")
    pattern: str = param("solid", "what is drawn in the patch", choices=PATTERNS, source="ours")
    color: int = param(
        255, "grey level of the solid patch and of the checker's bright squares", low=0, high=255, source="ours"
    )

    def make_trigger(self, task: Task, ctx: Context) -> VideoPatchTrigger:
        """Draw the patch at the data's resolution."""
        modality = expect_modality(task.modality, VideoModality)
        shape = (modality.channels, modality.height, modality.width)
        side = self.size or max(3, round(3 * modality.height / 32))
        return VideoPatchTrigger(
            *draw_patch(shape, side, self.position, self.offset, self.pattern, self.color, ctx.generator("patch"))
        )
