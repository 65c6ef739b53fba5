"""Which classes stand out among the others, and which of these their clean samples excuse."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.stats import hypergeom
from torch import Tensor

FEWEST_CLASSES = 5
"""Among fewer values a median absolute deviation says nothing."""


def deviations(values: Tensor, floor: float = 1e-12) -> Tensor:
    """(v - median) / (1.4826 MAD) of K values; the median of an even number is the mean of the middle two.

    Args:
        values: float [K]; NaN marks what was not judged.
        floor: smallest spread that is divided by, for values that are equal in most classes.

    Returns:
        float64 [K], signed; 0 where a value is NaN, and everywhere if fewer than :data:`FEWEST_CLASSES` are judged.
    """
    values = values.double()
    judged = ~values.isnan()
    if int(judged.sum()) < FEWEST_CLASSES:
        return torch.zeros_like(values)
    gap = values - values[judged].quantile(0.5)
    spread = 1.4826 * gap[judged].abs().quantile(0.5)
    return (gap / spread.clamp_min(floor)).nan_to_num(0.0)


def clean_odds(found: int, total: int, clean_found: int, clean_total: int) -> float:
    """Probability that so few clean samples of a class are found if they are found as often as the others.

    Fisher's exact test, one-sided: of ``clean_total + total`` samples ``clean_found + found`` were found; what is the
    chance that ``clean_found`` or fewer of them are clean? A small value says that what was found is not a part of the
    class as it should be. 1 if nothing was found or there is no clean sample.
    """
    if not found or not clean_total:
        return 1.0
    return float(hypergeom.cdf(clean_found, clean_total + total, clean_total, clean_found + found))


@dataclass(frozen=True, eq=False)
class Evidence:
    """What speaks against each class.

    Attributes:
        values: float64 [K], larger = more suspicious; NaN for classes that were not judged.
        odds: float64 [K] of :func:`clean_odds`.
        untouched: bool [K], the class has clean samples and none of them was found.
        floor: of the spread of values, see :func:`deviations`.
    """

    values: Tensor
    odds: Tensor
    untouched: Tensor
    floor: float = 1e-12

    @classmethod
    def none(cls, num_classes: int, floor: float = 1e-12) -> Evidence:
        """Nothing judged yet; to be filled in with :meth:`put`."""
        values = torch.full((num_classes,), math.nan, dtype=torch.float64)
        odds = torch.ones(num_classes, dtype=torch.float64)
        return cls(values, odds, torch.zeros(num_classes, dtype=torch.bool), floor)

    def put(self, k: int, value: float, found: Tensor, clean_found: Tensor) -> None:
        """Judge class k: its value, and which of its suspicious and clean samples were found, bool [n] and [m]."""
        hits, clean_hits = int(found.sum()), int(clean_found.sum())
        self.values[k] = value
        self.odds[k] = clean_odds(hits, len(found), clean_hits, len(clean_found))
        self.untouched[k] = bool(len(clean_found)) and not clean_hits and hits > 0

    @property
    def index(self) -> Tensor:
        """Robust z-score of each class among the others: float64 [K], see :func:`deviations`."""
        return deviations(self.values, self.floor)

    @property
    def judged(self) -> int:
        """Number of classes that were judged."""
        return int((~self.values.isnan()).sum())

    def suspects(self, threshold: float, level: float) -> tuple[int, ...]:
        """Classes whose index exceeds a threshold and that their clean samples do not excuse, highest index first.

        Clean samples do not excuse a class if so few were found with odds of at most ``level``, or none at all (a few
        of them cannot reach a low level). A level of 1 asks no clean sample. Among fewer than :data:`FEWEST_CLASSES`
        judged classes there is no index; the level then decides alone.
        """
        index, few = self.index, self.judged < FEWEST_CLASSES
        if few and level >= 1:
            return ()
        order = torch.where(self.values.isnan(), -math.inf, index).argsort(descending=True, stable=True)
        found = []
        for k in order.tolist():
            low = float(self.odds[k]) <= level or (bool(self.untouched[k]) and not few)
            if not math.isnan(float(self.values[k])) and low and (few or float(index[k]) > threshold):
                found.append(int(k))
        return tuple(found)

    @property
    def score(self) -> float:
        """Largest index; among too few classes for one, 1 - the smallest odds."""
        if self.judged < FEWEST_CLASSES:
            return 1 - float(self.odds.min())
        return float(self.index.max())
