"""Refool: against slow, independent implementations and closed forms; its options; its effect."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from attack_tools import (
    GREY,
    ODD,
    RGB,
    exact_uniform,
    make,
    per_pixel,
    pictures,
    reload,
    same_grey,
    tiny_task,
    two_class_task,
)
from backdoorlab.attacks import attacks
from backdoorlab.attacks.common.pictures import scenes
from backdoorlab.attacks.image.refool import ReflectionTrigger, Refool, expose, ghost, out_of_focus, vignette
from backdoorlab.core.errors import InputError
from backdoorlab.modalities.filters import gaussian_blur
from backdoorlab.testing import check_poison
from backdoorlab.training import Context
from effect_tools import LOST, Numbers, case, effects, least, most, planted


def save(path: Path, pixels: np.ndarray) -> str:
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return str(path)


def reflect(task_shape: tuple[int, int, int], **settings: object) -> ReflectionTrigger:
    attack = make(attacks.get("refool", "image"), **settings)
    trigger = attack.make_trigger(tiny_task(task_shape), Context())  # type: ignore[attr-defined]
    assert isinstance(trigger, ReflectionTrigger)
    return trigger


def test_refool_takes_a_folder(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for n in range(5):
        save(tmp_path / ("more" if n % 2 else ".") / f"{n}.png", np.full((20 + n, 30, 3), 50 * n))
    (tmp_path / "list.txt").write_text("no picture, no matter")
    attack = make(attacks.get("refool", "image"), reflections=str(tmp_path))
    used, held = (attack._trigger(tiny_task(RGB), part).pool for part in ("attack", "held out"))  # type: ignore[attr-defined]
    assert used.shape == (3, *RGB)
    assert held.shape == (2, *RGB)
    levels = [sorted(pool.flatten(1).unique().tolist()) for pool in (used, held)]
    assert sorted(levels[0] + levels[1]) == [0, 50, 100, 150, 200], "every image is in one of both pools"
    trigger, images = reflect(RGB, reflections=str(tmp_path)), tiny_task(RGB).test.inputs
    assert torch.equal(trigger.pool, used)
    assert torch.equal(reload(trigger)(images), trigger(images))  # type: ignore[arg-type]
    assert not torch.equal(trigger(images), reflect(RGB)(images))  # type: ignore[arg-type]
    assert len(reflect(RGB, reflections=str(tmp_path), pool=2).pool) == 2
    backdoor = attack.run(tiny_task(RGB), Context())
    assert 0 <= backdoor.notes["asr_held_out"] <= 1


def test_refool_says_what_is_wrong_with_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found no folder 'no/where'"):
        reflect(GREY, reflections="no/where")
    with pytest.raises(InputError, match="has no image file"):
        reflect(GREY, reflections=str(tmp_path))
    save(tmp_path / "a.png", np.zeros((5, 5, 3)))
    with pytest.raises(InputError, match="has one image; at least two are needed"):
        reflect(GREY, reflections=str(tmp_path))
    (tmp_path / "b.jpg").write_text("words")
    with pytest.raises(InputError, match=r"cannot read image .*b\.jpg: it is of none of the known formats"):
        reflect(GREY, reflections=str(tmp_path))


@pytest.mark.parametrize(("down", "right"), [(0, 0), (1, 2), (3, 1)])
def test_ghost_is_the_overlap_of_two_views_resized(down: int, right: int) -> None:
    scene = torch.rand(1, 3, 12, 10, generator=torch.Generator().manual_seed(0))
    kept = (12 - down, 10 - right)
    views = scene[:, :, down:, right:], scene[:, :, : kept[0], : kept[1]]
    mixed = 0.3 * views[0] + 0.7 * views[1]
    slow = torch.nn.functional.interpolate(mixed, (12, 10), mode="bilinear", align_corners=False)
    fast = ghost(scene, torch.tensor([down]), torch.tensor([right]), torch.tensor([0.3]))
    assert torch.allclose(fast, slow, atol=1e-5)


def test_out_of_focus_pixel_by_pixel() -> None:
    generator = torch.Generator().manual_seed(0)
    image, scene = torch.rand(2, 2, 3, 9, 9, generator=generator)
    sigma, extra = torch.tensor([0.5, 1.2]), torch.tensor([0.02, 0.09])
    fast = out_of_focus(image, scene, sigma, extra)
    soft = gaussian_blur(scene, sigma, truncate=2.0)
    for n, c in np.ndindex(2, 3):
        over = [float(soft[n, c, i, j] + image[n, c, i, j]) for i, j in np.ndindex(9, 9)]
        over = [value for value in over if value > 1]
        mean = max(1.0, sum(over) / len(over)) if over else 1.0
        for i, j in np.ndindex(9, 9):
            z = (-3 + 6 * i / 8) ** 2 + (-3 + 6 * j / 8) ** 2
            reduced = float(soft[n, c, i, j]) - (mean - 1) * (1.08 + float(extra[n]))
            expected = min(1.0, max(0.0, reduced)) * math.exp(-z / 4)
            assert float(fast[n, c, i, j]) == pytest.approx(expected, abs=1e-5)
    assert float(vignette(9, 9, image.device)[4, 4]) == 1


def test_reflection_of_darkness_only_dims() -> None:
    """With a black scene only the share of the image is left: a pure gain in linear light."""
    images = pictures((3, 16, 16))
    trigger = ReflectionTrigger(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), 0.4, 0.5, 1)
    slow = per_pixel(images, lambda x, c, i, j: 255 * (0.4 * (x / 255) ** 2.2) ** (1 / 2.2))
    assert int((trigger(images).int() - slow.int()).abs().max()) <= 0
    assert torch.equal(ReflectionTrigger(trigger.pool, 1.0, 0.5, 1)(images), images)


def test_reflections_mix_ghosts_and_blurs_and_scenes() -> None:
    black = torch.zeros(40, 3, 32, 32, dtype=torch.uint8)
    pool = scenes(5, 3, 32, 32, 0)
    assert len(torch.unique(pool.flatten(1), dim=0)) == 5
    assert float(pool.float().std((1, 2, 3)).min()) > 15
    kinds = [ReflectionTrigger(pool, 0.4, rate, 0)(black).float() for rate in (0.0, 0.49, 1.0)]
    corner = [k[:, :, :3, :3].mean((1, 2, 3)) for k in kinds]
    mixed_is_ghost = (kinds[1] == kinds[2]).flatten(1).all(1)
    assert (mixed_is_ghost | (kinds[1] == kinds[0]).flatten(1).all(1)).all()
    assert 5 < int(mixed_is_ghost.sum()) < 35
    assert float(corner[0].mean()) < float(corner[2].mean()), "only out-of-focus reflections have a vignette"


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 32, 32)])
def test_reflected_scenes_are_as_dark_as_the_published_pictures(shape: tuple[int, int, int]) -> None:
    """A mean of 53 grey levels in the attacker's pool and in the held-out one."""
    for part in ("attack", "held out"):
        pool = Refool()._trigger(two_class_task(shape), part).pool
        assert float(pool.float().mean()) == pytest.approx(53, abs=1)
        assert float(pool.float().std()) > 15
    brighter = Refool(brightness=90.0)._trigger(two_class_task(shape), "attack").pool
    assert float(brighter.float().mean()) == pytest.approx(90, abs=1)


