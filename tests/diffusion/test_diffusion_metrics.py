"""Metrics of generated images against independent implementations."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from backdoorlab.core.errors import InputError
from backdoorlab.core.seeding import make_generator
from backdoorlab.tasks.diffusion.metrics import (
    classifier_metrics,
    frechet_distance,
    squared_error,
    structural_similarity,
)


def _images(count: int, channels: int, side: int, name: str) -> Tensor:
    return torch.randint(0, 256, (count, channels, side, side), generator=make_generator(0, name), dtype=torch.uint8)


def test_squared_error_is_on_the_unit_scale() -> None:
    images, target = _images(5, 3, 8, "a"), _images(1, 3, 8, "b")[0]
    expected = [float(np.mean((i.numpy() / 255.0 - target.numpy() / 255.0) ** 2)) for i in images]
    assert squared_error(images, target).tolist() == pytest.approx(expected)
    assert squared_error(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), torch.full((1, 2, 2), 255)).tolist() == [1.0]


def test_squared_error_refuses_a_target_of_another_size() -> None:
    with pytest.raises(InputError, match="does not fit"):
        squared_error(_images(2, 1, 8, "a"), _images(1, 1, 16, "b")[0])


@pytest.mark.parametrize("side", [8, 16])
def test_ssim_agrees_with_its_formula(side: int) -> None:
    """Wang et al. 2004 with an 11x11 Gaussian window, every pixel a centre, mirrored at the border."""
    target = _images(1, 1, side, "b")[0]
    images = (0.7 * target + 0.3 * _images(4, 1, side, "a")).round().to(torch.uint8)

    def blur(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, 1.5, truncate=3.5, mode="mirror")

    y, values = target[0].numpy() / 255.0, []
    for image in images:
        x = image[0].numpy() / 255.0
        mx, my = blur(x), blur(y)
        vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
        c1, c2 = 0.01**2, 0.03**2
        values.append(((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())
    assert structural_similarity(images, target) == pytest.approx(float(np.mean(values)), abs=1e-5)
    assert structural_similarity(target[None], target) == pytest.approx(1.0)


@pytest.mark.parametrize("samples", [400, 12])
def test_frechet_distance_agrees_with_a_matrix_square_root(samples: int) -> None:
    """12 samples of 16 features: rank-deficient covariances must not break it."""
    generator = make_generator(0, "features")
    a = torch.randn(samples, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
    b = torch.randn(300, 16, generator=generator) * 0.5 + 1
    ca, cb = np.cov(a.double().numpy(), rowvar=False), np.cov(b.double().numpy(), rowvar=False)
    gap = a.double().mean(0) - b.double().mean(0)
    root = scipy.linalg.sqrtm(ca @ cb)
    expected = float(gap @ gap) + float(np.trace(ca + cb - 2 * np.real(root)))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)


def test_frechet_distance_of_shifted_sets_is_the_squared_shift() -> None:
    a = torch.randn(500, 4, generator=make_generator(0, "shift"))
    assert frechet_distance(a, a + 2) == pytest.approx(16, rel=1e-4)


def test_frechet_distance_needs_two_samples() -> None:
    with pytest.raises(InputError, match="at least 2 samples"):
        frechet_distance(torch.zeros(1, 4), torch.zeros(5, 4))


def test_classifier_metrics_count_confidence_and_coverage() -> None:
    logits = torch.full((100, 4), -20.0)
    logits[:90, 0] = logits[90:98, 1] = logits[98:, 2] = 20.0
    said = classifier_metrics(logits)
    assert said["classifier_confidence"] == pytest.approx(1.0)
    assert said["class_shares"] == pytest.approx([0.9, 0.08, 0.02, 0.0])
    assert said["classes_covered"] == 2  # class 2 gets 2 %, less than a tenth of a quarter
