"""The fifteen common corruptions of images in five severities, for batches of any size, grey or RGB.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR 2019
(arXiv 1903.12261).

Own implementations, since the package ``imagecorruptions`` works image by image in numpy, refuses images below 32 px,
brings OpenCV and has had no release since 2020. What differs from it:

- Lengths (radii, shifts) are shares of the shorter side, so that images of other sizes are hurt alike. Strengths follow
  CIFAR-10-C for small images and ImageNet-C for large ones.
- Random fields are drawn once for an image size, not once for an image: what becomes of an image does not depend on
  the others in its batch, and a severity is the same field as the one before, only stronger.
- Frost and snow are drawn (smooth random ridges, blurred specks) instead of taken from photographs. Glass blur moves
  pixels by a random field instead of swapping them one by one. Shot noise is Gaussian with the variance of the Poisson
  law. JPEG quantises 8x8 cosine blocks by the standard tables, without subsampling of color.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorlab.modalities.filters import dct_matrix, gaussian_blur

SEVERITIES = 5


@dataclass(frozen=True)
class Strengths:
    """Parameters of severities 1 to 5; lengths are in sides of the image."""

    noise: tuple[float, ...]  # standard deviation
    shot: tuple[float, ...]  # photons at full brightness
    impulse: tuple[float, ...]  # share of pixels
    defocus: tuple[float, ...]  # radius
    glass: tuple[float, ...]  # largest shift
    motion: tuple[float, ...]  # length
    zoom: tuple[float, ...]  # largest factor
    snow: tuple[tuple[float, float], ...]  # share of specks, weight of the image
    frost: tuple[tuple[float, float], ...]  # weight of the image, of the frost
    fog: tuple[float, ...]
    brightness: tuple[float, ...]
    contrast: tuple[float, ...]
    elastic: tuple[float, ...]  # standard deviation of the shift
    pixelate: tuple[float, ...]  # remaining side
    jpeg: tuple[int, ...]  # quality


STRENGTHS = {
    "small": Strengths(
        noise=(0.04, 0.06, 0.08, 0.09, 0.10),
        shot=(500, 250, 100, 75, 50),
        impulse=(0.01, 0.02, 0.03, 0.05, 0.07),
        defocus=(0.02, 0.03, 0.04, 0.05, 0.0625),
        glass=(0.02, 0.03, 0.04, 0.05, 0.06),
        motion=(0.06, 0.10, 0.14, 0.18, 0.22),
        zoom=(1.06, 1.11, 1.16, 1.21, 1.26),
        snow=((0.05, 0.95), (0.10, 0.90), (0.15, 0.85), (0.20, 0.82), (0.25, 0.80)),
        frost=((1.0, 0.2), (1.0, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        fog=(0.2, 0.5, 0.75, 1.0, 1.5),
        brightness=(0.05, 0.1, 0.15, 0.2, 0.3),
        contrast=(0.75, 0.5, 0.4, 0.3, 0.15),
        elastic=(0.01, 0.02, 0.03, 0.04, 0.05),
        pixelate=(0.95, 0.9, 0.85, 0.75, 0.65),
        jpeg=(80, 65, 58, 50, 40),
    ),
    "large": Strengths(
        noise=(0.08, 0.12, 0.18, 0.26, 0.38),
        shot=(60, 25, 12, 5, 3),
        impulse=(0.03, 0.06, 0.09, 0.17, 0.27),
        defocus=(0.015, 0.02, 0.03, 0.04, 0.05),
        glass=(0.01, 0.015, 0.02, 0.03, 0.04),
        motion=(0.06, 0.10, 0.14, 0.18, 0.22),
        zoom=(1.11, 1.16, 1.21, 1.26, 1.33),
        snow=((0.10, 0.75), (0.20, 0.72), (0.30, 0.68), (0.40, 0.64), (0.50, 0.60)),
        frost=((1.0, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
        fog=(1.5, 2.0, 2.5, 2.75, 3.0),
        brightness=(0.1, 0.2, 0.3, 0.4, 0.5),
        contrast=(0.4, 0.3, 0.2, 0.1, 0.05),
        elastic=(0.01, 0.015, 0.02, 0.03, 0.04),
        pixelate=(0.6, 0.5, 0.4, 0.3, 0.25),
        jpeg=(25, 18, 15, 10, 7),
    ),
}
"""After CIFAR-10-C (32 px) and ImageNet-C (224 px)."""

LARGE = 64
"""Side in pixels from which images count as large."""

_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *(((99,) * 8,) * 4),
)
_TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


class Corruptions:
    """All corruptions for images of one shape.

    Attributes:
        names: of the fifteen corruptions, in order.
    """

    def __init__(
        self, shape: tuple[int, int, int], strengths: str, generator: torch.Generator, device: torch.device
    ) -> None:
        """Draw the random fields.

        Args:
            shape: (C, H, W).
            strengths: a name in :data:`STRENGTHS`.
            generator: on the CPU.
            device: of the images.
        """
        channels, height, width = shape
        self.how = STRENGTHS[strengths]
        self.height, self.width, self.side = height, width, min(height, width)
        self.generator, self.device = generator, device
        plane = (1, 1, height, width)
        self.normal = torch.randn(1, channels, height, width, generator=generator).to(device)
        self.uniform = torch.rand(1, channels, height, width, generator=generator).to(device)
        self.salt = (torch.rand(1, channels, height, width, generator=generator) < 0.5).float().to(device)
        self.shifts = (torch.rand(2, height, width, generator=generator) * 2 - 1).to(device)
        bends = gaussian_blur(torch.randn(2, 1, height, width, generator=generator), max(0.5, self.side / 12))
        self.bends = (bends / bends.std(dim=(1, 2, 3), keepdim=True).clamp_min(1e-6))[:, 0].to(device)
        self.specks = torch.rand(plane, generator=generator).to(device)
        self.clouds = self._fractal(0.55).to(device)
        ridges = 1 - (self._fractal(0.7) * 2 - 1).abs()
        self.ice = ((ridges - ridges.min()) / (ridges.max() - ridges.min()).clamp_min(1e-6)).pow(2).to(device)
        self.angle = float(torch.rand((), generator=generator)) * math.pi / 2 - math.pi / 4
        self._all: dict[str, Callable[[Tensor, int], Tensor]] = {
            "gaussian_noise": lambda x, s: x + self.how.noise[s] * self.normal,
            "shot_noise": lambda x, s: x + (x.clamp_min(0) / self.how.shot[s]).sqrt() * self.normal,
            "impulse_noise": lambda x, s: torch.where(self.uniform < self.how.impulse[s], self.salt, x),
            "defocus_blur": lambda x, s: _filtered(x, _disc(self.how.defocus[s] * self.side)),
            "glass_blur": self._glass,
            "motion_blur": lambda x, s: _filtered(x, _line(self.how.motion[s] * self.side, self.angle)),
            "zoom_blur": self._zoom,
            "snow": self._snow,
            "frost": lambda x, s: self.how.frost[s][0] * x + self.how.frost[s][1] * self.ice,
            "fog": self._fog,
            "brightness": lambda x, s: _brighter(x, self.how.brightness[s]),
            "contrast": lambda x, s: _flatter(x, self.how.contrast[s]),
            "elastic_transform": lambda x, s: self._moved(x, self.bends * self.how.elastic[s] * self.side),
            "pixelate": self._pixelate,
            "jpeg_compression": lambda x, s: _jpeg(x, self.how.jpeg[s]),
        }
        self.names = tuple(self._all)

    def __call__(self, images: Tensor, name: str, severity: int) -> Tensor:
        """Corrupt images that nothing was done to before.

        Args:
            images: float [N,C,H,W] in [0, 1], left as they are.
            name: of the corruption.
            severity: from 1 to 5.

        Returns:
            The same shape, in [0, 1], rounded to 255 steps as a stored image is.
        """
        return self._all[name](images, severity - 1).clamp(0, 1).mul(255).round_().mul_(1 / 255)

    def _fractal(self, decay: float) -> Tensor:
        """Smooth random field in [0, 1]: octaves of noise, each ``decay`` times weaker than the coarser one."""
        field, weight, cells = torch.zeros(1, 1, self.height, self.width), 1.0, 2
        while cells <= self.side:
            coarse = torch.rand(1, 1, cells, cells, generator=self.generator)
            field += weight * F.interpolate(
                coarse, size=(self.height, self.width), mode="bilinear", align_corners=False
            )
            weight, cells = weight * decay, cells * 2
        low, high = field.min(), field.max()
        return (field - low) / (high - low).clamp_min(1e-6)

    def _moved(self, x: Tensor, shifts: Tensor) -> Tensor:
        """Images whose pixel (i, j) is that at (i, j) + shifts[:, i, j] (in pixels, [2,H,W]), bilinear."""
        rows = torch.arange(self.height, device=x.device, dtype=x.dtype)[:, None] + shifts[0]
        columns = torch.arange(self.width, device=x.device, dtype=x.dtype) + shifts[1]
        grid = torch.stack([(2 * columns + 1) / self.width - 1, (2 * rows + 1) / self.height - 1], -1)
        return F.grid_sample(
            x, grid.expand(len(x), -1, -1, -1), mode="bilinear", padding_mode="border", align_corners=False
        )

    def _glass(self, x: Tensor, s: int) -> Tensor:
        soft = max(0.3, 0.015 * self.side)  # the same in every severity: more would smooth the displaced pixels again
        reach = max(1.0, self.how.glass[s] * self.side)
        return gaussian_blur(self._moved(gaussian_blur(x, soft), (self.shifts * reach).round()), soft)

    def _zoom(self, x: Tensor, s: int) -> Tensor:
        zooms = torch.linspace(1, self.how.zoom[s], 8).tolist()
        total = torch.zeros_like(x)
        rows = torch.arange(self.height, device=x.device, dtype=x.dtype) - (self.height - 1) / 2
        columns = torch.arange(self.width, device=x.device, dtype=x.dtype) - (self.width - 1) / 2
        for zoom in zooms:
            inward = 1 / zoom - 1
            shifts = torch.stack(
                [(rows * inward)[:, None].expand(-1, self.width), (columns * inward).expand(self.height, -1)]
            )
            total += self._moved(x, shifts)
        return total / len(zooms)

    def _snow(self, x: Tensor, s: int) -> Tensor:
        share, weight = self.how.snow[s]
        flakes = _filtered((self.specks < share * 0.5).to(x.dtype), _line(0.15 * self.side, math.pi / 3))
        grey = x.mean(1, keepdim=True)
        pale = weight * x + (1 - weight) * torch.maximum(x, grey * 1.5 + 0.5)
        return pale + flakes + flakes.flip(-1, -2)

    def _fog(self, x: Tensor, s: int) -> Tensor:
        top = x.amax((1, 2, 3), keepdim=True).clamp_min(1e-3)
        return (x + self.how.fog[s] * self.clouds) * top / (top + self.how.fog[s])

    def _pixelate(self, x: Tensor, s: int) -> Tensor:
        small = (max(1, round(self.height * self.how.pixelate[s])), max(1, round(self.width * self.how.pixelate[s])))
        return F.interpolate(F.interpolate(x, size=small, mode="area"), size=x.shape[2:], mode="nearest")


def _filtered(x: Tensor, kernel: Tensor) -> Tensor:
    """Every channel under one odd-sided kernel, edges continued."""
    rows, columns = kernel.shape
    padded = F.pad(x, (columns // 2, columns // 2, rows // 2, rows // 2), mode="replicate")
    planes = padded.flatten(0, 1).unsqueeze(1)
    return F.conv2d(planes, kernel.to(x)[None, None]).reshape(x.shape)


def _disc(radius: float) -> Tensor:
    """A disc of sum 1 with edges one pixel soft; a point for small radii."""
    reach = math.ceil(radius)
    place = torch.arange(-reach, reach + 1, dtype=torch.float32)
    weights = (radius + 0.5 - (place[:, None].square() + place.square()).sqrt()).clamp(0, 1)
    return weights / weights.sum()


def _line(length: float, angle: float) -> Tensor:
    """A line of sum 1 through the centre, bilinearly drawn."""
    reach = math.ceil(length / 2) + 1
    kernel = torch.zeros(2 * reach + 1, 2 * reach + 1)
    steps = torch.linspace(-length / 2, length / 2, 8 * reach + 1)
    rows, columns = reach + steps * math.sin(angle), reach + steps * math.cos(angle)
    top, left = rows.floor(), columns.floor()
    for down in (0, 1):
        for right in (0, 1):
            weight = (1 - (rows - top - down).abs()) * (1 - (columns - left - right).abs())
            kernel.index_put_(((top + down).long(), (left + right).long()), weight, accumulate=True)
    return kernel / kernel.sum()


def _brighter(x: Tensor, more: float) -> Tensor:
    """Value (of hue, saturation, value) raised; black becomes grey."""
    value = x.amax(1, keepdim=True)
    raised = (value + more).clamp_max(1)
    return torch.where(value > 0, x * raised / value.clamp_min(1e-6), raised)


def _flatter(x: Tensor, factor: float) -> Tensor:
    """Differences from the mean of a channel, times a factor."""
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * factor + mean


def _jpeg(x: Tensor, quality: int) -> Tensor:
    """8x8 cosine blocks, quantised by the standard tables at a quality; grey images by that of luminance."""
    percent = 5000 / quality if quality < 50 else 200 - 2 * quality
    tables = torch.tensor([_LUMINANCE, _CHROMINANCE, _CHROMINANCE][: 3 if x.shape[1] == 3 else 1], device=x.device)
    steps = ((tables * percent + 50) / 100).floor().clamp(1, 255).to(x.dtype)
    turn = torch.tensor(_TO_YCC, dtype=x.dtype, device=x.device) if x.shape[1] == 3 else None
    planes = x * 255 if turn is None else torch.einsum("ij,njhw->nihw", turn, x * 255)
    offset = torch.zeros(x.shape[1], 1, 1, dtype=x.dtype, device=x.device)
    offset[0 if turn is not None else slice(None)] = 128
    height, width = x.shape[2:]
    padded = F.pad(planes - offset, (0, -width % 8, 0, -height % 8), mode="replicate")
    blocks = padded.unfold(2, 8, 8).unfold(3, 8, 8)  # [N,C,rows,columns,8,8]
    basis = dct_matrix(8).to(x)
    table = steps[:, None, None]
    kept = ((basis @ blocks @ basis.T) / table).round() * table
    back = (basis.T @ kept @ basis).transpose(3, 4).reshape(padded.shape)[..., :height, :width] + offset
    found = back if turn is None else torch.einsum("ij,njhw->nihw", torch.linalg.inv(turn), back)
    return found / 255
