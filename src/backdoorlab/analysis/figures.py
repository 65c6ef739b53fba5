"""Pictures for the command line: what a trigger looks like, and what models make of it."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backdoorlab.data.files import write_atomically
from backdoorlab.metrics.visibility import Visibility, visibility
from backdoorlab.modalities.filters import dct_matrix

INK, GREY, GOOD, BAD = "#1b1f24", "#6a737d", "#1a7f4b", "#c62f2f"


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
    write_atomically(path, drawn_rows(title, subtitle, rows, path.suffix.lower().lstrip(".") or "png"))


def drawn_rows(title: str, subtitle: str, rows: list[Row], kind: str = "png") -> bytes:
    """The same as the content of a file of that kind."""
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
                write(
                    x + _CELL / 2,
                    top - _CELL - _LINE * (i + 0.6),
                    line.texts[column],
                    fontsize=10.5,
                    fontweight="bold",
                    ha="center",
                    color=line.colors[column],
                )
        for i, line in enumerate(row.lines):
            write(_MARGIN, top - _CELL - _LINE * (i + 0.6), line.label, fontsize=9.5, color=GREY)
        top -= tall
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind)
    return buffer.getvalue()


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


def frequency_residual(clean: Tensor, triggered: Tensor) -> Tensor:
    """Magnitude of the orthonormal two-dimensional DCT of what a trigger changes, mean over channels.

    Args:
        clean: uint8 [N,C,H,W].
        triggered: the same with the trigger.

    Returns:
        float64 [N,H,W] in grey levels; [:, 0, 0] stands for the mean change, frequencies grow downwards and to the
        right. Rounding to whole grey levels alone leaves about 0.2 everywhere.
    """
    change = triggered.double() - clean.double()
    rows, columns = dct_matrix(change.shape[-2]), dct_matrix(change.shape[-1])
    return (rows @ change @ columns.T).abs().mean(1)


def in_colors(magnitudes: Tensor, most: float) -> Tensor:
    """Magnitudes float [N,H,W] as log(1 + x) in perceptually even colors, black 0 to yellow ``most``: uint8 RGB."""
    from matplotlib import colormaps

    level = torch.log1p(magnitudes) / torch.log1p(torch.tensor(most, dtype=magnitudes.dtype))
    painted = colormaps["inferno"](level.clamp(0, 1).numpy(), bytes=True)
    return torch.from_numpy(painted[..., :3].copy()).permute(0, 3, 1, 2)


def draw_trigger(path: Path, name: str, clean: Tensor, triggered: Tensor) -> Visibility:
    """Clean samples, triggered samples and their difference in pixels and in frequencies, with PSNR, SSIM and L∞.

    Args:
        path: of the figure.
        name: of the attack.
        clean: uint8 [N,C,H,W], a few images.
        triggered: the same with the trigger.
    """
    difference = visibility(clean, triggered)
    magnified_change, factor = magnified(clean, triggered)
    spectrum = frequency_residual(clean, triggered)
    most = max(1.0, float(spectrum.max()))
    psnr = "identical" if difference.psnr is None else f"PSNR {difference.psnr:.1f} dB"
    rows = [
        Row("clean", clean),
        Row("triggered", triggered),
        Row(f"difference\n(x{factor}, grey = none)" if factor > 1 else "difference\n(grey = none)", magnified_change),
        Row(
            f"frequency residual\n(|DCT|, log scale,\nblack 0, yellow {most:.0f};\nlow at top left)",
            in_colors(spectrum, most),
        ),
    ]
    draw_rows(
        path, f"{name}: the trigger", f"{psnr}    SSIM {difference.ssim:.3f}    L∞ {difference.linf} of 255", rows
    )
    return difference
