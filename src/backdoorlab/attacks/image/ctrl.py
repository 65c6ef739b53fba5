"""CTRL: cosine waves over the whole image in the color channels of target-class samples.

Li, Pang, Xi, Du, Ji, Yao, Wang, "An Embarrassingly Simple Backdoor Attack on Self-supervised Learning", ICCV 2023
(arXiv 2210.07346), in its supervised adaptation.

In YUV a magnitude m is added at two positions of the orthonormal two-dimensional DCT of the whole chroma channels U and
V. By linearity this adds one fixed picture:

    T(x) = round(clip(x + M D)),   D = inverse DCT of m at the positions,   M = the U and V columns of YUV -> RGB

Clean label: only target-class samples are changed and no label is. Default rate 5 %.

Choices: clip before the cast (published code wraps around). m is meant for 32x32 and scales with sqrt(H W) / 32, which
keeps the amplitude at 6.25 grey levels of chroma per position for every size. The positions (15, 15) and (31, 31) scale
down with sides below 32 px and stay where they are above. m may differ between training and test (the paper: 50 and
100). Grey images have no chroma: the pattern is added to the grey channel itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backdoorlab.attacks.base import attacks
from backdoorlab.attacks.poisoning import PoisoningAttack
from backdoorlab.attacks.selection import class_rate
from backdoorlab.attacks.triggers.base import Trigger
from backdoorlab.attacks.triggers.frequency import chroma_pattern, scaled
from backdoorlab.attacks.triggers.pixels import FormulaTrigger
from backdoorlab.core.errors import InputError
from backdoorlab.core.method import param
from backdoorlab.data.split import Inputs
from backdoorlab.modalities.filters import expect_images, inverse_dct
from backdoorlab.tasks import Task
from backdoorlab.training.context import Context

U_V = ((0.0, -0.396, 2.029), (1.14, -0.581, 0.0))
"""What one grey level of U and of V adds to red, green and blue."""


def waves(height: int, width: int, magnitude: float, positions: tuple[int, ...]) -> Tensor:
    """The pattern in one chroma channel: float64 [height, width]."""
    coefficients = torch.zeros(height, width, dtype=torch.float64)
    for position in positions:
        coefficients[scaled(position, height), scaled(position, width)] += magnitude
    return inverse_dct(coefficients) * (math.sqrt(height * width) / 32)


@dataclass(frozen=True, eq=False)
class WavesTrigger(FormulaTrigger):
    """Add cosine waves to the color channels; fits images of any size."""

    kind: ClassVar[str] = "image.dct-waves"

    magnitude: float
    positions: tuple[int, ...]

    def draw(self, channels: int, height: int, width: int) -> Tensor:
        """See :func:`waves`."""
        return chroma_pattern(waves(height, width, self.magnitude, self.positions), channels, U_V)


@attacks.register
@dataclass(frozen=True, kw_only=True)
class Ctrl(PoisoningAttack):
    """Two frequencies in the chroma channels of target-class samples."""

    name: ClassVar[str] = "ctrl"
    paper: ClassVar[str] = "Li et al., An Embarrassingly Simple Backdoor Attack on SSL, ICCV 2023, arXiv 2210.07346"
    year: ClassVar[int] = 2023
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    trigger_visibility: ClassVar[str] = "invisible"
    stronger: ClassVar[str] = "raise magnitude_train and magnitude_test"
    label_mode: ClassVar[str] = "clean"

    poison_rate: float | None = class_rate()
    magnitude_train: float = param(
        100.0, "value added to the DCT coefficients of a training sample of 32 px", above=0, source="BackdoorBench"
    )
    magnitude_test: float = param(
        100.0, "value added to the DCT coefficients of a sample of 32 px at test time", above=0, source="paper"
    )
    positions: tuple[int, ...] = param(
        (15, 31), "diagonal positions of the changed coefficients in a DCT of 32 px", source="paper"
    )

    def make_trigger(self, task: Task, ctx: Context) -> WavesTrigger:
        """The picture to add at test time."""
        return self._waves(task, self.magnitude_test)

    def poison_inputs(self, trigger: Trigger, inputs: Inputs, indices: Tensor, task: Task, ctx: Context) -> Inputs:
        """The same with the training magnitude."""
        return self._waves(task, self.magnitude_train)(inputs)

    def _waves(self, task: Task, magnitude: float) -> WavesTrigger:
        channels, height, width = expect_images(task.train.inputs).shape[1:]
        if not self.positions or not all(1 <= p <= 31 for p in self.positions):
            raise InputError(f"ctrl: positions must be numbers from 1 to 31, got {self.positions}")
        pattern = chroma_pattern(waves(height, width, magnitude, self.positions), channels, U_V)
        return WavesTrigger(pattern, magnitude, self.positions)
