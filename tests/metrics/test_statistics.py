from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from backdoorlab.core.errors import InputError
from backdoorlab.metrics.statistics import bootstrap_ci, compare_all, holm, mean_ranks


def test_bootstrap_agrees_with_scipy_and_repeats():
    values = np.random.default_rng(1).normal(0.5, 0.1, 12)
    low, high = bootstrap_ci(values)
    other = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=0).confidence_interval
    assert low == pytest.approx(other.low, abs=2e-3)
    assert high == pytest.approx(other.high, abs=2e-3)
    assert low < values.mean() < high
    assert bootstrap_ci(values) == (low, high)
    wide = bootstrap_ci(values, confidence=0.99)
    assert wide[0] < low and wide[1] > high


def test_one_value_has_no_interval():
    assert bootstrap_ci([0.3]) is None
    assert bootstrap_ci([]) is None
    assert bootstrap_ci([0.3, 0.3]) == pytest.approx((0.3, 0.3))
    with pytest.raises(InputError, match="confidence"):
        bootstrap_ci([1, 2], confidence=95)


def test_ranks_share_ties():
    ranks = mean_ranks({"a": [3, 1], "b": [2, 1], "c": [1, 0]})
    assert ranks == {"a": 1.25, "b": 1.75, "c": 3.0}
    assert mean_ranks({"a": [3, 1], "b": [2, 0]}, higher_is_better=False) == {"a": 2.0, "b": 1.0}
    with pytest.raises(InputError, match="same tasks"):
        mean_ranks({"a": [1], "b": [1, 2]})


def test_wilcoxon_pairs_with_holm():
    rng = np.random.default_rng(0)
    base = rng.random(12)
    scores = {"a": base, "b": base + 0.2 + 0.01 * rng.random(12), "c": base}
    found = {(c.first, c.second): c for c in compare_all(scores)}
    assert found["a", "b"].p == pytest.approx(stats.wilcoxon(scores["a"], scores["b"]).pvalue)
    assert found["a", "b"].difference < -0.2
    assert found["a", "c"].p == 1.0
    assert found["a", "b"].p_adjusted >= found["a", "b"].p


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
