"""CTRL: against slow, independent implementations and closed forms; its options; its effect."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn

from attack_tools import GREY, chroma_oracle, make, pictures, tiny_task, two_class_task
from backdoorlab.attacks.image.ctrl import Ctrl
from backdoorlab.core.errors import InputError
from backdoorlab.training import Context
from effect_tools import LOST, OBEYS, Numbers, case, effects, least, planted


@pytest.mark.parametrize(
    ("shape", "spots"),
    [
        ((3, 32, 32), ((15, 15), (31, 31))),
        ((3, 64, 64), ((15, 15), (31, 31))),
        ((1, 16, 16), ((7, 7), (15, 15))),
        ((3, 29, 31), ((14, 15), (28, 30))),
    ],
)
def test_ctrl_adds_to_two_coefficients_of_the_image(
    shape: tuple[int, int, int], spots: tuple[tuple[int, int], ...]
) -> None:
    images, task = pictures(shape), two_class_task(shape)
    attack = Ctrl(magnitude_train=50.0, magnitude_test=100.0)
    trigger = attack.make_trigger(task, Context())
    scale = math.sqrt(shape[1] * shape[2]) / 32
    for magnitude, fast in (
        (100, trigger(images)),
        (50, attack.poison_inputs(trigger, images, torch.arange(6), task, Context())),
    ):

        def edit(plane: np.ndarray, m: float = magnitude * scale) -> np.ndarray:
            coefficients = dctn(plane, norm="ortho")
            for spot in spots:
                coefficients[spot] += m
            return idctn(coefficients, norm="ortho")

        slow = np.stack([chroma_oracle(image.numpy(), "ctrl", edit) for image in images])
        assert np.array_equal(fast.numpy(), slow)


def test_ctrl_settings_that_do_not_fit_the_pictures() -> None:
    with pytest.raises(InputError, match="positions must be numbers from 1 to 31"):
        make("ctrl", positions=()).run(tiny_task(GREY), Context())


@case("attack/image/ctrl", fragile="ASR 0.42 in one of ten draws", asr=least(0.7), acc_lost=LOST, benign_asr=OBEYS)
def effect_of_ctrl(seed: int) -> Numbers:
    return planted(seed, "ctrl", poison_rate=0.08, magnitude_train=1200.0, magnitude_test=1600.0)[1]


test_effect = effects(__name__)
