"""Image files as one uint8 tensor: what the sources that read pictures from disk share (see :mod:`.pictures`)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from backdoorlab.core.errors import DataWarning
from backdoorlab.core.memory import expect_memory
from backdoorlab.data.pictures import open_picture, picture_form, without_remarks

_DEFAULT_SIDE = 32
_LARGE = 128 * 128  # pixels above which keeping the files' size causes a warning
_CHUNK = 1 << 24  # values that are rescaled at a time, as floats


def resize(images: Tensor, size: int | None) -> Tensor:
    """Rescale uint8 [N,C,H,W] to ``size`` x ``size`` (antialiased bilinear); None keeps them.

    Raises:
        InputError: if the result does not fit into memory.
    """
    if size is None or images.shape[-2:] == (size, size):
        return images
    expect_memory((*images.shape[:2], size, size), 1, "the rescaled images")
    chunk = max(1, _CHUNK // (images.shape[1] * max(size * size, images.shape[2] * images.shape[3])))
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

    Raises:
        InputError: naming a file that is no picture.

    Warns:
        DataWarning: if the files' own size is kept and is large, with what that costs.
    """
    with without_remarks(), ThreadPoolExecutor(_workers()) as pool:
        headers = list(pool.map(picture_form, paths))
    return one_form(headers, size)


def one_form(headers: Sequence[tuple[bool, int, int]], size: int | None) -> tuple[int, int, int]:
    """The rule of :func:`common_form`, for pictures of which (is grey, height, width) are known."""
    channels = 1 if all(grey for grey, _, _ in headers) else 3
    if size is not None:
        return channels, size, size
    sizes = {(height, width) for _, height, width in headers}
    height, width = sizes.pop() if len(sizes) == 1 else (_DEFAULT_SIDE, _DEFAULT_SIDE)
    if height * width > _LARGE:
        warnings.warn(
            f"all {len(headers)} pictures are {width}x{height} and are kept at that size: "
            f"{len(headers) * channels * height * width / 2**20:,.0f} MiB in memory, {height * width / 1024:.0f} times "
            "the work of 32x32; a smaller size (--size 64) squeezes them",
            DataWarning,
            stacklevel=2,
        )
    return channels, height, width


def read_images(paths: Sequence[Path], channels: int, height: int, width: int) -> Tensor:
    """Decode image files, bring them to one size (antialiased bilinear) and stack them: uint8 [N,C,H,W].

    Raises:
        InputError: naming a file that cannot be decoded, or if all together do not fit into memory.
    """
    expect_memory((len(paths), channels, height, width), 1, "the pictures")
    out = np.empty((len(paths), channels, height, width), np.uint8)

    def decode(i: int) -> None:
        out[i] = to_array(open_picture(paths[i]), channels, height, width)

    with without_remarks(), ThreadPoolExecutor(_workers()) as pool:
        for _ in pool.map(decode, range(len(paths)), chunksize=64):
            pass
    return torch.from_numpy(out)


def to_array(picture: Image.Image, channels: int, height: int, width: int) -> np.ndarray:
    """One picture, as :func:`~backdoorlab.data.pictures.open_picture` gives it, rescaled: uint8 [C,H,W]."""
    image = picture.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _workers() -> int:
    return min(16, os.cpu_count() or 1)
