"""Pictures made from a seed, so that nothing has to be shipped or downloaded: key images and scenes to reflect."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorlab.core.errors import InputError
from backdoorlab.core.paths import files_below, is_folder, user_path
from backdoorlab.core.seeding import make_generator
from backdoorlab.data.pictures import open_picture, without_remarks
from backdoorlab.modalities.image import to_uint8

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in brightness (ITU-R BT.601)."""
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
"""How names of image files end."""


def to_channels(pictures: Tensor, channels: int) -> Tensor:
    """RGB pictures [..., 3, H, W] as they are, or as one channel of brightness.

    Raises:
        InputError: for another number of channels.
    """
    if channels == 3:
        return pictures
    if channels != 1:
        raise InputError(f"pictures can be made with 1 or 3 channels, not {channels}")
    weights = torch.tensor(LUMA, dtype=pictures.dtype).reshape(3, 1, 1)
    return (pictures * weights).sum(-3, keepdim=True)


def smooth_noise(count: int, height: int, width: int, grid: int, generator: torch.Generator) -> Tensor:
    """Uniform noise on a coarse grid, upsampled bicubically: float32 [count,3,height,width]."""
    coarse = torch.rand(count, 3, grid, grid, generator=generator)
    return F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)


def shapes(count: int, height: int, width: int, generator: torch.Generator, low: float, high: float) -> Tensor:
    """Random ellipses and boxes, turned at random, as scaled distances from their centres.

    Args:
        count: number of shapes.
        height: of the canvas, in pixels.
        width: of the canvas, in pixels.
        generator: source of kind, place, size and angle.
        low: smallest half-axis, as a share of the canvas.
        high: largest half-axis.

    Returns:
        float32 [count, height, width]; a shape covers the pixels whose value is at most 1.
    """
    kind, y0, x0, a, b, angle = torch.rand(6, count, 1, 1, generator=generator)
    y = (torch.arange(height) + 0.5)[:, None] / height - y0
    x = (torch.arange(width) + 0.5) / width - x0
    cos, sin = torch.cos(angle * torch.pi), torch.sin(angle * torch.pi)
    u, v = (cos * x + sin * y) / torch.lerp(low * torch.ones(1), torch.tensor(high), a), cos * y - sin * x
    v = v / torch.lerp(low * torch.ones(1), torch.tensor(high), b)
    return torch.where(kind < 0.5, torch.hypot(u, v), torch.maximum(u.abs(), v.abs()))


def key_image(channels: int, height: int, width: int, seed: int) -> Tensor:
    """A picture with structure at all scales: three octaves of noise and ten outlined shapes in strong colors.

    Brightness is spread to a mean near 128 and a standard deviation of at least 60 grey levels, so that the energy of a
    blend is comparable between seeds and sizes.

    Returns:
        uint8 [channels, height, width].
    """
    generator = make_generator(seed, "key image")
    octaves = zip((4, 8, 16), (1 / 2, 1 / 4, 1 / 8), strict=True)
    picture = sum(
        (share * smooth_noise(1, height, width, grid, generator)[0] for grid, share in octaves),
        start=torch.zeros(3, height, width),
    )
    colors = torch.rand(10, 3, 1, 1, generator=generator).round() * 0.9
    for distance, color in zip(shapes(10, height, width, generator, 0.06, 0.22), colors, strict=True):
        inside = (distance <= 1).float()[None]
        core = -F.max_pool2d(-F.pad(inside, (1,) * 4), 3, stride=1)
        picture = torch.where(core > 0, color, torch.where(inside > 0, torch.zeros(()), picture))
    picture = to_channels(picture, channels)
    picture = (picture - picture.mean()) / picture.std().clamp_min(1e-6)
    return to_uint8(picture * 78 + 128)


def noise_image(channels: int, height: int, width: int, seed: int) -> Tensor:
    """Independent uniform grey levels: uint8 [channels, height, width]."""
    generator = make_generator(seed, "noise image")
    return torch.randint(0, 256, (channels, height, width), generator=generator, dtype=torch.uint8)


def resize(pictures: Tensor, height: int, width: int) -> Tensor:
    """uint8 pictures [N,C,H,W] at another size, bilinearly, with low-pass when they shrink: uint8."""
    size = (height, width)
    return to_uint8(F.interpolate(pictures.float(), size, mode="bilinear", align_corners=False, antialias=True))


def read_folder(path: str, channels: int, height: int, width: int) -> Tensor:
    """All image files below a folder, by name, resized: uint8 [R, channels, height, width].

    Raises:
        InputError: if there is no such folder, no image in it, or a file that cannot be read.
    """
    if not is_folder(user_path(path)):
        raise InputError(f"found no folder {path!r}")
    files = [p for p in files_below(user_path(path)) if p.suffix.lower() in PICTURES]
    if not files:
        raise InputError(f"the folder {path!r} has no image file; looked for names ending in {', '.join(PICTURES)}")
    return torch.stack([read_picture(str(file), channels, height, width) for file in files])


def read_picture(path: str, channels: int, height: int, width: int) -> Tensor:
    """An image file, resized: uint8 [channels, height, width].

    Raises:
        InputError: if the file is missing or cannot be read, see :func:`~backdoorlab.data.pictures.open_picture`.
    """
    with without_remarks():
        file = open_picture(user_path(path)).convert("RGB")
    pixels = torch.frombuffer(bytearray(file.tobytes()), dtype=torch.uint8)
    picture = pixels.reshape(file.height, file.width, 3).permute(2, 0, 1)
    small = F.interpolate(picture[None].float(), (height, width), mode="bilinear", antialias=True)[0]
    return to_uint8(to_channels(small, channels))


def scenes(count: int, channels: int, height: int, width: int, seed: int) -> Tensor:
    """Views that a window pane might reflect: sky and ground, soft boxes and discs, lamps, a little grain.

    Returns:
        uint8 [count, channels, height, width].
    """
    generator = make_generator(seed, "scenes")
    y = ((torch.arange(height) + 0.5) / height)[:, None]
    horizon = torch.rand(count, 1, 1, 1, generator=generator) * 0.5 + 0.25
    top, bottom = torch.rand(2, count, 3, 1, 1, generator=generator)
    ground = torch.sigmoid((y - horizon) * (8 + 24 * torch.rand(count, 1, 1, 1, generator=generator)))
    picture = (top * (1 - ground) + bottom * ground).expand(count, 3, height, width)
    things = 5 + (torch.rand(count, generator=generator) * 11).long()
    for thing in range(15):
        distance = shapes(count, height, width, generator, 0.05, 0.25)[:, None]
        cover = torch.sigmoid((1 - distance) * 12) * (thing < things)[:, None, None, None]
        picture = torch.lerp(picture, torch.rand(count, 3, 1, 1, generator=generator).expand_as(picture), cover)
    for _ in range(3):
        lamp = shapes(count, height, width, generator, 0.03, 0.08)[:, None]
        picture = picture + torch.exp(-0.5 * lamp**2) * torch.rand(count, 1, 1, 1, generator=generator)
    for grid in (4, 8, 16):  # equal energy per octave, as in natural images
        picture = picture + 0.1 * (smooth_noise(count, height, width, grid, generator) - 0.5)
    return to_uint8(to_channels(picture, channels) * 255)
