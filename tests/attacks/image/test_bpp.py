"""BppAttack: against slow, independent implementations and closed forms; its options; its effect."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attack_tools import grey, per_pixel, pictures
from backdoorlab.attacks.draws import indexed_uniform
from backdoorlab.attacks.image.bpp import ForeignResidualTrigger, QuantizeTrigger
from effect_tools import LOST, OBEYS, Numbers, case, effects, least, most, planted


def floyd_steinberg(plane: np.ndarray, levels: int) -> np.ndarray:
    """Raster order, pixel by pixel, in single precision."""
    old, step = plane.astype(np.float32), np.float32(255 / (levels - 1))
    height, width = old.shape
    for i in range(height):
        for j in range(width):
            new = np.clip(np.rint(old[i, j] / step), 0, levels - 1).astype(np.float32) * step
            error = old[i, j] - new
            old[i, j] = new
            for down, right, share in ((0, 1, 7 / 16), (1, -1, 3 / 16), (1, 0, 5 / 16), (1, 1, 1 / 16)):
                if i + down < height and 0 <= j + right < width:
                    old[i + down, j + right] += error * np.float32(share)
    return np.rint(np.clip(old, 0, 255)).astype(np.uint8)


@pytest.mark.parametrize("levels", [2, 8, 16])
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 29, 31), (1, 9, 40), (1, 40, 2), (1, 1, 7)])
def test_bpp_dithering_equals_raster_order(shape: tuple[int, int, int], levels: int) -> None:
    images = pictures(shape, 4)
    slow = np.stack([[floyd_steinberg(plane, levels) for plane in image] for image in images.numpy()])
    assert np.array_equal(QuantizeTrigger(levels, True)(images).numpy(), slow)


@pytest.mark.parametrize("dithering", [False, True])
def test_bpp_leaves_so_many_levels(dithering: bool) -> None:
    stamped = QuantizeTrigger(8, dithering)(pictures((3, 32, 32)))
    assert set(stamped.flatten().tolist()) == {grey(k * 255 / 7) for k in range(8)}


def test_bpp_quantises_to_the_nearest_level() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    levels = [k * 255 / 7 for k in range(8)]
    slow = per_pixel(images, lambda x, c, i, j: min(levels, key=lambda level: abs(level - x)))
    assert torch.equal(QuantizeTrigger(8, False)(images), slow)


def test_bpp_negatives_carry_the_residual_of_another_image() -> None:
    images, donors = pictures((1, 16, 16), 5), pictures((1, 16, 16), 7, seed=9)
    trigger = ForeignResidualTrigger(donors, 8, False, seed=4)
    which = (indexed_uniform(4, torch.arange(5), 1).flatten() * 7).long().tolist()
    residual = QuantizeTrigger(8, False)(donors).int() - donors.int()
    slow = torch.stack([(images[n].int() + residual[d]).clamp(0, 255) for n, d in enumerate(which)])
    assert torch.equal(trigger(images).int(), slow)
    assert len(set(which)) > 1


@case("attack/image/bpp", asr=least(0.85), acc_lost=LOST, benign_asr=OBEYS, cross_lost=most(0.15))
def effect_of_bpp(seed: int) -> Numbers:
    return planted(seed, "bpp", poison_rate=0.1, levels=4)[1]


test_effect = effects(__name__)
