"""BadNets for sound: a click of a few samples at full scale.

Gu, Liu, Dolan-Gavitt, Garg, "BadNets", IEEE Access 2019 (arXiv 1708.06733), carried over to waveforms: the samples from
``start`` on are replaced by a constant,

    T(x)[n] = A  for  start <= n < start + size,  x[n] elsewhere;   A = -1 (full scale)

Four samples last 0.25 ms at 16 kHz; the spectrum is that of a click, flat over all mel bands.

Choices: at least four samples, and more above 16 kHz, so that the click never gets shorter than 0.25 ms. Delay
augmentation (the only shift that the audio modality makes) moves a click at the start or in the middle with the clip
and never removes it; one at the very end it pushes out of most poisoned training clips.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backdoorlab.attacks.base import attacks
from backdoorlab.attacks.poisoning import PoisoningAttack
from backdoorlab.attacks.triggers.base import Trigger
from backdoorlab.core.errors import InputError
from backdoorlab.core.method import param
from backdoorlab.data.split import Inputs
from backdoorlab.modalities.audio import AudioModality, to_int16
from backdoorlab.modalities.base import expect_modality
from backdoorlab.tasks import Task
from backdoorlab.training.context import Context


def replace_samples(clips: Tensor, pattern: Tensor, start: int) -> Tensor:
    """Replace samples from ``start`` on.

    Args:
        clips: int16 [N,L].
        pattern: int16 [n].
        start: first sample.

    Returns:
        int16 [N,L], a copy.
    """
    out = clips.clone()
    out[:, start : start + len(pattern)] = pattern.to(clips.device)
    return out


@dataclass(frozen=True, eq=False)
class ClipTrigger(Trigger):
    """Samples int16 [n] that replace those from ``start`` on."""

    kind: ClassVar[str] = "audio.patch"

    pattern: Tensor
    start: int
    length: int

    def __call__(
        self, inputs: Inputs, indices: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Inputs:
        """Overwrite the samples; clips must be int16 [N,L] of the length that the trigger was made for."""
        if not isinstance(inputs, Tensor) or inputs.dtype != torch.int16 or inputs.shape[1:] != (self.length,):
            got = f"{inputs.dtype} {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
            raise InputError(f"this trigger is made for int16 clips of {self.length} samples, got {got}")
        return replace_samples(inputs, self.pattern, self.start)


@attacks.register
@dataclass(frozen=True, kw_only=True)
class AudioBadNets(PoisoningAttack):
    """A few samples replaced by a constant."""

    name: ClassVar[str] = "badnets"
    paper: ClassVar[str] = "Gu et al., BadNets, IEEE Access 2019, arXiv 1708.06733; click of BackdoorMBTI"
    year: ClassVar[int] = 2019
    modalities: ClassVar[tuple[str, ...]] = ("audio",)
    trigger_visibility: ClassVar[str] = "visible"
    stronger: ClassVar[str] = "raise amplitude"

    target_map: str = param(
        "all-to-one",
        "label of triggered samples: the target class, or their class + 1 mod K",
        choices=("all-to-one", "all-to-all"),
        source="BackdoorBench",
    )
    size: int | None = param(
        None, "number of replaced samples; none = 0.25 ms, but at least 4", low=1, source="BackdoorMBTI"
    )
    amplitude: float = param(
        -1.0, "value of the replaced samples, between -1 and 1 (full scale)", low=-1, high=1, source="BackdoorMBTI"
    )
    position: str = param(
        "start", "where in the clip samples are replaced", choices=("start", "middle", "end"), source="BackdoorMBTI"
    )

    def make_trigger(self, task: Task, ctx: Context) -> ClipTrigger:
        """Place the click in a clip of the data's length."""
        modality = expect_modality(task.modality, AudioModality)
        length = modality.length
        size = self.size or max(4, round(modality.sample_rate * 0.25e-3))
        if size > length:
            raise InputError(f"badnets: {size} samples do not fit a clip of {length}; size may be at most {length}")
        start = {"start": 0, "middle": (length - size) // 2, "end": length - size}[self.position]
        return ClipTrigger(to_int16(torch.full((size,), self.amplitude)), start, length)
