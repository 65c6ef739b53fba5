"""Blended: against slow, independent implementations and closed forms; its options; its effect."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from attack_tools import GREY, RGB, make, per_pixel, pictures, tiny_task, two_class_task
from backdoorlab.attacks import attacks
from backdoorlab.attacks.image.blended import Blended
from backdoorlab.core.errors import InputError
from backdoorlab.training import Context
from effect_tools import LOST, OBEYS, Numbers, case, effects, least, planted

SIZES = [(1, 16, 16), (3, 32, 32), (3, 29, 31), (3, 64, 64)]


@pytest.mark.parametrize("shape", SIZES[:3])
def test_blended_is_a_linear_blend(shape: tuple[int, int, int]) -> None:
    images, attack = pictures(shape, 4), Blended(alpha_train=0.35)
    trigger = attack.make_trigger(two_class_task(shape), Context())
    key = trigger.keys[0]
    for alpha, fast in (
        (np.float32(0.2), trigger(images)),
        (np.float32(0.35), attack.poison_inputs(trigger, images, torch.arange(4), two_class_task(shape), Context())),
    ):
        slow = per_pixel(images, lambda x, c, i, j, a=alpha: (1 - a) * x + a * float(key[c, i, j]))
        assert torch.equal(fast, slow)


def test_blended_takes_a_picture_file(tmp_path: object) -> None:
    from PIL import Image

    path = f"{tmp_path}/key.png"
    Image.fromarray(np.full((40, 20, 3), (200, 100, 50), dtype=np.uint8)).save(path)
    trigger = make(attacks.get("blended", "image"), key=path).make_trigger(tiny_task(RGB), Context())
    key: Tensor = trigger.keys[0]
    assert key[:, 0, 0].tolist() == [200, 100, 50]
    assert key.shape == RGB
    (tmp_path / "words.png").write_text("no picture")  # type: ignore[operator]
    with pytest.raises(InputError, match="of none of the known formats"):
        make(attacks.get("blended", "image"), key=f"{tmp_path}/words.png").make_trigger(tiny_task(RGB), Context())


def test_blended_settings_that_do_not_fit_the_pictures() -> None:
    with pytest.raises(InputError, match=r"found no image file no/such/file\.png"):
        make("blended", key="no/such/file.png").run(tiny_task(GREY), Context())


@case("attack/image/blended", asr=least(0.9), acc_lost=LOST, benign_asr=OBEYS)
def effect_of_blended(seed: int) -> Numbers:
    return planted(seed, "blended", poison_rate=0.05)[1]


test_effect = effects(__name__)
