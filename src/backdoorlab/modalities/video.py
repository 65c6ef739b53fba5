"""Videos: uint8 [N,T,C,H,W] raw, float32 [N,C,T,H,W] in [0, 1] prepared; crops and flips are shared by all frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backdoorlab.core.errors import InputError
from backdoorlab.data.split import Dataset, Inputs
from backdoorlab.modalities.base import Modality
from backdoorlab.modalities.image import blend_pixels, noisy_pixels, random_crop, random_flip


@dataclass(frozen=True)
class VideoModality(Modality):
    """Clips of one size and number of frames.

    Attributes:
        frames: T.
        channels: 1 or 3.
        height: in pixels.
        width: in pixels.
        mean: per channel, in [0, 1]; the model's first layer normalises with it.
        std: per channel.
        crop: padding of the random-crop augmentation in pixels; 0 disables it.
        flip: whether augmentation mirrors clips (not where the direction of motion is the class).
    """

    name: ClassVar[str] = "video"
    continuous: ClassVar[bool] = True

    frames: int = 16
    channels: int = 3
    height: int = 32
    width: int = 32
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    crop: int = 4
    flip: bool = False

    def encode(self, inputs: Inputs) -> Tensor:
        """Raw clips are already one tensor; its shape and dtype are checked.

        Raises:
            InputError: if the clips are not uint8 of this modality's size.
        """
        expected = (self.frames, self.channels, self.height, self.width)
        if not isinstance(inputs, Tensor) or inputs.dtype != torch.uint8 or tuple(inputs.shape[1:]) != expected:
            got = f"{inputs.dtype} {tuple(inputs.shape)}"
            raise InputError(f"expected uint8 clips of shape [N, {', '.join(map(str, expected))}], got {got}")
        return inputs

    def prepare(self, inputs: Inputs, *, train: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Augment in uint8 with frames as channels, then put channels first and scale to float32 [0, 1]."""
        clips = self.encode(inputs)
        stacked = clips.flatten(1, 2)
        if train and self.crop:
            stacked = random_crop(stacked, self.crop, generator)
        if train and self.flip:
            stacked = random_flip(stacked, generator)
        clips = stacked.unflatten(1, (self.frames, self.channels)).transpose(1, 2)
        return clips.to(torch.float32, memory_format=torch.channels_last_3d).mul_(1 / 255)

    def blend(self, a: Inputs, b: Inputs, ratio: float, generator: torch.Generator | None = None) -> Inputs:
        """(1 - ratio) a + ratio b, frame by frame, in uint8."""
        return blend_pixels(self.encode(a), self.encode(b), ratio)

    def perturb(self, inputs: Inputs, strength: float, generator: torch.Generator | None = None) -> Inputs:
        """Gaussian noise, new in each frame, with a standard deviation of ``strength`` times half the grey range."""
        return noisy_pixels(self.encode(inputs), strength, generator)

    def example(self, count: int) -> Inputs:
        """Black clips."""
        return torch.zeros(count, self.frames, self.channels, self.height, self.width, dtype=torch.uint8)

    @classmethod
    def from_dataset(cls, dataset: Dataset) -> VideoModality:
        """Crop padding is an eighth of the height; clips are mirrored only if the data set allows it."""
        if not isinstance(dataset.train.inputs, Tensor) or dataset.train.inputs.dim() != 5:
            raise InputError(f"{dataset.name}: video data must be uint8 [N,T,C,H,W]")
        frames, channels, height, width = dataset.train.inputs.shape[1:]
        mean = dataset.mean or (0.0,) * channels
        std = dataset.std or (1.0,) * channels
        return cls(frames, channels, height, width, mean, std, crop=max(1, height // 8), flip=dataset.flip)
