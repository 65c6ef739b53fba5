"""Pictures for the command line: what a trigger looks like, and what models make of it."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorlab.data.files import write_atomically

INK, GREY, GOOD, BAD = "#1b1f24", "#6a737d", "#1a7f4b", "#c62f2f"


@dataclass(frozen=True)
class Visibility:
    """How far triggered images are from clean ones, means over images.

    Attributes:
        psnr: peak signal-to-noise ratio in dB, of the mean squared error over all images; None if nothing changed.
        ssim: structural similarity in [-1, 1].
        linf: largest change of any grey level, in 0..255.
    """

    psnr: float | None
    ssim: float
    linf: int


def visibility(clean: Tensor, triggered: Tensor) -> Visibility:
    """Compare uint8 [N,C,H,W] images with their triggered versions."""
    a, b = clean.double(), triggered.double()
    error = float((a - b).square().mean())
    psnr = 10 * math.log10(255**2 / error) if error else None
    return Visibility(psnr, float(ssim(a, b).mean()), int((a - b).abs().max()))


def ssim(a: Tensor, b: Tensor, sigma: float = 1.5, radius: int = 5) -> Tensor:
    """Structural similarity (Wang et al., 2004): 11x11 Gaussian window, K1 = 0.01, K2 = 0.03, grey range 255.

    Args:
        a: float [N,C,H,W] in 0..255.
        b: the same shape.
        sigma: of the window in pixels.
        radius: of the window.

    Returns:
        float [N], mean over channels and all positions. The image is mirrored at its borders, where many triggers sit;
        leaving out the positions whose window sticks out would overlook a patch in a corner.
    """
    axis = torch.exp(-(torch.arange(-radius, radius + 1, dtype=a.dtype) ** 2) / (2 * sigma**2))
    axis = axis / axis.sum()
    channels = a.shape[1]
    window = (axis[:, None] * axis).expand(channels, 1, -1, -1)

    def smooth(x: Tensor) -> Tensor:
        rows, columns = (_mirrored(side, radius) for side in x.shape[-2:])
        return F.conv2d(x[..., rows, :][..., columns], window, groups=channels)

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ma, mb = smooth(a), smooth(b)
    va, vb, cov = smooth(a * a) - ma**2, smooth(b * b) - mb**2, smooth(a * b) - ma * mb
    quality = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    return quality.mean(dim=(1, 2, 3))


def _mirrored(side: int, radius: int) -> Tensor:
    """Indices of an axis with ``radius`` mirrored positions at both ends (d c b a | a b c d | d c b a)."""
    index = torch.arange(-radius, side + radius) % (2 * side)
    return torch.minimum(index, 2 * side - 1 - index)


@dataclass(frozen=True)
class Line:
    """One line of text below a row of images.

    Attributes:
        label: left of it, in words.
        texts: one below each image.
        colors: of the texts.
    """

    label: str
    texts: tuple[str, ...]
    colors: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One row of a figure of samples.

    Attributes:
        label: in words, left of the row.
        images: uint8 [N,C,H,W].
        lines: what is said about each image, below it.
    """

    label: str
    images: Tensor
    lines: tuple[Line, ...] = ()


_CELL, _GAP, _LEFT, _HEAD, _LINE, _MARGIN = 1.15, 0.1, 2.1, 1.0, 0.27, 0.25
"""Lengths of a figure in inches."""


def draw_rows(path: Path, title: str, subtitle: str, rows: list[Row]) -> None:
    """Draw rows of images under a title; the file appears whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = len(rows[0].images)
    heights = [_CELL + _LINE * len(row.lines) + (0.3 if row.lines else _GAP) for row in rows]
    width = max(_LEFT + columns * (_CELL + _GAP) + _MARGIN, 7.5)
    height = _HEAD + sum(heights) + 0.1
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)

    def write(x: float, y: float, text: str, **style: Any) -> None:
        figure.text(x / width, y / height, text, va="center", **style)

    write(_MARGIN, height - 0.36, title, fontsize=15, fontweight="bold", color=INK)
    write(_MARGIN, height - 0.68, subtitle, fontsize=10, color=GREY)
    top = height - _HEAD
    for row, tall in zip(rows, heights, strict=True):
        write(_MARGIN, top - _CELL / 2, row.label, fontsize=11, color=INK, linespacing=1.4)
        for column in range(columns):
            x = _LEFT + column * (_CELL + _GAP)
            axes: Any = figure.add_axes((x / width, (top - _CELL) / height, _CELL / width, _CELL / height))
            _image(axes, row.images[column])
            for i, line in enumerate(row.lines):
                write(x + _CELL / 2, top - _CELL - _LINE * (i + 0.6), line.texts[column], fontsize=10.5,
                      fontweight="bold", ha="center", color=line.colors[column])  # fmt: skip
        for i, line in enumerate(row.lines):
            write(_MARGIN, top - _CELL - _LINE * (i + 0.6), line.label, fontsize=9.5, color=GREY)
        top -= tall
    buffer = io.BytesIO()
    kind = path.suffix.lower().lstrip(".") or "png"
    figure.savefig(buffer, format=kind)
    write_atomically(path, buffer.getvalue())


def _image(axes: Any, image: Tensor) -> None:
    pixels = image.cpu().permute(1, 2, 0).numpy()
    if pixels.shape[2] == 1:
        axes.imshow(pixels[..., 0], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    else:
        axes.imshow(pixels, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color="#d0d7de", linewidth=0.8)


def magnified(clean: Tensor, triggered: Tensor) -> tuple[Tensor, int]:
    """The difference around mid-grey, magnified by the largest whole factor that does not clip.

    Returns:
        uint8 images and the factor.
    """
    change = triggered.double() - clean.double()
    factor = max(1, int(127 // max(1.0, float(change.abs().max()))))
    return (127.5 + factor * change).clamp(0, 255).round().to(torch.uint8), factor


def draw_trigger(path: Path, name: str, clean: Tensor, triggered: Tensor) -> Visibility:
    """Clean samples, triggered samples and their magnified difference, with PSNR, SSIM and L-infinity.

    Args:
        path: of the figure.
        name: of the attack.
        clean: uint8 [N,C,H,W], a few images.
        triggered: the same with the trigger.
    """
    seen = visibility(clean, triggered)
    change, factor = magnified(clean, triggered)
    psnr = "identical" if seen.psnr is None else f"PSNR {seen.psnr:.1f} dB"
    rows = [
        Row("clean", clean),
        Row("triggered", triggered),
        Row(f"difference\n(x{factor}, grey = none)" if factor > 1 else "difference\n(grey = none)", change),
    ]
    draw_rows(path, f"{name}: the trigger", f"{psnr}    SSIM {seen.ssim:.3f}    L∞ {seen.linf} of 255", rows)
    return seen
