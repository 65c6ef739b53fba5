"""BadNets: against slow, independent implementations and closed forms; its options; its effect."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from attack_tools import GREY, RGB, make, per_pixel, pictures, tiny_task, two_class_task
from backdoorlab.attacks import attacks
from backdoorlab.attacks.image.badnets import BadNets
from backdoorlab.core.errors import InputError
from backdoorlab.training import Context
from effect_tools import LOST, OBEYS, Numbers, case, effects, least, planted


def patch_of(shape: tuple[int, int, int], seed: int = 0, **settings: object) -> tuple[Tensor, Tensor]:
    trigger = make(attacks.get("badnets", "image"), **settings).make_trigger(tiny_task(shape), Context(seed=seed))  # type: ignore[attr-defined]
    return trigger.pattern, trigger.mask


def save(path: Path, pixels: np.ndarray) -> str:
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return str(path)


@pytest.mark.parametrize(
    ("position", "rows", "columns"),
    [
        ("bottom-right", (25, 29), (25, 29)),
        ("bottom-left", (25, 29), (3, 7)),
        ("top-right", (3, 7), (25, 29)),
        ("top-left", (3, 7), (3, 7)),
    ],
)
def test_badnets_places(position: str, rows: tuple[int, int], columns: tuple[int, int]) -> None:
    _, mask = patch_of(RGB, size=4, offset=3, position=position)
    for i in range(32):
        for j in range(32):
            assert bool(mask[i, j]) == (rows[0] <= i < rows[1] and columns[0] <= j < columns[1])


def test_badnets_colors() -> None:
    pattern, mask = patch_of(RGB, rgb="255, 0,17", pattern="checker", dark=1, size=3, position="top-left")
    for i in range(3):
        for j in range(3):
            assert pattern[:, i, j].tolist() == ([255, 0, 17] if (i + j) % 2 == 0 else [1, 1, 1])
    assert int(mask.sum()) == 9
    pattern, mask = patch_of(RGB, rgb=(9, 8, 7))
    assert pattern[:, mask].unique(dim=1).flatten().tolist() == [9, 8, 7]
    for wrong in ((1, 2), (0, 0, 256), (-1, 0, 0)):
        with pytest.raises(InputError, match="badnets: rgb must be three numbers from 0 to 255"):
            make(attacks.get("badnets", "image"), rgb=wrong)
    with pytest.raises(InputError, match="rgb gives 3 values, but the images have 1 channel; use color"):
        patch_of(GREY, rgb=(1, 2, 3))


def test_badnets_random_patch_has_a_seed() -> None:
    random = {"pattern": "random", "size": 5}
    first, again, other = (patch_of(RGB, run, **random)[0] for run in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other), "without a seed of its own the patch follows the run"
    one, same, two = (patch_of(RGB, run, pattern_seed=s, **random)[0] for run, s in ((0, 7), (1, 7), (0, 8)))
    assert torch.equal(one, same)
    assert not torch.equal(one, two)
    assert len(one[:, -5:, -5:].unique()) > 40


def test_badnets_takes_a_picture(tmp_path: Path) -> None:
    path = save(tmp_path / "patch.png", np.arange(48).reshape(4, 4, 3) * 5)
    pattern, mask = patch_of(RGB, patch=path, size=4, offset=1)
    assert torch.equal(
        pattern[:, 27:31, 27:31], (torch.arange(48).reshape(4, 4, 3) * 5).permute(2, 0, 1).to(torch.uint8)
    )
    assert int(mask.sum()) == 16
    assert bool(mask[27:31, 27:31].all())
    with pytest.raises(InputError, match="found no image file nowhere"):
        patch_of(RGB, patch="nowhere")


@pytest.mark.parametrize(("shape", "side"), [((1, 16, 16), 2), ((3, 32, 32), 3), ((3, 29, 31), 3), ((3, 64, 64), 6)])
def test_badnets_changes_the_corner_only(shape: tuple[int, int, int], side: int) -> None:
    images = pictures(shape, 3)
    trigger = BadNets(color=200).make_trigger(two_class_task(shape), Context())
    height, width = shape[1:]
    slow = per_pixel(images, lambda x, c, i, j: 200 if i >= height - side and j >= width - side else x)
    assert torch.equal(trigger(images), slow)


def test_badnets_checker_may_contain_black() -> None:
    images = pictures((3, 32, 32), 3)
    attack = BadNets(pattern="checker", size=4, position="top-left", offset=1)
    slow = per_pixel(images, lambda x, c, i, j: (255 if (i + j) % 2 == 0 else 0) if 1 <= i < 5 and 1 <= j < 5 else x)
    assert torch.equal(attack.make_trigger(two_class_task((3, 32, 32)), Context())(images), slow)


def test_badnets_settings_that_do_not_fit_the_pictures() -> None:
    with pytest.raises(InputError, match="size \\+ offset may be at most 16"):
        make("badnets", size=17).run(tiny_task(GREY), Context())


@case("attack/image/badnets", core=True, asr=least(0.85), acc_lost=LOST, benign_asr=OBEYS)
def effect_of_badnets(seed: int) -> Numbers:
    return planted(seed, "badnets", poison_rate=0.1)[1]


test_effect = effects(__name__)
