"""Adaptive-Blend: against slow, independent implementations and closed forms; its options; its effect."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from attack_tools import GREY, ODD, make, pictures, same_grey, tiny_task, two_class_task
from backdoorlab.attacks import attacks
from backdoorlab.attacks.common.pictures import key_image
from backdoorlab.attacks.image.adap_blend import piece_index, random_half
from backdoorlab.attacks.triggers.pixels import constant_blend
from backdoorlab.training import Context
from effect_tools import LOST, OBEYS, Numbers, case, effects, least, planted


def save(path: Path, pixels: np.ndarray) -> str:
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return str(path)


def test_adap_blend_takes_a_picture(tmp_path: Path) -> None:
    path = save(tmp_path / "key.png", np.full((8, 8, 3), 90))
    trigger = make(attacks.get("adap_blend", "image"), key=path).make_trigger(tiny_task(GREY), Context())  # type: ignore[attr-defined]
    assert trigger.keys.unique().tolist() == [90]


@pytest.mark.parametrize(("height", "width"), [(16, 16), (29, 31), (30, 17)])
def test_adap_blend_pieces(height: int, width: int) -> None:
    index = piece_index(height, width, 4)
    for i in range(height):
        for j in range(width):
            assert int(index[i, j]) == (i // math.ceil(height / 4)) * 4 + j // math.ceil(width / 4)
    assert len(index.unique()) == 16
    shown = random_half(50, 16, torch.Generator().manual_seed(0))
    assert shown.sum(1).tolist() == [8] * 50
    assert len(torch.unique(shown, dim=0)) > 40


def test_adap_blend_training_samples_show_half_of_the_key() -> None:
    from backdoorlab.attacks.image.adap_blend import AdapBlend

    task, attack = two_class_task((1, 16, 16)), AdapBlend(alpha_train=0.5)
    trigger = attack.make_trigger(task, Context())
    images = torch.full((8, 1, 16, 16), 100, dtype=torch.uint8)
    stamped = attack.poison_inputs(trigger, images, torch.arange(8), task, Context())
    whole = constant_blend(trigger.keys[0], 0.5)(images)
    blocks = (stamped == whole).reshape(8, 4, 4, 4, 4).all(4).all(2)
    untouched = (stamped == images).reshape(8, 4, 4, 4, 4).all(4).all(2)
    assert (blocks | untouched).all()
    assert blocks.flatten(1).sum(1).tolist() == [8] * 8
    assert torch.equal(trigger(images), constant_blend(trigger.keys[0], 0.2)(images))


@pytest.mark.parametrize("shape", [GREY, ODD])
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


@case("attack/image/adap_blend", asr=least(0.9), acc_lost=LOST, benign_asr=OBEYS)
def effect_of_adap_blend(seed: int) -> Numbers:
    return planted(seed, "adap_blend")[1]


test_effect = effects(__name__)
