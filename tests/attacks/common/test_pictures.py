"""Drawn pictures."""

from __future__ import annotations

import pytest
import torch

from backdoorlab.attacks.common.pictures import key_image


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 32, 32), (3, 64, 64), (3, 224, 224)])
def test_key_image_has_contrast(shape: tuple[int, int, int], seed: int) -> None:
    key = key_image(*shape, seed).float()
    assert abs(float(key.mean()) - 128) < 5
    assert 72 <= float(key.std()) <= 79
    assert not torch.equal(key_image(*shape, seed), key_image(*shape, seed + 1))
