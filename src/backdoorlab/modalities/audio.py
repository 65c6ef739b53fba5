"""Sounds: int16 [N,L] raw, float32 [N,L] in [-1, 1] prepared; delay and gain as augmentation.

Clips are shifted later only, never earlier: a shift to the front would cut off the onset of the word (and a trigger at
the very start), while the end of a clip is padding in most data sets.

The spectrogram is made inside the networks (see :mod:`backdoorlab.models.audio`), so that gradients reach the waveform.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorlab.core.errors import InputError
from backdoorlab.data.split import Dataset, Inputs
from backdoorlab.modalities.base import Modality

FULL_SCALE = 32768.0


def to_int16(waves: Tensor) -> Tensor:
    """Amplitudes in [-1, 1] (any float) as int16: clip, then round, then cast, so that nothing wraps around."""
    return (waves * FULL_SCALE).clamp(-FULL_SCALE, FULL_SCALE - 1).round().to(torch.int16)


def rms(waves: Tensor) -> Tensor:
    """Root mean square of each row of float [N,L]: float [N,1]."""
    return waves.square().mean(1, keepdim=True).sqrt()


def random_delay(waves: Tensor, most: int, generator: torch.Generator | None = None) -> Tensor:
    """Delay each row [B,L] by 0 to ``most`` samples, with zeros in front; what leaves at the end is lost."""
    batch, length = waves.shape
    starts = torch.randint(0, most + 1, (batch,), generator=generator, device=waves.device)
    windows = F.pad(waves, (most, 0)).unfold(1, length, 1)
    return windows[torch.arange(batch, device=waves.device), starts]


@dataclass(frozen=True)
class AudioModality(Modality):
    """Mono clips of one length.

    Attributes:
        sample_rate: in Hz.
        length: in samples.
        delay: longest delay of the augmentation in samples; 0 disables it.
        gain: largest change of loudness of the augmentation in dB; 0 disables it.
    """

    name: ClassVar[str] = "audio"
    continuous: ClassVar[bool] = True

    sample_rate: int = 8000
    length: int = 8000
    delay: int = 0
    gain: float = 6.0

    def encode(self, inputs: Inputs) -> Tensor:
        """Raw clips are already one tensor; its shape and dtype are checked.

        Raises:
            InputError: if the clips are not int16 of this modality's length.
        """
        if not isinstance(inputs, Tensor) or inputs.dtype != torch.int16 or inputs.shape[1:] != (self.length,):
            got = f"{inputs.dtype} {tuple(inputs.shape)}"
            raise InputError(f"expected int16 clips of shape [N, {self.length}], got {got}")
        return inputs

    def prepare(self, inputs: Inputs, *, train: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Delay in int16, scale to float32 [-1, 1], then change the loudness."""
        clips = self.encode(inputs)
        if train and self.delay:
            clips = random_delay(clips, self.delay, generator)
        waves = clips.to(torch.float32).mul_(1 / FULL_SCALE)
        if train and self.gain:
            decibel = (2 * torch.rand(len(waves), 1, generator=generator, device=waves.device) - 1) * self.gain
            waves = (waves * 10 ** (decibel / 20)).clamp_(-1, 1)
        return waves

    def blend(self, a: Inputs, b: Inputs, ratio: float, generator: torch.Generator | None = None) -> Inputs:
        """(1 - ratio) a + ratio b', where b' is b brought to the RMS of a (ratio 0.5: 0 dB); a silent clip counts 0."""
        first, second = self.encode(a).float() / FULL_SCALE, self.encode(b).float() / FULL_SCALE
        level = torch.where(rms(first) > 0, rms(first), rms(second))
        return to_int16(torch.lerp(first, second * (level / rms(second).clamp_min(1 / FULL_SCALE)), ratio))

    def perturb(self, inputs: Inputs, strength: float, generator: torch.Generator | None = None) -> Inputs:
        """White noise of ``strength`` times the clip's RMS: an SNR of -20 log10(strength) dB, 0 dB at strength 1."""
        waves = self.encode(inputs).float() / FULL_SCALE
        noise = torch.randn(waves.shape, generator=generator, device=waves.device)
        return to_int16(waves + strength * rms(waves) * noise)

    def example(self, count: int) -> Inputs:
        """Silent clips."""
        return torch.zeros(count, self.length, dtype=torch.int16)

    @classmethod
    def from_dataset(cls, dataset: Dataset) -> AudioModality:
        """Delay by at most a twentieth of the clip (50 ms of a second)."""
        inputs = dataset.train.inputs
        if not isinstance(inputs, Tensor) or inputs.dim() != 2 or dataset.sample_rate <= 0:
            raise InputError(f"{dataset.name}: audio data must be int16 [N,L] with a sample rate")
        return cls(dataset.sample_rate, inputs.shape[1], delay=inputs.shape[1] // 20)
