"""Whole triggers, pixel by pixel in double precision, where the pieces alone had been compared so far.

A fast trigger works in single precision, so a value within 1e-3 of a half may be rounded to its other neighbour; at
every other pixel the grey level must be the same.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_contract_image_attacks import make, tiny_task
from test_oracle_image_attacks import FROM_CHROMA, bicubic, splitmix
from torch import Tensor

from backdoorlab.attacks import attacks
from backdoorlab.attacks.common.pictures import key_image, scenes
from backdoorlab.attacks.image.adap_blend import random_half
from backdoorlab.attacks.image.adap_patch import draw_patches
from backdoorlab.attacks.image.blind import PATTERN, draw_pattern
from backdoorlab.attacks.image.refool import ReflectionTrigger
from backdoorlab.attacks.image.wanet import NoiseWarpTrigger, WarpTrigger, draw_field
from backdoorlab.attacks.triggers.pixels import constant_blend
from backdoorlab.training import Context

SHAPES = [(1, 16, 16), (3, 29, 31)]


def pictures(shape: tuple[int, ...], count: int = 4, seed: int = 0) -> Tensor:
    """Random pictures, the last two black and white."""
    images = torch.randint(0, 256, (count, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    images[-2], images[-1] = 0, 255
    return images


def same_grey(fast: object, slow: np.ndarray) -> None:
    """Equal grey levels, except where the exact value lies on a half."""
    assert isinstance(fast, Tensor)
    value = np.clip(slow, 0, 255)
    got = fast.numpy().astype(float)
    wrong = got != np.rint(value)
    near_half = np.abs(value - np.floor(value) - 0.5) < 1e-3
    assert not (wrong & ~near_half).any()
    assert np.abs(got - value).max() < 0.502


def uniform(seed: int, index: int, column: int) -> float:
    """The number that belongs to (seed, sample, column), in integers."""
    mask, gold = 2**64 - 1, 0x9E3779B97F4A7C15
    key = splitmix((seed * gold + 1) & mask)
    return (splitmix((splitmix((index + key) & mask) + (column + 1) * gold) & mask) >> 40) / 2**24


# --- warping ----------------------------------------------------------------------------------------------------------


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
@pytest.mark.parametrize("shape", SHAPES)
def test_wanet_pixel_by_pixel(shape: tuple[int, int, int], rescale: float) -> None:
    strength, field = 1.5, draw_field(3, torch.Generator().manual_seed(4))
    height, width = shape[1:]
    bend = [bicubic(plane, height, width) for plane in field.double().numpy()]
    images = pictures(shape)
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
                u = [2 * uniform(9, int(indices[n]), (i * width + j) * 2 + axis) - 1 for axis in (0, 1)]
                at = [min(1.0, max(-1.0, place)) for place in (y + u[1] / height, x + u[0] / width)]
                disturbed[n, :, i, j] = look_up(image, *at)
    # Single precision places a look-up to within 1e-5 pixels, worth up to 0.005 grey levels between black and white.
    for fast, slow in ((clean(images), warped), (noisy(images, indices), disturbed)):
        assert isinstance(fast, Tensor)
        value, got = np.clip(slow, 0, 255), fast.numpy().astype(float)
        near_half = np.abs(value - np.floor(value) - 0.5) < 0.01
        assert not ((got != np.rint(value)) & ~near_half).any()


# --- frequency domain, corners, patterns ------------------------------------------------------------------------------


def test_ftrojan_where_windows_do_not_fit_pixel_by_pixel() -> None:
    """29x31 with windows of 29: waves by their cosine formula, continued over the border."""
    images, side, magnitude = pictures((3, 29, 31)), 29, 30.0
    spots = [math.ceil((p + 1) * side / 32) - 1 for p in (15, 31)]
    mixing = FROM_CHROMA["ftrojan"][:, 1:].sum(1)
    slow = images.numpy().astype(float)
    for i in range(29):
        for j in range(31):
            wave = sum(
                2
                / side
                * math.cos(math.pi * u * (2 * (i % side) + 1) / (2 * side))
                * math.cos(math.pi * u * (2 * (j % side) + 1) / (2 * side))
                for u in spots
            )
            slow[:, :, i, j] += magnitude * wave * mixing
    trigger = attacks.get("ftrojan", "image")(magnitude=magnitude).make_trigger(tiny_task((3, 29, 31)), Context())  # type: ignore[attr-defined]
    same_grey(trigger(images), slow)


@pytest.mark.parametrize("amplitude", [255.0, 40.5])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 64, 64)])
def test_lc_corners_are_added_with_clipping(shape: tuple[int, int, int], amplitude: float) -> None:
    rows = ((1, -1, -1), (-1, 1, -1), (1, -1, 1))
    height, width = shape[1:]
    times = max(1, round(min(height, width) / 32))
    images = pictures(shape)
    slow = images.numpy().astype(float)
    for a in range(3 * times):
        for b in range(3 * times):
            value = amplitude * rows[a // times][b // times]
            for i in (a, height - 3 * times + a):
                slow[:, :, i, b] += value
                slow[:, :, i, width - 1 - b] += value
    trigger = make(attacks.get("lc", "image"), amplitude=amplitude).make_trigger(tiny_task(shape), Context())  # type: ignore[attr-defined]
    same_grey(trigger(images), slow)


@pytest.mark.parametrize("shape", SHAPES)
def test_blind_pattern_pixel_by_pixel(shape: tuple[int, int, int]) -> None:
    images, (height, width) = pictures(shape), shape[1:]
    top, left = round(3 * height / 32), round(23 * width / 32)
    slow = images.numpy().astype(float)
    for a, row in enumerate(PATTERN):
        for b, cell in enumerate(row):
            if cell >= 0:
                slow[:, :, top + a, left + b] = 255 * cell
    pattern, mask = draw_pattern(*shape)
    same_grey(torch.where(mask, pattern, images), slow)


# --- adaptive attacks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_adap_blend_pixel_by_pixel(shape: tuple[int, int, int]) -> None:
    images, (height, width), ctx = pictures(shape, 6), shape[1:], Context(seed=8)
    attack, task = make(attacks.get("adap_blend", "image"), pieces=3), tiny_task(shape)
    trigger = attack.make_trigger(task, ctx)  # type: ignore[attr-defined]
    shown = random_half(6, 9, ctx.generator("pieces", "payload"))
    assert shown.sum(1).tolist() == [4] * 6
    key = key_image(*shape, 0).numpy().astype(float)
    slow, whole = images.numpy().astype(float), images.numpy().astype(float)
    for n, c, i, j in np.ndindex(*images.shape):
        piece = i // math.ceil(height / 3) * 3 + j // math.ceil(width / 3)
        if shown[n, piece]:
            slow[n, c, i, j] = 0.85 * slow[n, c, i, j] + 0.15 * key[c, i, j]
        whole[n, c, i, j] = 0.8 * whole[n, c, i, j] + 0.2 * key[c, i, j]
    same_grey(attack.poison_inputs(trigger, images, torch.arange(6), task, ctx), slow)  # type: ignore[attr-defined]
    same_grey(trigger(images), whole)


@pytest.mark.parametrize("shape", SHAPES)
def test_adap_patch_faint_patches_one_over_the_other(shape: tuple[int, int, int]) -> None:
    attack = make(attacks.get("adap_patch", "image"), test_patches=4, test_opacity=0.6)
    drawn, masks = (t.numpy() for t in draw_patches(*shape, 0))
    images = pictures(shape)
    slow = images.numpy().astype(float)
    for layer in range(4):
        for n, c, i, j in np.ndindex(*images.shape):
            if masks[layer, i, j]:
                slow[n, c, i, j] = 0.4 * slow[n, c, i, j] + 0.6 * drawn[layer, c, i, j]
    same_grey(attack.make_trigger(tiny_task(shape), Context())(images), slow)  # type: ignore[attr-defined]


def test_a_blend_of_another_size_pixel_by_pixel() -> None:
    """Twice the size: each pixel is a mean of the nearest four of the key with weights 9, 3, 3 and 1 of 16."""
    key = pictures((1, 8, 8), 3, seed=5)[0].numpy().astype(float)
    images = pictures((1, 16, 16))
    resized = np.zeros((1, 16, 16))
    for i in range(16):
        for j in range(16):
            for a, wa in ((i // 2, 0.75), (i // 2 + (1 if i % 2 else -1), 0.25)):
                for b, wb in ((j // 2, 0.75), (j // 2 + (1 if j % 2 else -1), 0.25)):
                    resized[0, i, j] += wa * wb * key[0, min(max(a, 0), 7), min(max(b, 0), 7)]
    trigger = constant_blend(torch.from_numpy(key).to(torch.uint8), 0.25, resizable=True)
    same_grey(trigger(images), 0.75 * images.numpy() + 0.25 * np.rint(resized))


# --- reflections ------------------------------------------------------------------------------------------------------


def blurred(plane: np.ndarray, sigma: float) -> np.ndarray:
    height, width = plane.shape
    radius = math.ceil(2 * sigma)
    out = np.zeros_like(plane)
    for i, j in np.ndindex(height, width):
        rows, columns = (range(max(0, k - radius), min(n, k + radius + 1)) for k, n in ((i, height), (j, width)))
        weights = np.array([[math.exp(-((a - i) ** 2 + (b - j) ** 2) / (2 * sigma**2)) for b in columns] for a in rows])
        out[i, j] = (weights * plane[np.ix_(rows, columns)]).sum() / weights.sum()
    return out


def stretched(part: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear resize of [h,w], pixel centres at halves."""
    out = np.zeros((height, width))
    for i, j in np.ndindex(height, width):
        at = [
            min(max((k + 0.5) * size / full - 0.5, 0), size - 1)
            for k, size, full in zip((i, j), part.shape, (height, width), strict=True)
        ]
        low = [math.floor(k) for k in at]
        for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
            weight = (1 - abs(at[0] - low[0] - a)) * (1 - abs(at[1] - low[1] - b))
            if weight:
                out[i, j] += weight * part[min(low[0] + a, part.shape[0] - 1), min(low[1] + b, part.shape[1] - 1)]
    return out


