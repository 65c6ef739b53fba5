"""Strong random views of images for contrastive learning: another crop and size, mirror image, colors, blur.

The augmentations of SimCLR (Chen, Kornblith, Norouzi, Hinton, "A Simple Framework for Contrastive Learning of Visual
Representations", ICML 2020), batched on the device, every sample with draws of its own. Colors are changed where there
are three channels; with one, brightness and contrast. Images are mirrored only where the modality says that a mirrored
image keeps its class.

Deviations: crops are resampled bilinearly; hues are turned about the grey axis of RGB, not in HSV.
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
    """A random part of each image [B,C,H,W] at the image's size.

    Its area is ``smallest`` to 1 of the image's, its sides are in the image's proportion times 3:4 to 4:3, closer to it
    where a side would otherwise leave the image.
    """
    area, aspect, top, left, mirror = _draw(len(images), 5, images, generator)
    area = smallest + (1 - smallest) * area
    most = area.log().neg().clamp(max=math.log(4 / 3))
    ratio = torch.exp((2 * aspect - 1) * most)
    height, width = (area / ratio).sqrt(), (area * ratio).sqrt()
    y, x = (2 * top - 1) * (1 - height), (2 * left - 1) * (1 - width)
    sign = torch.where(mirror < 0.5, -1.0, 1.0) if flip else torch.ones_like(mirror)
    zero = torch.zeros_like(x)
    matrix = torch.stack([torch.stack([sign * width, zero, x], 1), torch.stack([zero, height, y], 1)], 1)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False).clamp(0, 1)


def jitter(images: Tensor, generator: torch.Generator, strength: float = 0.4, hue: float = 0.1) -> Tensor:
    """Other colors in 80 % of the images [B,C,H,W] in [0, 1], and 20 % of the colored ones grey.

    Args:
        images: of one or three channels.
        generator: on their device.
        strength: brightness, contrast and saturation are multiplied by 1 -+ it.
        hue: largest change of hue / full turn.
    """
    colored = images.shape[1] == 3
    used, bright, contrast, saturation, turn, grey = (
        r[:, None, None, None] for r in _draw(len(images), 6, images, generator)
    )
    scale = 1 + strength * (2 * torch.stack([bright, contrast, saturation]) - 1)
    changed = (images * scale[0]).clamp(0, 1)
    mean = _luma(changed).mean((1, 2, 3), keepdim=True)
    changed = torch.lerp(mean.expand_as(changed), changed, scale[1]).clamp(0, 1)
    if colored:
        changed = torch.lerp(_luma(changed).expand_as(changed), changed, scale[2]).clamp(0, 1)
        changed = turned_hue(changed, 2 * math.pi * hue * (2 * turn - 1)).clamp(0, 1)
    changed = torch.where(used < 0.8, changed, images)
    return torch.where(grey < 0.2, _luma(changed).expand_as(changed), changed) if colored else changed


def turned_hue(images: Tensor, angle: Tensor) -> Tensor:
    """RGB images [B,3,H,W] turned about the grey axis by angles [B,1,1,1] in radians; grey stays as it is."""
    grey = images.mean(1, keepdim=True)
    across = (images.roll(1, 1) - images.roll(2, 1)) / math.sqrt(3)  # cross product with the axis (1, 1, 1) / sqrt 3
    return grey + (images - grey) * angle.cos() + across * angle.sin()


def gaussian_blur(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the images are blurred, by 0.1 to 2 px at 224 px; less at smaller sides, down to half of that at 112."""
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
    """Images [B,C,H,W] in [0, 1], each turned by up to ``degrees``, then moved by up to ``shift`` of its sides.

    What comes in from outside is black, as usual for this transform.
    """
    angle, y, x = 2 * _draw(len(images), 3, images, generator) - 1
    return moved(images, angle * math.radians(degrees), shift * y, shift * x)


def moved(images: Tensor, angle: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Images [B,C,H,W] turned counterclockwise about their centres by angles [B] in radians, then moved.

    ``down`` and ``right`` [B] are shares of the height and of the width. What comes in from outside is 0.
    """
    height, width = images.shape[-2:]
    aspect = height / width
    cosine, sine = angle.cos(), angle.sin()
    # Where a pixel comes from: back by the shift, then back by the turn, in coordinates from -1 to 1.
    across, along = torch.stack([cosine, -sine * aspect], 1), torch.stack([sine / aspect, cosine], 1)
    back = -2 * torch.stack([right, down], 1)
    rows = [torch.cat([row, (row * back).sum(1, keepdim=True)], 1) for row in (across, along)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)


def _luma(images: Tensor) -> Tensor:
    """[B,1,H,W]."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    weights = torch.tensor(GREY, device=images.device, dtype=images.dtype).reshape(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)
