"""ASSET: medcouple and outlyingness against slow loops, the cut, and which samples of a batch are taken."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from backdoorlab.core.seeding import isolated_rng
from backdoorlab.defenses import DefenderView
from backdoorlab.defenses.dataset.asset import Asset, Inner, logit_variance, medcouple, normal_cut, outlyingness
from backdoorlab.testing import tiny_task
from backdoorlab.training import Context
from effect_tools import PATCH, Numbers, benign, case, clean, effects, least, most, screened, task, victim


def skewed(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).exp()


def test_medcouple_equals_a_slow_loop() -> None:
    values = skewed(21)
    middle = float(values.median())
    pairs = itertools.product([v for v in values.tolist() if v >= middle], [v for v in values.tolist() if v <= middle])
    kernel = [((a - middle) - (middle - b)) / (a - b) if a > b else 0.0 for a, b in pairs]
    assert medcouple(values) == pytest.approx(float(np.median(kernel)))


def test_medcouple_is_a_skewness() -> None:
    values = skewed(200)
    assert 0.1 < medcouple(values) < 1
    assert medcouple(-values) == pytest.approx(-medcouple(values))
    assert medcouple(3 * values + 5) == pytest.approx(medcouple(values))
    assert medcouple(torch.ones(5, dtype=torch.float64)) == 0


@pytest.mark.parametrize(("sign", "factor"), [(1, 3), (-1, 4)])
def test_outlyingness_is_the_distance_to_the_median_over_that_of_the_fence(sign: int, factor: int) -> None:
    values = sign * skewed(50, 1)
    q1, q2, q3 = np.quantile(values.numpy(), (0.25, 0.5, 0.75))
    fence = q3 + 1.5 * math.exp(factor * medcouple(values)) * (q3 - q1)
    wanted = np.maximum(values.numpy() - q2, 0) / (fence - q2)
    assert np.allclose(outlyingness(values).numpy(), wanted)
    assert not outlyingness(torch.ones(5, dtype=torch.float64)).any()


def test_the_cut_is_where_the_density_of_the_lower_half_is_a_millionth() -> None:
    scores = torch.cat([torch.randn(4001, generator=torch.Generator().manual_seed(2)), torch.full((100,), 50.0)])
    cut = normal_cut(scores)
    middle = float(scores.double().quantile(0.5))
    lower = scores.double()[scores.double() <= middle]
    spread = float((lower - middle).square().mean().sqrt())
    density = math.exp(-((cut - middle) ** 2) / (2 * spread**2)) / (spread * math.sqrt(2 * math.pi))
    assert density == pytest.approx(1e-6)
    assert spread == pytest.approx(1, abs=0.06)
    assert math.isfinite(normal_cut(torch.ones(10)))


def test_variance_is_that_of_the_logits_of_a_sample() -> None:
    logits = torch.tensor([[1.0, 3.0], [5.0, 5.0]])
    assert float(logit_variance(logits)) == pytest.approx(0.5)


def test_planted_samples_of_a_batch_are_taken_and_no_others() -> None:
    generator = torch.Generator().manual_seed(4)
    suspicious, known = torch.randn(200, 16, generator=generator), torch.randn(200, 16, generator=generator)
    suspicious[:15] = 0.2 * suspicious[:15] + 4
    with isolated_rng(0):
        net = Inner.separating(suspicious, known, 30, 1e-2)
    with torch.no_grad():
        taken = outlyingness(net(suspicious).double()) > 1
    assert float(taken[:15].float().mean()) > 0.8
    assert float(taken[15:].float().mean()) < 0.05


def test_scores_are_in_the_order_of_the_set() -> None:
    mine = tiny_task()
    model, _ = mine.fit(mine.train, Context(1))
    view = DefenderView(model=model, suspicious=mine.train, clean=mine.train[torch.arange(20)])
    method = Asset(iterations=2, inner_steps=2)
    scores = method.apply(view, Context(0)).scores
    assert scores.shape == (80,)
    assert scores.std() > 0


@case("defense/dataset/asset", auroc=least(0.9), tpr=least(0.8), fpr=most(0.05))
def effect_of_asset(seed: int) -> Numbers:
    """And on benign data: "benign_fpr"."""
    method = Asset(iterations=40, lr=1e-3)
    view = DefenderView(model=benign(seed), suspicious=task(seed).train, clean=clean(seed))
    flagged = method.apply(view, Context(seed)).flags
    return screened(seed, method, victim(seed, **PATCH)) | {"benign_fpr": float(flagged.float().mean())}


test_effect = effects(__name__)
