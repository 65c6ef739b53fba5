"""Statistics over seeds and over tasks: intervals, ranks and significance."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from backdoorlab.core.errors import InputError


def bootstrap_ci(
    values: Sequence[float], confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile-bootstrap interval of the mean, with a separate generator: equal values, equal interval.

    Args:
        values: one per seed.
        confidence: of the interval.
        resamples: number of bootstrap means.
        seed: of the resampling.

    Returns:
        (low, high); None for fewer than two values, which say nothing about their spread. With few seeds the interval
        is too narrow (at n = 3 by nearly half): read it as the spread of the seeds at hand.
    """
    if not 0 < confidence < 1:
        raise InputError(f"confidence must be > 0 and < 1, got {confidence}")
    data = np.asarray(values, dtype=np.float64)
    if len(data) < 2:
        return None
    means = np.concatenate([data[drawn].mean(axis=1) for drawn in _resamples(len(data), resamples, seed)])
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


_BLOCK = 1 << 20
"""Random indices that are held at once; 10,000 resamples of 10,000 values have a hundred times as many."""


def _resamples(count: int, resamples: int, seed: int) -> Iterable[np.ndarray]:
    """Indices [rows, count] in blocks of rows; the same whatever the size of the blocks."""
    if count * resamples <= _BLOCK:
        return (_few_resamples(count, resamples, seed),)
    generator, rows = np.random.default_rng(seed), max(1, _BLOCK // count)
    sizes = (min(rows, resamples - start) for start in range(0, resamples, rows))
    return (generator.integers(0, count, (size, count)) for size in sizes)


@functools.lru_cache(maxsize=4)  # a table has many groups of the same size
def _few_resamples(count: int, resamples: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, count, (resamples, count))


def mean_ranks(scores: Mapping[str, Sequence[float]], higher_is_better: bool = True) -> dict[str, float]:
    """Mean rank (1 = best, ties share) of each method over the same tasks.

    Args:
        scores: per method one number per task, in the same order of tasks.
        higher_is_better: of the scores.
    """
    matrix = _aligned(scores)
    from scipy import stats

    ranks = stats.rankdata(-matrix if higher_is_better else matrix, axis=0).mean(axis=1)
    return dict(zip(scores, map(float, ranks), strict=True))


@dataclass(frozen=True)
class Comparison:
    """Two methods on the same tasks.

    Attributes:
        first: name.
        second: name.
        difference: median of first - second.
        p: two-sided p-value of Wilcoxon's signed-rank test; 1 if they never differ.
        p_adjusted: after Holm's correction for all comparisons made together.
    """

    first: str
    second: str
    difference: float
    p: float
    p_adjusted: float


def compare_all(scores: Mapping[str, Sequence[float]]) -> list[Comparison]:
    """Wilcoxon's signed-rank test of every pair of methods, Holm-corrected; most significant first."""
    matrix, names = _aligned(scores), list(scores)
    pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
    differences = [matrix[i] - matrix[j] for i, j in pairs]
    from scipy import stats

    p = [float(stats.wilcoxon(d).pvalue) if np.any(d) else 1.0 for d in differences]
    return sorted(
        (
            Comparison(names[i], names[j], float(np.median(d)), one, adjusted)
            for (i, j), d, one, adjusted in zip(pairs, differences, p, holm(p), strict=True)
        ),
        key=lambda c: (c.p_adjusted, c.p),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given."""
    order, adjusted, running = np.argsort(p_values, kind="stable"), [0.0] * len(p_values), 0.0
    for position, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - position) * p_values[index]))
        adjusted[index] = running
    return adjusted


def _aligned(scores: Mapping[str, Sequence[float]]) -> np.ndarray:
    lengths = {name: len(values) for name, values in scores.items()}
    if len(set(lengths.values())) > 1 or not lengths or 0 in lengths.values():
        raise InputError(f"methods must be compared on the same tasks, at least one; got {lengths}")
    return np.asarray(list(scores.values()), dtype=np.float64)
