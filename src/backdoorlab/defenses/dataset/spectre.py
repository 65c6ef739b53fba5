"""SPECTRE: whitened by robust statistics of the clean majority, a small group of poison stands out.

Hayase, Kong, Somani, Oh, "SPECTRE: Defending Against Backdoor Attacks Using Robust Statistics", ICML 2021 (arXiv
2104.11315).

For every class with penultimate features h_1..h_n, of which at most m = ``eps`` N are poison (N: size of the set):

1. Reduce the features to 64 principal components, then to the leading k of them, for k = 1, 4, 9, ..., 64.
2. Estimate mean and covariance of the clean majority: up to 2 m samples with the most unusual second moments are
   filtered out. With samples w_i whitened by what is left, the direction is the symmetric Q, ||Q||_F = 1, in which
   w_i^T Q w_i varies most (power iteration), and the samples farthest from the median of w_i^T Q w_i go.
3. Whiten all samples of the class by this estimate and score them by quantum entropy (QUE). With second moments S,

       s_i = w_i^T M w_i / trace(M),     M = exp(alpha (S - I) / (||S||_2 - 1)),     alpha = 4

   which lies between the squared norm (alpha = 0) and the squared projection on the top direction (alpha = infinity).
4. Of the k take the one whose mean score is largest when the samples are whitened by those that are kept, the 1.5 m
   highest scores being removed.

The class with the largest such value is the target; its 1.5 m highest scores are flagged. The score of a sample is s_i
over the mean of its class, less the cut (so that exactly the flagged ones are positive) in the target class; the
others follow below.

Choices and deviations
- Only the target class is filtered, and at most half of it. ``classes="all"`` removes 1.5 m samples of every class, as
  some code does, at a cost of 1.5 ``eps`` K of the data.
- The exponential is that of the matrix; that of the entries, which occurs in published code, is another weight.
- Filtering removes a fifth of 2 m samples a round and stops early where Q varies no more than it does for a normal
  distribution, about 2 (1 + sqrt(k (k + 1) / 2 n))^2.
- ``threshold`` (optional): the target class is filtered only if its value is an outlier among the classes, by
  (v - median) / (1.4826 MAD). Without it 1.5 m samples are flagged in benign data too: SPECTRE says which samples, not
  whether there is poison, and its ``eps`` is a bound that the user states.
- A class of n samples gives at most n / 8 components: a covariance of more would be mostly chance.

Limits: ``eps`` far from the truth hurts; the poison must be a minority of its class (the paper's is at most a tenth).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backdoorlab.core.method import param
from backdoorlab.defenses.base import DatasetDefense, defenses
from backdoorlab.defenses.common.classes import gated, need_samples, rows_per_class
from backdoorlab.defenses.common.outliers import deviations
from backdoorlab.defenses.view import DefenderView
from backdoorlab.training.context import Context
from backdoorlab.training.evaluate import predict_features

LARGEST_SHARE = 0.5
"""No more than this share of a class is taken for poison."""
ROUNDS = 5
POWER_STEPS = 30
SLACK = 1.5
"""Fourth moments of a normal sample vary more than matrices of bounded entries do."""


def second_moments(white: Tensor) -> Tensor:
    """Mean of w w^T: float64 [N, D] -> [D, D]."""
    return white.T @ white / len(white)


def whiten(points: Tensor, kept: Tensor) -> Tensor:
    """Coordinates in which the samples ``kept`` (bool [N]) have mean 0 and covariance I: float64 [N, D]."""
    centred = points - points[kept].mean(0)
    values, axes = torch.linalg.eigh(second_moments(centred[kept]))
    return centred @ (axes / values.clamp_min(1e-9 * float(values.max().clamp_min(1e-30))).sqrt())


def unusual_direction(white: Tensor, steps: int = POWER_STEPS) -> tuple[Tensor, float]:
    """w^T Q w for the symmetric Q of norm 1 in which it varies most, and that variance.

    The operator Q -> cov(w w^T) Q is applied without forming it: z_i = w_i^T Q w_i, then mean(z_i w_i w_i^T).

    Args:
        white: float64 [N, D].
        steps: of the power iteration, which starts from the sample with the largest norm.

    Returns:
        z float64 [N], and its variance.
    """
    farthest = white[white.square().sum(1).argmax()]
    q = torch.outer(farthest, farthest)
    mean = second_moments(white)
    z = torch.zeros(len(white), dtype=white.dtype)
    for _ in range(steps):
        q = q / q.norm().clamp_min(1e-30)
        z = ((white @ q) * white).sum(1)
        q = (white * z[:, None]).T @ white / len(white) - (q * mean).sum() * mean
    return z, float(z.var(correction=0))


def clean_majority(points: Tensor, budget: int) -> Tensor:
    """Samples that are left when up to ``budget`` with unusual second moments are filtered out: bool [N]."""
    kept = torch.ones(len(points), dtype=torch.bool)
    dims = points.shape[1]
    left = budget
    while left > 0:
        white = whiten(points, kept)[kept]
        z, variance = unusual_direction(white)
        if variance <= SLACK * 2 * (1 + math.sqrt(dims * (dims + 1) / 2 / len(white))) ** 2:
            break
        count = min(left, max(1, math.ceil(budget / ROUNDS)))
        rows = kept.nonzero().flatten()
        kept[rows[(z - z.median()).abs().topk(count).indices]] = False
        left -= count
    return kept


def que_scores(white: Tensor, alpha: float) -> Tensor:
    """Quantum entropy scores of whitened samples: float64 [N, D] -> [N]."""
    values, axes = torch.linalg.eigh(second_moments(white))
    size = float(values[-1]) - 1
    exponent = alpha * (values - values[-1]) / size if size > 1e-9 else torch.zeros_like(values)
    weights = exponent.exp()  # times a constant, which the trace takes out: nothing overflows
    return ((white @ axes).square() * weights).sum(1) / weights.sum()


def robust_scores(points: Tensor, count: int, budget: int, alpha: float) -> tuple[Tensor, float]:
    """Scores by the robust statistics of a class, and how far those that would be removed stand out.

    Args:
        points: float64 [N, D].
        count: samples that would be removed.
        budget: samples that the estimate may leave out.
        alpha: of the scores.

    Returns:
        Scores float64 [N], and the mean score of all samples whitened by those that are kept.
    """
    scores = que_scores(whiten(points, clean_majority(points, budget)), alpha)
    kept = torch.ones(len(points), dtype=torch.bool)
    kept[scores.topk(count).indices] = False
    return scores, float(que_scores(whiten(points, kept), alpha).mean())


@defenses.register
@dataclass(frozen=True, kw_only=True)
class Spectre(DatasetDefense):
    """Quantum entropy scores after robust whitening."""

    name: ClassVar[str] = "spectre"
    paper: ClassVar[str] = "Hayase et al., SPECTRE, ICML 2021, arXiv 2104.11315"
    year: ClassVar[int] = 2021
    modalities: ClassVar[tuple[str, ...]] = ("image", "text", "audio", "video")

    eps: float = param(
        0.01, "upper bound on the poison, as a share of the whole set", above=0, high=0.5, source="paper"
    )
    excess: float = param(1.5, "samples removed, as a multiple of the bound", above=0, high=10, source="paper")
    dims: int = param(64, "principal components at most", low=1, source="paper")
    alpha: float = param(4.0, "of the quantum entropy scores", low=0, source="paper")
    classes: str = param(
        "target", "which classes are filtered: the suspected one, or all", choices=("target", "all"), source="paper"
    )
    threshold: float | None = param(
        None,
        "robust z-score among the classes that the target class must exceed; none: no demand",
        low=0,
        source="ours",
    )
    min_samples: int = param(20, "smaller classes are not judged", low=4, source="ours")

    def score(self, view: DefenderView, ctx: Context) -> Tensor:
        """QUE score over its class's mean, less the cut; classes that are not filtered lie below."""
        data = view.suspicious
        need_samples(self.name, "suspicious", data)
        features = predict_features(view.model, data.inputs).double()
        margins = torch.zeros(len(data), dtype=torch.float64)
        values = torch.full((data.num_classes,), math.nan, dtype=torch.float64)
        every = rows_per_class(data.labels, data.num_classes)
        for k, rows in ctx.track(enumerate(every), "spectre: robust statistics of classes", len(every)):
            if len(rows) >= self.min_samples and not bool((features[rows] == features[rows[0]]).all()):
                scores, values[k] = self.of_class(features[rows], len(data))
                relative = scores / scores.mean().clamp_min(1e-30)
                cut = relative.sort(descending=True, stable=True).values[self.count(len(rows), len(data)) - 1]
                # The cut itself belongs to what is removed.
                margins[rows] = relative - cut + 1e-6 * cut.clamp_min(1e-3)
        return gated(margins, data.labels, self.targets(values))

    def of_class(self, features: Tensor, total: int) -> tuple[Tensor, float]:
        """Scores of one class by its best k, and its value."""
        count, budget = self.count(len(features), total), self.count(len(features), total, 2.0)
        centred = features - features.mean(0)
        left, size, _ = torch.linalg.svd(centred, full_matrices=False)
        rank = int((size > 1e-9 * size[0]).sum())
        top = max(1, min(self.dims, rank, len(features) // 8))
        points = left[:, :top] * size[:top]
        steps = sorted({min(i * i, top) for i in range(1, math.isqrt(top) + 1)} | {top})
        return max((robust_scores(points[:, :k], count, budget, self.alpha) for k in steps), key=lambda found: found[1])

    def count(self, size: int, total: int, factor: float | None = None) -> int:
        """Samples of a class of this size that the bound allows for, times a factor (``excess``): at least 1."""
        wanted = (self.excess if factor is None else factor) * self.eps * total
        return max(1, min(round(wanted), int(LARGEST_SHARE * size)))

    def targets(self, values: Tensor) -> tuple[int, ...]:
        """Classes that are filtered, given the value of each, float64 [K] (NaN: not judged)."""
        judged = (~values.isnan()).nonzero().flatten().tolist()
        if self.classes == "all" or not judged:
            return tuple(judged)
        best = int(values.nan_to_num(-math.inf).argmax())
        if self.threshold is not None and float(deviations(values)[best]) <= self.threshold:
            return ()
        return (best,)

    def flags(self, scores: Tensor, view: DefenderView) -> Tensor:
        """The highest 1.5 eps N scores of the target class."""
        return scores > 0
