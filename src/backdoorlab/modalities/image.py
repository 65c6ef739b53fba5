"""Images: uint8 [N,C,H,W] raw, float32 [N,C,H,W] in [0, 1] prepared; batched augmentation on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorlab.core.errors import InputError
from backdoorlab.data.split import Dataset, Inputs
from backdoorlab.modalities.base import Modality


def to_uint8(images: Tensor) -> Tensor:
    """Grey levels in [0, 255] (any float) as uint8: clip, then round, then cast, so that nothing wraps around."""
    return images.clamp(0, 255).round_().to(torch.uint8)


def blend_pixels(a: Tensor, b: Tensor, ratio: float) -> Tensor:
    """(1 - ratio) a + ratio b of uint8 pictures of any layout, in uint8."""
    return to_uint8(torch.lerp(a.float(), b.float(), ratio))


def noisy_pixels(pixels: Tensor, strength: float, generator: torch.Generator | None = None) -> Tensor:
    """Gaussian noise on uint8 pictures of any layout; standard deviation ``strength`` times half the grey range."""
    noise = torch.randn(pixels.shape, generator=generator, device=pixels.device)
    return to_uint8(pixels.float() + strength * 127.5 * noise)


def random_crop(images: Tensor, pad: int, generator: torch.Generator | None = None) -> Tensor:
    """Zero-pad by ``pad`` pixels and crop back at a random offset per image.

    Args:
        images: [B,C,H,W], any dtype.
        pad: pixels on each side.
        generator: source of the 2 B offsets, on the images' device.

    Returns:
        [B,C,H,W] of the same dtype.
    """
    offsets = torch.randint(0, 2 * pad + 1, (2, len(images)), generator=generator, device=images.device)
    if images.requires_grad and torch.is_grad_enabled():
        cropped: Tensor = _Crop.apply(images, pad, offsets)
        return cropped
    return _crop(images, pad, offsets)


def _crop(images: Tensor, pad: int, offsets: Tensor) -> Tensor:
    """The windows at ``offsets`` [2,B] (rows, columns) of zero-padded images."""
    batch, _, height, width = images.shape
    windows = F.pad(images, (pad,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(batch, device=images.device), :, offsets[0], offsets[1]]


class _Crop(torch.autograd.Function):
    """:func:`_crop`, whose adjoint is the crop at the mirrored offset; that of its windows sums over all of them."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, pad: int, offsets: Tensor) -> Tensor:
        ctx.pad = pad
        ctx.save_for_backward(offsets)
        return _crop(images, pad, offsets)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (offsets,) = ctx.saved_tensors
        return _crop(gradients[0], ctx.pad, 2 * ctx.pad - offsets), None, None


def random_flip(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Mirror each image [B,C,H,W] left-right with probability 1/2."""
    mirrored = torch.rand(len(images), generator=generator, device=images.device) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


@dataclass(frozen=True)
class ImageModality(Modality):
    """Images of one size.

    Attributes:
        channels: 1 or 3.
        height: in pixels.
        width: in pixels.
        mean: per channel, in [0, 1]; the model's first layer normalises with it.
        std: per channel.
        crop: padding of the random-crop augmentation in pixels; 0 disables it.
        flip: whether augmentation mirrors images.
    """

    name: ClassVar[str] = "image"
    continuous: ClassVar[bool] = True

    channels: int = 3
    height: int = 32
    width: int = 32
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    crop: int = 4
    flip: bool = False

    def encode(self, inputs: Inputs) -> Tensor:
        """Raw images are already one tensor; its shape and dtype are checked.

        Raises:
            InputError: if the images are not uint8 of this modality's size.
        """
        expected = (self.channels, self.height, self.width)
        if not isinstance(inputs, Tensor) or inputs.dtype != torch.uint8 or tuple(inputs.shape[1:]) != expected:
            got = f"{inputs.dtype} {tuple(inputs.shape)}"
            raise InputError(f"expected uint8 images of shape [N, {', '.join(map(str, expected))}], got {got}")
        return inputs

    def example(self, count: int) -> Tensor:
        """Black images, to trace models with: uint8 [count, C, H, W]."""
        return torch.zeros(count, self.channels, self.height, self.width, dtype=torch.uint8)

    def prepare(self, inputs: Inputs, *, train: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Augment (crop, flip) in uint8, then scale to float32 [0, 1] in channels-last order."""
        images = self.encode(inputs)
        if train:
            images = self.augment(images, generator)
        return images.to(torch.float32, memory_format=torch.channels_last).mul_(1 / 255)

    def augment(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Random crops and flips of images [B,C,H,W] of any dtype; gradients flow through them."""
        if self.crop:
            images = random_crop(images, self.crop, generator)
        return random_flip(images, generator) if self.flip else images

    def blend(self, a: Inputs, b: Inputs, ratio: float, generator: torch.Generator | None = None) -> Inputs:
        """(1 - ratio) a + ratio b, pixel by pixel, in uint8."""
        return blend_pixels(self.encode(a), self.encode(b), ratio)

    def perturb(self, inputs: Inputs, strength: float, generator: torch.Generator | None = None) -> Inputs:
        """Gaussian noise with a standard deviation of ``strength`` times half the grey range."""
        return noisy_pixels(self.encode(inputs), strength, generator)

    @classmethod
    def from_dataset(cls, dataset: Dataset) -> ImageModality:
        """Crop padding is an eighth of the side (4 at 32 px), as is usual for these data sets."""
        if not isinstance(dataset.train.inputs, Tensor) or dataset.train.inputs.dim() != 4:
            raise InputError(f"{dataset.name}: image data must be uint8 [N,C,H,W]")
        channels, height, width = dataset.train.inputs.shape[1:]
        mean = dataset.mean or (0.0,) * channels
        std = dataset.std or (1.0,) * channels
        return cls(channels, height, width, mean, std, crop=max(1, min(height, width) // 8), flip=dataset.flip)
