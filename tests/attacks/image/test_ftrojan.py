"""FTrojan: against slow, independent implementations and closed forms; its options; its effect."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn

from attack_tools import FROM_CHROMA, chroma_oracle, pictures, same_grey, tiny_task, two_class_task
from backdoorlab.attacks import attacks
from backdoorlab.attacks.image.ftrojan import FTrojan
from backdoorlab.training import Context
from effect_tools import LOST, OBEYS, Numbers, case, effects, least, planted


@pytest.mark.parametrize(
    ("shape", "window", "spots"),
    [
        ((3, 32, 32), 32, (15, 31)),
        ((3, 64, 64), 32, (15, 31)),
        ((1, 16, 16), 16, (7, 15)),
        ((1, 28, 28), 28, (13, 27)),
    ],
)
def test_ftrojan_adds_to_two_coefficients_of_each_window(
    shape: tuple[int, int, int], window: int, spots: tuple[int, int]
) -> None:
    images = pictures(shape)

    def edit(plane: np.ndarray) -> np.ndarray:
        out = plane.copy()
        for top in range(0, shape[1], window):
            for left in range(0, shape[2], window):
                part = np.s_[top : top + window, left : left + window]
                coefficients = dctn(out[part], norm="ortho")
                for spot in spots:
                    coefficients[spot, spot] += 30
                out[part] = idctn(coefficients, norm="ortho")
        return out

    slow = np.stack([chroma_oracle(image.numpy(), "ftrojan", edit) for image in images])
    assert np.array_equal(FTrojan(magnitude=30.0).make_trigger(two_class_task(shape), Context())(images).numpy(), slow)


def test_ftrojan_continues_the_pattern_to_the_border() -> None:
    pattern = FTrojan().make_trigger(two_class_task((3, 29, 31)), Context()).pattern
    assert torch.equal(pattern[:, :, 29:], pattern[:, :, :2])
    assert bool(pattern[:, :, 29:].any())


def test_ftrojan_where_windows_do_not_fit_pixel_by_pixel() -> None:
    """29x31 with windows of 29: waves by their cosine formula, continued over the border."""
    images, side, magnitude = pictures((3, 29, 31), 4), 29, 30.0
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


@case("attack/image/ftrojan", asr=least(0.9), acc_lost=LOST, benign_asr=OBEYS)
def effect_of_ftrojan(seed: int) -> Numbers:
    return planted(seed, "ftrojan", poison_rate=0.1, magnitude=60.0)[1]


test_effect = effects(__name__)
