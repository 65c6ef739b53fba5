"""WaNet: against slow, independent implementations and closed forms; its options; its effect."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from torch import Tensor

from attack_tools import GREY, ODD, exact_uniform, pictures
from backdoorlab.attacks.image.wanet import NoiseWarpTrigger, WarpTrigger, draw_field, warp_grid
from effect_tools import LOST, OBEYS, Numbers, case, effects, least, most, planted


def cubic(t: float) -> float:
    """Keys' kernel with a = -0.75."""
    t = abs(t)
    if t <= 1:
        return 1.25 * t**3 - 2.25 * t**2 + 1
    return -0.75 * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def bicubic(control: np.ndarray, height: int, width: int) -> np.ndarray:
    """Corner-aligned upsampling of [k,k], border values repeated."""
    k = len(control)
    out = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            y, x = i * (k - 1) / (height - 1), j * (k - 1) / (width - 1)
            for a in range(math.floor(y) - 1, math.floor(y) + 3):
                for b in range(math.floor(x) - 1, math.floor(x) + 3):
                    value = control[min(max(a, 0), k - 1), min(max(b, 0), k - 1)]
                    out[i, j] += value * cubic(y - a) * cubic(x - b)
    return out


@pytest.mark.parametrize(("height", "width"), [(16, 16), (29, 31), (20, 36)])
def test_wanet_grid_and_sampling(height: int, width: int) -> None:
    strength, rescale = 2.0, 1.0
    field = draw_field(4, torch.Generator().manual_seed(1))
    assert float(field.abs().mean()) == pytest.approx(1, abs=1e-6)
    bend = np.stack([bicubic(plane, height, width) for plane in field.double().numpy()])
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    at_x = np.clip((x + strength * bend[0] / width) * rescale, -1, 1)
    at_y = np.clip((y + strength * bend[1] / height) * rescale, -1, 1)
    grid = warp_grid(field, strength, rescale, height, width).double().numpy()
    assert np.allclose(grid[..., 0], at_x, atol=1e-5)
    assert np.allclose(grid[..., 1], at_y, atol=1e-5)

    images = pictures((3, height, width), 4)
    rows, columns = (at_y + 1) / 2 * (height - 1), (at_x + 1) / 2 * (width - 1)
    slow = np.stack(
        [
            [map_coordinates(plane, [rows, columns], order=1, mode="nearest") for plane in image]
            for image in images.double().numpy()
        ]
    )
    fast = WarpTrigger(field, strength, rescale)(images).numpy().astype(float)
    # Single precision may tip a value that lies within 0.01 of a half; nothing else may differ from the rounded one.
    assert (np.abs(fast - slow) <= 0.51).all()
    assert np.array_equal(fast, np.rint(slow)) or (fast != np.rint(slow)).mean() < 1e-3


def test_wanet_without_strength_is_the_identity() -> None:
    images = pictures((3, 29, 31))
    assert torch.equal(WarpTrigger(torch.ones(2, 4, 4), 0.0, 1.0)(images), images)


def test_wanet_noise_moves_each_pixel_by_less_than_half_a_pixel_more() -> None:
    """On a horizontal ramp a displacement of d columns changes a grey level by d times the slope."""
    width = 33
    ramp = (torch.arange(width) * 7).to(torch.uint8).expand(2, 1, 17, width).contiguous()
    field = torch.zeros(2, 4, 4)
    noisy = NoiseWarpTrigger(field, 0.5, 1.0, seed=3)(ramp).float()
    moved = (noisy - ramp.float()).abs()
    assert float(moved.max()) <= 7 * 0.5 + 0.5
    assert float(moved.mean()) > 1
    assert not torch.equal(noisy[0], noisy[1])


def look_up(image: np.ndarray, y: float, x: float) -> np.ndarray:
    """Bilinear value of [C,H,W] at a corner-aligned place in [-1, 1]^2, black outside."""
    _, height, width = image.shape
    row, column = (y + 1) / 2 * (height - 1), (x + 1) / 2 * (width - 1)
    total = np.zeros(len(image))
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < height and 0 <= j < width:
                total += image[:, i, j] * (1 - abs(row - i)) * (1 - abs(column - j))
    return total


@pytest.mark.parametrize("rescale", [1.0, 0.8, 1.2])
@pytest.mark.parametrize("shape", [GREY, ODD])
def test_wanet_pixel_by_pixel(shape: tuple[int, int, int], rescale: float) -> None:
    strength, field = 1.5, draw_field(3, torch.Generator().manual_seed(4))
    height, width = shape[1:]
    bend = [bicubic(plane, height, width) for plane in field.double().numpy()]
    images = pictures(shape, 4)
    clean, noisy = WarpTrigger(field, strength, rescale), NoiseWarpTrigger(field, strength, rescale, seed=9)
    indices = torch.tensor([5, 0, 2**33, 7])
    warped, disturbed = np.zeros(images.shape), np.zeros(images.shape)
    for i in range(height):
        for j in range(width):
            y = (2 * i / (height - 1) - 1 + strength * bend[1][i, j] / height) * rescale
            x = (2 * j / (width - 1) - 1 + strength * bend[0][i, j] / width) * rescale
            y, x = min(1.0, max(-1.0, y)), min(1.0, max(-1.0, x))
            for n, image in enumerate(images.numpy().astype(float)):
                warped[n, :, i, j] = look_up(image, y, x)
                u = [2 * exact_uniform(9, int(indices[n]), (i * width + j) * 2 + axis) - 1 for axis in (0, 1)]
                at = [min(1.0, max(-1.0, place)) for place in (y + u[1] / height, x + u[0] / width)]
                disturbed[n, :, i, j] = look_up(image, *at)
    # Single precision places a look-up to within 1e-5 pixels, worth up to 0.005 grey levels between black and white.
    for fast, slow in ((clean(images), warped), (noisy(images, indices), disturbed)):
        assert isinstance(fast, Tensor)
        value, got = np.clip(slow, 0, 255), fast.numpy().astype(float)
        near_half = np.abs(value - np.floor(value) - 0.5) < 0.01
        assert not ((got != np.rint(value)) & ~near_half).any()


@case("attack/image/wanet", core=True, asr=least(0.85), acc_lost=LOST, benign_asr=OBEYS, cross_lost=most(0.2))
def effect_of_wanet(seed: int) -> Numbers:
    return planted(seed, "wanet", poison_rate=0.1, s=2.0)[1]


test_effect = effects(__name__)
