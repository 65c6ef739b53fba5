"""Pictures for the command line: what a trigger looks like, and what models make of it. Numbers first, figure second."""

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
        radius: of the window; cut to what fits the image.

    Returns:
        float [N], mean over channels and all positions where the whole window lies inside.
    """
    radius = min(radius, (min(a.shape[-2:]) - 1) // 2)
    axis = torch.exp(-(torch.arange(-radius, radius + 1, dtype=a.dtype) ** 2) / (2 * sigma**2))
    axis = axis / axis.sum()
    channels = a.shape[1]
    window = (axis[:, None] * axis).expand(channels, 1, -1, -1)

    def smooth(x: Tensor) -> Tensor:
        return F.conv2d(x, window, groups=channels)

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ma, mb = smooth(a), smooth(b)
    va, vb, cov = smooth(a * a) - ma**2, smooth(b * b) - mb**2, smooth(a * b) - ma * mb
    quality = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    return quality.mean(dim=(1, 2, 3))


@dataclass(frozen=True)
class Row:
    """One row of a figure of samples.

    Attributes:
        label: in words, left of the row.
        images: uint8 [N,C,H,W].
        captions: below each image.
        colors: of the captions.
    """

    label: str
    images: Tensor
    captions: tuple[str, ...] = ()
    colors: tuple[str, ...] = ()


def draw_rows(path: Path, title: str, subtitle: str, rows: list[Row]) -> None:
    """Draw rows of images under a title; the file appears whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = len(rows[0].images)
    cell, left, head, foot = 1.25, 2.2, 1.0, 0.15
    heights = [cell + 0.12 + 0.27 * max((c.count("\n") + 1 for c in row.captions), default=0) for row in rows]
    width, height = left + columns * (cell + 0.12) + 0.2, head + sum(heights) + foot
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.2 / width, 1 - 0.34 / height, title, fontsize=15, fontweight="bold", color=INK, va="center")
    figure.text(0.2 / width, 1 - 0.67 / height, subtitle, fontsize=10, color=GREY, va="center")
    top = height - head
    for row, tall in zip(rows, heights, strict=True):
        figure.text(0.2 / width, (top - cell / 2) / height, row.label, fontsize=10.5, color=INK, va="center")
        for column in range(columns):
            x = left + column * (cell + 0.12)
            axes: Any = figure.add_axes((x / width, (top - cell) / height, cell / width, cell / height))
            _image(axes, row.images[column])
            if row.captions:
                color = row.colors[column] if row.colors else INK
                figure.text((x + cell / 2) / width, (top - cell - 0.06) / height, row.captions[column], fontsize=9.5,
                            color=color, ha="center", va="top", linespacing=1.35)  # fmt: skip
        top -= tall
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lower().lstrip(".") or "png", metadata=None)
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
