"""How visible a trigger is: PSNR, SSIM and the largest change of images; how much of any kind of sample it changes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CONTRAST = 1e-3
"""Power of the weakest change that counts / variance of the image."""


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


@dataclass(frozen=True)
class Change:
    """How much of a set of samples a trigger changes.

    Attributes:
        share: of the samples that are not what they were, in [0, 1].
        noticed: share of the samples whose change a network can see: of images and video a root mean square of one
            grey level and 30 dB below the contrast (variance) of the image itself, of audio 60 dB below the sound, of
            text any change.
        ratio_db: peak signal-to-noise ratio of images and video, signal-to-noise ratio of audio, in dB, over all
            samples; None for text and if nothing changed.
        audible: whether it is an SNR.
    """

    share: float
    noticed: float
    ratio_db: float | None = None
    audible: bool = False


def change(clean: Tensor | np.ndarray, triggered: Tensor | np.ndarray) -> Change:
    """Compare raw samples with their triggered versions.

    Args:
        clean: at least one sample, as in a :class:`~backdoorlab.data.split.Split`: uint8 images or video, int16
            audio, or texts.
        triggered: of the same form.
    """
    if not isinstance(clean, Tensor) or not isinstance(triggered, Tensor):
        share = float(np.mean(np.asarray(clean) != np.asarray(triggered)))
        return Change(share, share)
    before, moved = clean.double().flatten(1), (triggered.double() - clean.double()).flatten(1)
    power, audible = moved.square().mean(1), clean.dtype == torch.int16
    signal = before.square().mean(1) if audible else torch.full_like(power, 255.0**2)
    least = signal * 1e-6 if audible else (before.var(1, correction=0) * CONTRAST).clamp_min(1)
    total = float(power.mean())
    ratio = 10 * math.log10(max(float(signal.mean()), 1.0) / total) if total else None
    changed = power > 0
    return Change(float(changed.double().mean()), float((changed & (power >= least)).double().mean()), ratio, audible)


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