def test_exposure_is_one_gain_of_linear_light() -> None:
    pool = pictures((3, 9, 7), 4)[:2]
    pool[0, 0, 0] = torch.tensor([0, 255, 40, 0, 255, 10, 3])
    wanted = 53 / float(pool.float().mean())
    linear = (pool.double().numpy() / 255) ** 2.2 * wanted**2.2
    slow = np.rint(255 * linear ** (1 / 2.2))
    assert int(np.abs(expose(pool, 53.0).numpy() - slow).max()) <= 1
    assert expose(pool[:1], 250.0).max() == 255


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


@pytest.mark.parametrize("shape", [GREY, ODD])
def test_reflections_pixel_by_pixel(shape: tuple[int, int, int]) -> None:
    pool, images = scenes(4, *shape, 0), pictures(shape, 10)
    trigger = ReflectionTrigger(pool, 0.4, 0.5, seed=6)
    draws = [[exact_uniform(6, n, column) for column in range(9)] for n in range(10)]
    assert len({draw[1] < 0.5 for draw in draws}) == 2, "both kinds of reflection are among them"
    slow = np.stack(
        [
            reflected(image, pool.numpy().astype(float), draw, 0.5)
            for image, draw in zip(images.numpy().astype(float), draws, strict=True)
        ]
    )
    same_grey(trigger(images), slow)


def test_refool_with_clean_labels_takes_only_the_target_class() -> None:
    task, attack = tiny_task(GREY), make(attacks.get("refool", "image"), clean_label=True, poison_rate=0.125)
    trigger = attack.make_trigger(task, Context())  # type: ignore[attr-defined]
    check_poison(attack, task, attack.poison(trigger, task, Context()))  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"largest possible rate is 0\.25"):
        dataclasses.replace(attack, poison_rate=0.5).run(task, Context())
    assert make(attacks.get("refool", "image")).label_mode == "dirty"


@case("attack/image/refool", asr=least(0.9), acc_lost=LOST, benign_asr=most(0.5))
def effect_of_refool(seed: int) -> Numbers:
    return planted(seed, "refool", poison_rate=0.1)[1]


test_effect = effects(__name__)