def reflected(image: np.ndarray, pool: np.ndarray, draw: list[float], ghost_rate: float) -> np.ndarray:
    """One reflection by the paper's steps; share of the image 0.4."""
    which, kind, down, right, side, weight, blur, extra, _ = draw
    channels, height, width = image.shape
    b, r = (image / 255) ** 2.2, (pool[int(which * len(pool))] / 255) ** 2.2
    out = np.zeros_like(b)
    offsets = []
    for drawn, size in ((down, height), (right, width)):
        low, high = (max(1, round(k * size / 224)) for k in (3, 8))
        offsets.append(low + int(drawn * (high - low + 1)))
    for c in range(channels):
        if kind < ghost_rate:
            d, e = offsets
            share = abs((1 if side < 0.5 else 0) - (0.15 + 0.35 * weight))
            ghost = share * r[c, d:, e:] + (1 - share) * r[c, : height - d, : width - e]
            out[c] = 0.4 * b[c] + 0.6 * stretched(ghost, height, width)
            continue
        soft = blurred(r[c], (1 + 4 * blur) * min(height, width) / 224)
        total = soft + b[c]
        mean = max(1.0, total[total > 1].mean()) if (total > 1).any() else 1.0
        reduced = np.clip(soft - (mean - 1) * (1.08 + 0.1 * extra), 0, 1)
        y, x = np.meshgrid(np.linspace(-3, 3, height), np.linspace(-3, 3, width), indexing="ij")
        shade = np.exp(-(y**2 + x**2) / 4)
        out[c] = 0.4 * b[c] + 0.8 * reduced * shade / shade.max()
    return 255 * np.clip(out, 0, 1) ** (1 / 2.2)


@pytest.mark.parametrize("shape", SHAPES)
def test_reflections_pixel_by_pixel(shape: tuple[int, int, int]) -> None:
    pool, images = scenes(4, *shape, 0), pictures(shape, 10)
    trigger = ReflectionTrigger(pool, 0.4, 0.5, seed=6)
    draws = [[uniform(6, n, column) for column in range(9)] for n in range(10)]
    assert len({draw[1] < 0.5 for draw in draws}) == 2, "both kinds of reflection are among them"
    slow = np.stack(
        [
            reflected(image, pool.numpy().astype(float), draw, 0.5)
            for image, draw in zip(images.numpy().astype(float), draws, strict=True)
        ]
    )
    same_grey(trigger(images), slow)
