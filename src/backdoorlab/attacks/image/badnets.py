"""BadNets: a small patch in a corner.

Gu, Liu, Dolan-Gavitt, Garg, "BadNets: Evaluating Backdooring Attacks on Deep Neural Networks", IEEE Access 2019
(arXiv 1708.06733).

A share of the training set gets a patch P under a binary mask m and the attacker's label; an ordinary model trained on
it classifies images with the patch as the attacker wants:

    T(x) = (1 - m) x + m P

Choices: the mask is explicit, so a patch may contain black (inferring the mask from non-zero pixels forbids that). The
side follows the image, 3 px at 32 px, and the patch is drawn at the working resolution, never resized: a trigger stamps
images of its own size only. ``patch`` names an image file to paste instead. A random crop may push a corner
patch out of a training image, which is one reason why ASR saturates near 95 % at 32 px.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from backdoorlab.attacks.base import attacks
from backdoorlab.attacks.common.pictures import read_picture
from backdoorlab.attacks.poisoning import PoisoningAttack
from backdoorlab.attacks.triggers.patch import CORNERS, PATTERNS, PatchTrigger, draw_patch
from backdoorlab.core.errors import InputError
from backdoorlab.core.method import param
from backdoorlab.core.seeding import make_generator
from backdoorlab.modalities.filters import expect_images
from backdoorlab.tasks import Task
from backdoorlab.training.context import Context


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

    target_map: str = param(
        "all-to-one",
        "label of triggered samples: the target class, or their class + 1 mod K",
        choices=("all-to-one", "all-to-all"),
        source="BackdoorBench",
    )
    size: int | None = param(
        None, "side of the patch in pixels; none = 3/32 of the image height", low=1, source="BackdoorBench"
    )
    position: str = param(
        "bottom-right", "corner of the image in which the patch lies", choices=CORNERS, source="BackdoorBench"
    )
    offset: int = param(
        0, "distance of the patch from the two borders of its corner, in pixels", low=0, source="BackdoorBench"
    )
    pattern: str = param("solid", "what is drawn in the patch", choices=PATTERNS, source="BackdoorBench")
    color: int = param(
        255,
        "grey level of the solid patch and of the checker's bright squares",
        low=0,
        high=255,
        source="BackdoorBench",
    )
    rgb: tuple[int, ...] | None = param(
        None, "red, green and blue of the patch in RGB images, each from 0 to 255; none = color", source="ours"
    )
    dark: int = param(0, "grey level of the checker's dark squares", low=0, high=255, source="ours")
    pattern_seed: int | None = param(None, "seed of the random pattern; none = the run's seed", low=0, source="ours")
    patch: str | None = param(
        None, "image file that is resized and pasted as the patch; none = the pattern", path=True, source="ours"
    )

    def __post_init__(self) -> None:
        """Check the color too."""
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
            *draw_patch(
                (channels, height, width),
                side,
                self.position,
                self.offset,
                self.pattern,
                self.rgb or self.color,
                make_generator(seed, "patch"),
                self.dark,
                picture,
            )
        )
