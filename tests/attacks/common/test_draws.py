"""Draws that belong to a sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attack_tools import splitmix
from backdoorlab.attacks.draws import indexed_uniform, sample_uniform


def test_indexed_draws_equal_integer_arithmetic() -> None:
    mask, gold = 2**64 - 1, 0x9E3779B97F4A7C15
    for seed in (0, 1, 2**62 + 12345):
        fast = indexed_uniform(seed, torch.tensor([0, 7, 2**40]), 3)
        key = splitmix((seed * gold + 1) & mask)
        for row, index in enumerate((0, 7, 2**40)):
            for column in range(3):
                bits = splitmix((splitmix((index + key) & mask) + (column + 1) * gold) & mask)
                assert float(fast[row, column]) == (bits >> 40) / 2**24


def test_indexed_draws_are_uniform_and_uncorrelated() -> None:
    draws = indexed_uniform(3, torch.arange(20000), 4).double().numpy()
    for column in draws.T:
        assert np.histogram(column, 10, (0, 1))[0] == pytest.approx(2000, abs=200)
    assert np.abs(np.corrcoef(draws.T) - np.eye(4)).max() < 0.03
    assert abs(np.corrcoef(draws[1:, 0], draws[:-1, 0])[0, 1]) < 0.03
    generator = torch.Generator().manual_seed(0)
    first = sample_uniform(3, torch.zeros(5, 1), 2, None, generator)
    assert not torch.equal(first, sample_uniform(3, torch.zeros(5, 1), 2, None, generator))
