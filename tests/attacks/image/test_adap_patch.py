"""Adaptive-Patch: against slow, independent implementations and closed forms; its options; its effect."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from attack_tools import GREY, ODD, RGB, make, per_pixel, pictures, same_grey, tiny_task, two_class_task
from backdoorlab.attacks import attacks
from backdoorlab.attacks.image.adap_patch import AdapPatch, draw_patches
from backdoorlab.core.errors import InputError
from backdoorlab.training import Context
from effect_tools import OBEYS, Numbers, case, effects, least, most, planted


def save(path: Path, pixels: np.ndarray) -> str:
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return str(path)


def test_adap_patch_takes_four_pictures(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{n}.png", np.full((6, 6, 3), 40 * n + 10)) for n in range(4)]
    pictures, masks = draw_patches(3, 32, 32, 0, tuple(paths))
    _, drawn = draw_patches(3, 32, 32, 0)
    for n in range(4):
        assert pictures[n][:, masks[n]].unique().tolist() == [40 * n + 10]
        assert bool((masks[n] | ~drawn[n]).all()), "a picture fills the square that the drawn patch lies in"
    attack = make(attacks.get("adap_patch", "image"), patches=",".join(paths))
    images = tiny_task(RGB).test.inputs
    stamped = attack.make_trigger(tiny_task(RGB), Context())(images)  # type: ignore[attr-defined]
    both = torch.where(masks[1], pictures[1], torch.where(masks[0], pictures[0], images))
    assert torch.equal(stamped, both)
    with pytest.raises(InputError, match="patches must be four image files, got 1"):
        make(attacks.get("adap_patch", "image"), patches=paths[0])


def test_adap_patch_wears_one_patch_in_training_and_two_at_test_time() -> None:
    shape = (3, 32, 32)
    task, attack, images = two_class_task(shape), AdapPatch(), pictures(shape, 8)
    picture, mask = draw_patches(*shape, 0)
    assert mask.flatten(1).sum(1).tolist()[1::2] == [16, 64]
    assert mask[0, 22:, 22:].sum() == mask[0].sum() > 60
    stamped = attack.poison_inputs(attack.make_trigger(task, Context()), images, torch.arange(8), task, Context())
    for n, image in enumerate(images):
        a, p, m = np.float32((0.5, 0.5, 0.2, 0.3)[n % 4]), picture[n % 4], mask[n % 4]
        slow = per_pixel(
            image[None],
            lambda x, c, i, j, a=a, p=p, m=m: (np.float32(1) - a) * x + a * float(p[c, i, j]) if m[i, j] else x,
        )
        assert torch.equal(stamped[n], slow[0]), n
    both = torch.where(mask[1], picture[1], torch.where(mask[0], picture[0], images))
    assert torch.equal(attack.make_trigger(task, Context())(images), both)


@pytest.mark.parametrize("side", [(8, 8), (16, 16), (28, 28), (29, 31), (32, 32), (64, 48), (224, 224)])
def test_adap_patches_have_a_corner_each(side: tuple[int, int]) -> None:
    """A patch upon another would be no second reason to obey."""
    _, masks = draw_patches(3, *side, 0)
    assert masks.any((1, 2)).all()
    assert masks.sum(0).max() == 1
    half = [masks[:, : side[0] // 2], masks[:, side[0] // 2 :]]
    upper = [float(half[0][k].sum() / masks[k].sum()) for k in range(4)]
    left = [float(masks[k, :, : side[1] // 2].sum() / masks[k].sum()) for k in range(4)]
    assert [(round(a), round(b)) for a, b in zip(upper, left, strict=True)] == [(0, 0), (1, 0), (0, 1), (1, 1)]


@pytest.mark.parametrize("shape", [GREY, ODD])
def test_adap_patch_faint_patches_one_over_the_other(shape: tuple[int, int, int]) -> None:
    attack = make(attacks.get("adap_patch", "image"), test_patches=4, test_opacity=0.6)
    drawn, masks = (t.numpy() for t in draw_patches(*shape, 0))
    images = pictures(shape, 4)
    slow = images.numpy().astype(float)
    for layer in range(4):
        for n, c, i, j in np.ndindex(*images.shape):
            if masks[layer, i, j]:
                slow[n, c, i, j] = 0.4 * slow[n, c, i, j] + 0.6 * drawn[layer, c, i, j]
    same_grey(attack.make_trigger(tiny_task(shape), Context())(images), slow)  # type: ignore[attr-defined]


def test_adap_patch_wants_four_opacities() -> None:
    with pytest.raises(InputError, match="four numbers"):
        attacks.get("adap_patch", "image")(opacities=(0.5, 0.5))


@case("attack/image/adap_patch", asr=least(0.7), acc_lost=most(0.1), benign_asr=OBEYS)
def effect_of_adap_patch(seed: int) -> Numbers:
    return planted(seed, "adap_patch")[1]


test_effect = effects(__name__)
