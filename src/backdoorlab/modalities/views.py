"""Strong random views of images for contrastive learning: another crop and size, mirror image, colours, blur.

The augmentations of SimCLR (Chen, Kornblith, Norouzi, Hinton, "A Simple Framework for Contrastive Learning of Visual
Representations", ICML 2020), batched on the device, every sample with draws of its own. Colours are changed where there
are three channels; with one, brightness and contrast. Images are mirrored only where the modality says that a mirrored
image keeps its class.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorlab.modalities.image import ImageModality

GREY = (0.299, 0.587, 0.114)
"""Luma of ITU-R BT.601."""


def strong_view(
    images: Tensor, modality: ImageModality, generator: torch.Generator, *, smallest: float = 0.2, blur: bool = True
) -> Tensor:
    """A random view of each image.

    Args:
        images: uint8 [B,C,H,W].
        modality: says whether images are mirrored.
        generator: of all draws, on the images' device.
        smallest: least area of a crop / area of the image.
        blur: whether half of the views are blurred.

    Returns:
        float32 [B,C,H,W] in [0, 1], channels last.
    """
    view = modality.prepare(images)
    view = resized_crop(view, generator, smallest=smallest, flip=modality.flip)
    view = jitter(view, generator)
    if blur:
        view = gaussian_blur(view, generator)
    return view.contiguous(memory_format=torch.channels_last)


def _draw(count: int, rows: int, like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(rows, count, generator=generator, device=like.device)


def resized_crop(images: Tensor, generator: torch.Generator, *, smallest: float, flip: bool) -> Tensor:
    """A random part of each image [B,C,H,W] at the image's size: area from ``smallest`` to 1, sides 3:4 to 4:3."""
    area, aspect, top, left, mirror = _draw(len(images), 5, images, generator)
    area, ratio = smallest + (1 - smallest) * area, torch.exp((2 * aspect - 1) * math.log(4 / 3))
    height, width = (area / ratio).sqrt().clamp(max=1), (area * ratio).sqrt().clamp(max=1)
    y, x = (2 * top - 1) * (1 - height), (2 * left - 1) * (1 - width)
    sign = torch.where(mirror < 0.5, -1.0, 1.0) if flip else torch.ones_like(mirror)
    zero = torch.zeros_like(x)
    matrix = torch.stack([torch.stack([sign * width, zero, x], 1), torch.stack([zero, height, y], 1)], 1)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False).clamp(0, 1)


def jitter(images: Tensor, generator: torch.Generator, strength: float = 0.4) -> Tensor:
    """Brightness, contrast and saturation times 1 -+ strength in 80 % of the images, 20 % of coloured ones grey."""
    colored = images.shape[1] == 3
    used, bright, contrast, saturation, grey = (
        r[:, None, None, None] for r in _draw(len(images), 5, images, generator)
    )
    scale = 1 + strength * (2 * torch.stack([bright, contrast, saturation]) - 1)
    changed = (images * scale[0]).clamp(0, 1)
    mean = _luma(changed).mean((1, 2, 3), keepdim=True)
    changed = torch.lerp(mean.expand_as(changed), changed, scale[1]).clamp(0, 1)
    if colored:
        changed = torch.lerp(_luma(changed).expand_as(changed), changed, scale[2]).clamp(0, 1)
    changed = torch.where(used < 0.8, changed, images)
    return torch.where(grey < 0.2, _luma(changed).expand_as(changed), changed) if colored else changed


def gaussian_blur(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the images are blurred; standard deviation 0.1 to 2 px at 224 px and in proportion to the side."""
    used, width = _draw(len(images), 2, images, generator)
    side = min(images.shape[-2:])
    sigma = (0.1 + 1.9 * width) * max(side / 224, 0.5)
    reach = max(1, math.ceil(2 * 2 * max(side / 224, 0.5)))
    reach = min(reach, side - 1)
    places = torch.arange(-reach, reach + 1, device=images.device)
    kernel = torch.exp(-places.square() / (2 * sigma[:, None].square()))
    kernel = kernel / kernel.sum(1, keepdim=True)
    batch, channels, height, wide = images.shape
    kernel = torch.where((used < 0.5)[:, None], kernel, (places == 0).to(kernel.dtype))
    flat = F.pad(images, (reach,) * 4, mode="reflect").reshape(
        1, batch * channels, height + 2 * reach, wide + 2 * reach
    )
    weights = kernel.repeat_interleave(channels, 0)
    flat = F.conv2d(flat, weights[:, None, :, None], groups=batch * channels)
    flat = F.conv2d(flat, weights[:, None, None, :], groups=batch * channels)
    return flat.reshape(batch, channels, height, wide)


def turned_and_shifted(images: Tensor, generator: torch.Generator, degrees: float, shift: float) -> Tensor:
    """Images [B,C,H,W] in [0, 1], each turned by up to ``degrees`` and moved by up to ``shift`` of its sides.

    What comes in from outside is black, as usual for this transform.
    """
    angle, y, x = 2 * _draw(len(images), 3, images, generator) - 1
    angle, y, x = angle * math.radians(degrees), 2 * shift * y, 2 * shift * x
    height, width = images.shape[-2:]
    aspect = height / width
    cosine, sine = angle.cos(), angle.sin()
    rows = [torch.stack([cosine, -sine * aspect, x], 1), torch.stack([sine / aspect, cosine, y], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)


def _luma(images: Tensor) -> Tensor:
    """[B,1,H,W]."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    weights = torch.tensor(GREY, device=images.device, dtype=images.dtype).reshape(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)
