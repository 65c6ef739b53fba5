"""FTrojan: two high-frequency cosine waves in the color channels.

Wang, Yao, Xu, An, Tong, Wang, "An Invisible Black-box Backdoor Attack through Frequency Domain", ECCV 2022
(arXiv 2111.10991).

In YCrCb each chroma channel is cut into windows of w x w pixels; in the orthonormal two-dimensional DCT of each window
a magnitude m is added at two positions, and everything is transformed back. As the transform is linear and orthonormal
and so is (up to scale) the change of color space, this adds one fixed picture:

    T(x) = round(clip(x + M D)),   D = inverse DCT of m at the positions,   M = the chroma columns of YCrCb -> RGB

with an amplitude of 2 m / w grey levels of chroma per position (1.9 by default).

Choices: the picture is made once and added, then clipped and rounded once. Published code goes to YCrCb and back in
uint8 and cuts the fraction off each time, which changes values even where nothing is added: with a magnitude of 0 it
changes 39 % of the values of CIFAR-10's test images, and with the default no value by more than 20 (so nothing wraps
around). That loss is no part of the trigger here. The window is 32 px or the shorter side of a smaller image, and the
positions (15, 15) and (31, 31) scale with it. Images that are not a multiple of the window get the pattern continued to
their border. Grey images have no chroma: the pattern is added to the grey channel itself, so it is less invisible
there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backdoorlab.attacks.base import attacks
from backdoorlab.attacks.poisoning import PoisoningAttack
from backdoorlab.attacks.triggers.frequency import chroma_pattern, scaled
from backdoorlab.attacks.triggers.pixels import FormulaTrigger
from backdoorlab.core.errors import InputError
from backdoorlab.core.method import param
from backdoorlab.modalities.filters import expect_images, inverse_dct
from backdoorlab.tasks import Task
from backdoorlab.training.context import Context

CR_CB = ((1.403, -0.714, 0.0), (0.0, -0.344, 1.773))
"""What one grey level of Cr and of Cb adds to red, green and blue."""


def tile(side: int, magnitude: float, positions: tuple[int, ...]) -> Tensor:
    """One window of the pattern: float64 [side, side]."""
    coefficients = torch.zeros(side, side, dtype=torch.float64)
    for position in positions:
        coefficients[scaled(position, side), scaled(position, side)] += magnitude
    return inverse_dct(coefficients)


def windows(
    channels: int, height: int, width: int, window: int | None, magnitude: float, positions: tuple[int, ...]
) -> Tensor:
    """The picture to add: float32 [channels, height, width].

    Raises:
        InputError: if the window does not fit.
    """
    side = window or min(32, height, width)
    if side > min(height, width):
        raise InputError(
            f"ftrojan: a window of {side} px does not fit an image of {height}x{width}; "
            f"window may be at most {min(height, width)}"
        )
    repeats = (-(-height // side), -(-width // side))
    pattern = tile(side, magnitude, positions).repeat(repeats)[:height, :width]
    return chroma_pattern(pattern, channels, CR_CB)


@dataclass(frozen=True, eq=False)
class WindowsTrigger(FormulaTrigger):
    """Add cosine waves window by window; fits images of any size that holds a window."""

    kind: ClassVar[str] = "image.dct-windows"

    window: int | None
    magnitude: float
    positions: tuple[int, ...]

    def draw(self, channels: int, height: int, width: int) -> Tensor:
        """See :func:`windows`."""
        return windows(channels, height, width, self.window, self.magnitude, self.positions)


@attacks.register
@dataclass(frozen=True, kw_only=True)
class FTrojan(PoisoningAttack):
    """Two high frequencies in the chroma channels, window by window."""

    name: ClassVar[str] = "ftrojan"
    paper: ClassVar[str] = (
        "Wang et al., Invisible Black-box Attack through Frequency Domain, ECCV 2022, arXiv 2111.10991"
    )
    year: ClassVar[int] = 2022
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    trigger_visibility: ClassVar[str] = "invisible"
    stronger: ClassVar[str] = "raise magnitude"

    magnitude: float = param(30.0, "value added to the DCT coefficients of a window", above=0, source="paper")
    window: int | None = param(
        None, "side of a DCT window in pixels; none = 32, or a smaller image's shorter side", low=4, source="paper"
    )
    positions: tuple[int, ...] = param(
        (15, 31), "diagonal positions of the changed coefficients in a window of 32 px", source="paper"
    )

    def make_trigger(self, task: Task, ctx: Context) -> WindowsTrigger:
        """Compute the picture to add."""
        channels, height, width = expect_images(task.train.inputs).shape[1:]
        if not self.positions or not all(1 <= p <= 31 for p in self.positions):
            raise InputError(f"ftrojan: positions must be numbers from 1 to 31, got {self.positions}")
        pattern = windows(channels, height, width, self.window, self.magnitude, self.positions)
        return WindowsTrigger(pattern, self.window, self.magnitude, self.positions)
