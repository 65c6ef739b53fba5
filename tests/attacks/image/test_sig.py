"""SIG: against slow, independent implementations and closed forms; its options; its effect."""

from __future__ import annotations

import math

import pytest
import torch

from attack_tools import GREY, make, per_pixel, pictures, tiny_task, two_class_task
from backdoorlab.attacks.image.sig import Sig
from backdoorlab.core.errors import InputError
from backdoorlab.training import Context
from effect_tools import LOST, Numbers, case, effects, least, most, planted

SIZES = [(1, 16, 16), (3, 32, 32), (3, 29, 31), (3, 64, 64)]


@pytest.mark.parametrize("shape", SIZES)
def test_sig_is_a_sinusoid_along_columns(shape: tuple[int, int, int]) -> None:
    images, width = pictures(shape, 3), shape[2]
    attack = Sig(delta_train=23.0, delta_test=61.0, frequency=5.0)
    task = two_class_task(shape)
    trigger = attack.make_trigger(task, Context())
    for delta, fast in (
        (61.0, trigger(images)),
        (23.0, attack.poison_inputs(trigger, images, torch.arange(3), task, Context())),
    ):
        wave = [delta * math.sin(2 * math.pi * j * 5 / width) for j in range(width)]
        assert torch.equal(fast, per_pixel(images, lambda x, c, i, j, w=wave: x + w[j]))


def test_sig_settings_that_do_not_fit_the_pictures() -> None:
    with pytest.raises(InputError, match="frequency must be below 8"):
        make("sig", frequency=8.0).run(tiny_task(GREY), Context())


@case("attack/image/sig", asr=least(0.4), acc_lost=LOST, benign_asr=most(0.4))
def effect_of_sig(seed: int) -> Numbers:
    return planted(seed, "sig", target=1, poison_rate=0.08, delta_train=60.0, delta_test=90.0)[1]


test_effect = effects(__name__)
