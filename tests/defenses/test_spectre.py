"""SPECTRE: QUE scores against numpy and scipy, the filter, and which class is filtered."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from torch import Tensor

from backdoorlab.defenses.dataset.spectre import (
    Spectre,
    clean_majority,
    que_scores,
    robust_scores,
    unusual_direction,
    whiten,
)
from effect_tools import Numbers, case, effects, least, most, screened, victim


def normal(count: int, dims: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dims, dims, generator=generator, dtype=torch.float64)
    return torch.randn(count, dims, generator=generator, dtype=torch.float64) @ mix + 7


def planted(count: int = 400, poison: int = 40, dims: int = 6) -> Tensor:
    """The first samples lie together, in a direction in which the others hardly vary."""
    points = normal(count, dims)
    points[:, -1] = 0.02 * points[:, -1] + 1
    points[:poison, -1] += 0.5
    return points


def test_que_scores_equal_numpy_with_the_exponential_of_the_matrix() -> None:
    white = whiten(normal(50, 4), torch.arange(50) < 40)
    w = white.numpy()
    moments = w.T @ w / 50
    weight = expm(4 * (moments - np.eye(4)) / (np.linalg.norm(moments, 2) - 1))
    wanted = np.array([x @ weight @ x for x in w]) / np.trace(weight)
    assert np.allclose(que_scores(white, 4.0).numpy(), wanted)
    entries = np.exp(4 * (moments - np.eye(4)) / (np.linalg.norm(moments, 2) - 1))
    assert not np.allclose(wanted, np.array([x @ entries @ x for x in w]) / np.trace(entries), rtol=0.01)


def test_que_lies_between_the_norm_and_the_top_direction() -> None:
    white = whiten(normal(60, 4), torch.arange(60) < 50)
    assert torch.allclose(que_scores(white, 0.0), white.square().sum(1) / 4)
    _, axes = torch.linalg.eigh(white.T @ white / 60)
    assert torch.allclose(que_scores(white, 5000.0), (white @ axes[:, -1]).square(), rtol=1e-3, atol=1e-6)


def test_whitened_samples_have_mean_zero_and_covariance_one() -> None:
    kept = torch.arange(80) < 60
    white = whiten(normal(80, 5), kept)[kept]
    assert torch.allclose(white.mean(0), torch.zeros(5, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(white.T @ white / 60, torch.eye(5, dtype=torch.float64), atol=1e-9)


def test_the_unusual_direction_is_the_top_eigenvector_of_the_fourth_moments() -> None:
    points = planted(200, 12, 3)
    white = whiten(points, torch.ones(200, dtype=torch.bool))
    z, variance = unusual_direction(white, steps=300)
    products = np.einsum("ni,nj->nij", white.numpy(), white.numpy()).reshape(200, 9)
    values, vectors = np.linalg.eigh(np.cov(products.T, bias=True))
    assert variance == pytest.approx(values[-1], rel=1e-3)
    assert abs(np.corrcoef(z.numpy(), products @ vectors[:, -1])[0, 1]) == pytest.approx(1, abs=1e-3)


def test_the_filter_leaves_normal_samples_alone_and_takes_planted_ones() -> None:
    assert bool(clean_majority(normal(2000, 3), 100).all())
    points = normal(300, 4)
    points[:10] = 7 + 30 * torch.ones(4, dtype=torch.float64)
    kept = clean_majority(points, 20)
    assert not kept[:10].any()
    assert int(kept.sum()) >= 280


def test_planted_samples_score_highest() -> None:
    scores, value = robust_scores(planted(), 60, 80, 4.0)
    assert set(scores.topk(40).indices.tolist()) == set(range(40))
    _, without = robust_scores(normal(400, 6), 60, 80, 4.0)
    assert value > 10 * without


def test_the_best_number_of_components_is_taken() -> None:
    """The planted direction is the last component: without it nothing is found."""
    features = torch.cat([planted(), 1e-9 * normal(400, 4, seed=1)], 1)
    scores, _ = Spectre(eps=0.1).of_class(features, 400)
    assert len(set(scores.topk(40).indices.tolist()) & set(range(40))) >= 38


def test_only_the_class_with_the_largest_value_is_filtered() -> None:
    values = torch.tensor([2.0, float("nan"), 9.0, 3.0, 2.5, 2.1], dtype=torch.float64)
    assert Spectre().targets(values) == (2,)
    assert Spectre(classes="all").targets(values) == (0, 2, 3, 4, 5)
    assert Spectre(threshold=3.0).targets(values) == (2,)
    assert Spectre(threshold=50.0).targets(values) == ()
    assert Spectre().targets(torch.full((3,), float("nan"), dtype=torch.float64)) == ()


def test_the_number_removed_follows_from_the_bound() -> None:
    method = Spectre(eps=0.01)
    assert method.count(5000, 50000) == 750
    assert method.count(500, 50000) == 250, "never more than half of the class"
    assert method.count(30, 40) == 1


@case("defense/dataset/spectre", auroc=least(0.9), tpr=least(0.9), fpr=most(0.05))
def effect_of_spectre(seed: int) -> Numbers:
    """At 2 %: the poison is a sixth of its class; 1.5 times as many samples are removed."""
    return screened(seed, Spectre(eps=0.02), victim(seed, poison_rate=0.02))


test_effect = effects(__name__)
