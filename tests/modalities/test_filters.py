"""Filters of images against scipy and sums."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.fft import dctn

from backdoorlab.modalities.filters import dct_matrix, gaussian_blur


def test_cosine_transform_agrees_with_scipy() -> None:
    signal = np.random.default_rng(0).normal(size=(13, 13))
    matrix = dct_matrix(13).numpy()
    assert np.allclose(matrix @ signal @ matrix.T, dctn(signal, norm="ortho"))


def test_blur_is_a_normalised_gaussian_sum() -> None:
    image = torch.rand(2, 3, 11, 9, generator=torch.Generator().manual_seed(0))
    for n, sigma in enumerate((0.7, 1.9)):
        fast = gaussian_blur(image, torch.tensor([0.7, 1.9]), truncate=2.0)[n].double().numpy()
        radius, plane = math.ceil(2 * sigma), image[n].double().numpy()
        for c, i, j in np.ndindex(3, 11, 9):
            total = weights = 0.0
            for a in range(max(0, i - radius), min(11, i + radius + 1)):
                for b in range(max(0, j - radius), min(9, j + radius + 1)):
                    w = math.exp(-((a - i) ** 2 + (b - j) ** 2) / (2 * sigma**2))
                    total, weights = total + w * plane[c, a, b], weights + w
            assert fast[c, i, j] == pytest.approx(total / weights, abs=1e-5)
