"""Image files as one uint8 tensor: what the sources that read pictures from disk share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from backdoorlab.core.errors import InputError

_GREY_MODES = ("1", "L", "LA")
_EIGHT_BIT_MODES = (*_GREY_MODES, "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "PA", "La", "RGBa", "RGBX")
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width
_DEFAULT_SIDE = 32


def resize(images: Tensor, size: int | None, chunk: int = 2048) -> Tensor:
    """Rescale uint8 [N,C,H,W] to ``size`` x ``size`` (antialiased bilinear); None keeps them."""
    if size is None or images.shape[-2:] == (size, size):
        return images
    out = torch.empty(*images.shape[:2], size, size, dtype=torch.uint8)
    for start in range(0, len(images), chunk):
        part = images[start : start + chunk].float()
        scaled = F.interpolate(part, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
        out[start : start + chunk] = scaled.clamp_(0, 255).round_().to(torch.uint8)
    return out


def common_form(paths: Sequence[Path], size: int | None) -> tuple[int, int, int]:
    """Channels, height and width to which a set of image files is brought; only headers are read.

    One channel if every file is grey, else three. ``size`` squared if given, else the files' own size if all share
    it, else 32x32. Nothing is cropped: other aspect ratios are squeezed.
    """
    with ThreadPoolExecutor(_workers()) as pool:
        headers = list(pool.map(_header, paths))
    channels = 1 if all(grey for grey, _, _ in headers) else 3
    if size is not None:
        return channels, size, size
    sizes = {(height, width) for _, height, width in headers}
    height, width = sizes.pop() if len(sizes) == 1 else (_DEFAULT_SIDE, _DEFAULT_SIDE)
    return channels, height, width


def read_images(paths: Sequence[Path], channels: int, height: int, width: int) -> Tensor:
    """Decode image files, bring them to one size (antialiased bilinear) and stack them: uint8 [N,C,H,W].

    Raises:
        InputError: naming a file that cannot be decoded.
    """
    out = np.empty((len(paths), channels, height, width), np.uint8)

    def decode(i: int) -> None:
        out[i] = _pixels(paths[i], channels, height, width)

    with ThreadPoolExecutor(_workers()) as pool:
        for _ in pool.map(decode, range(len(paths)), chunksize=64):
            pass
    return torch.from_numpy(out)


def to_array(image: Image.Image, channels: int, height: int, width: int) -> np.ndarray:
    """One picture as uint8 [C,H,W], upright and rescaled.

    Raises:
        ValueError: for pixels of more than 8 bits, which would be clipped rather than scaled.
    """
    if image.mode not in _EIGHT_BIT_MODES:
        raise ValueError(f"pixel format {image.mode} is not 8-bit; convert it to 8-bit grey or RGB")
    image = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def is_grey(image: Image.Image) -> bool:
    """Does the picture's pixel format carry no colour?"""
    return image.mode in _GREY_MODES


def _pixels(path: Path, channels: int, height: int, width: int) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return to_array(image, channels, height, width)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read image {path}: {error}") from error


def _header(path: Path) -> tuple[bool, int, int]:
    try:
        with Image.open(path) as image:
            width, height = image.size
            if image.getexif().get(0x0112) in _SIDEWAYS:
                width, height = height, width
            return is_grey(image), height, width
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read image {path}: {error}") from error


def _workers() -> int:
    return min(16, os.cpu_count() or 1)
