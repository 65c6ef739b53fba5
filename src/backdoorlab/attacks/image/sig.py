"""SIG: a sinusoid added to images of the target class, whose label stays true.

Barni, Kallas, Tondi, "A New Backdoor Attack in CNNs by Training Set Corruption Without Label Poisoning", ICIP 2019
(arXiv 1902.11237).

With column j of an image W pixels wide, amplitude D in grey levels and f periods across the image,

    v(i, j) = D sin(2 pi j f / W),   T(x) = round(clip(x + v)),

the same in every row and channel. Only samples of the target class are changed, and no label is: the network learns to
take the sinusoid for evidence of that class.

Choices: the amplitude may differ between training and test (the paper hides a weak one in the data and uses a stronger
one at inference). The poison rate counts the whole training set, as in the literature; a tenth of ten balanced classes
is the whole target class, which the model then never sees clean.
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
from backdoorlab.attacks.triggers.pixels import FormulaTrigger
from backdoorlab.core.errors import InputError
from backdoorlab.core.method import param
from backdoorlab.data.split import Inputs
from backdoorlab.modalities.filters import expect_images
from backdoorlab.tasks import Task
from backdoorlab.training.context import Context


def sinusoid(channels: int, height: int, width: int, delta: float, frequency: float) -> Tensor:
    """The pattern in grey levels: float32 [channels, height, width].

    Raises:
        InputError: if there are too few columns for so many periods.
    """
    if frequency >= width / 2:
        raise InputError(
            f"sig: {frequency:g} periods cannot be drawn with {width} columns; frequency must be below {width / 2:g}"
        )
    columns = torch.arange(width, dtype=torch.float64)
    wave = delta * torch.sin(2 * math.pi * columns * frequency / width)
    return wave.float().expand(channels, height, width).contiguous()


@dataclass(frozen=True, eq=False)
class SinusoidTrigger(FormulaTrigger):
    """Add a sinusoid; fits images of any size with columns enough."""

    kind: ClassVar[str] = "image.sinusoid"

    delta: float
    frequency: float

    def draw(self, channels: int, height: int, width: int) -> Tensor:
        """See :func:`sinusoid`."""
        return sinusoid(channels, height, width, self.delta, self.frequency)


@attacks.register
@dataclass(frozen=True, kw_only=True)
class Sig(PoisoningAttack):
    """A horizontal sinusoid on images of the target class."""

    name: ClassVar[str] = "sig"
    paper: ClassVar[str] = "Barni et al., Training Set Corruption Without Label Poisoning, ICIP 2019, arXiv 1902.11237"
    year: ClassVar[int] = 2019
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    trigger_visibility: ClassVar[str] = "subtle"
    stronger: ClassVar[str] = "raise delta_train and delta_test"
    label_mode: ClassVar[str] = "clean"

    poison_rate: float | None = class_rate()
    delta_train: float = param(
        40.0,
        "amplitude of the sinusoid in poisoned training samples, in grey levels",
        above=0,
        high=255,
        source="BackdoorBench",
    )
    delta_test: float = param(
        40.0, "amplitude of the sinusoid at test time, in grey levels", above=0, high=255, source="BackdoorBench"
    )
    frequency: float = param(
        6.0, "periods of the sinusoid across the width of the image", above=0, source="BackdoorBench"
    )

    def make_trigger(self, task: Task, ctx: Context) -> SinusoidTrigger:
        """The sinusoid at the test amplitude."""
        return self._wave(task, self.delta_test)

    def poison_inputs(self, trigger: Trigger, inputs: Inputs, indices: Tensor, task: Task, ctx: Context) -> Inputs:
        """The sinusoid at the training amplitude."""
        return self._wave(task, self.delta_train)(inputs)

    def _wave(self, task: Task, delta: float) -> SinusoidTrigger:
        channels, height, width = expect_images(task.train.inputs).shape[1:]
        pattern = sinusoid(channels, height, width, delta, self.frequency)
        return SinusoidTrigger(pattern, delta, self.frequency)
