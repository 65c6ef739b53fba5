"""SCAn's model of features, and the verdict that a data set defense and a scan share.

Tang, Wang, Tang, Zhang, "Demon in the Variant: Statistical Analysis of DNNs for Robust Backdoor Contamination
Detection", USENIX Security 2021. What is done, and how it deviates, is described in
:mod:`backdoorlab.defenses.dataset.scan`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.covariance import ledoit_wolf_shrinkage
from torch import Tensor

from backdoorlab.core.method import param
from backdoorlab.core.seeding import spawn
from backdoorlab.data.split import Split
from backdoorlab.defenses.common.classes import need_classes, need_samples, rows_per_class
from backdoorlab.defenses.common.outliers import Evidence
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.context import Context
from backdoorlab.training.evaluate import predict_features


@dataclass(frozen=True, eq=False)
class Decomposition:
    """Features as class mean + variation: r = mean + u_k + e, u ~ N(0, between), e ~ N(0, within).

    Attributes:
        mean: float64 [D].
        between: float64 [D, D], covariance of the class means.
        within: float64 [D, D], covariance around them, the same for all classes.
    """

    mean: Tensor
    between: Tensor
    within: Tensor


def log_likelihood(features: Tensor, labels: Tensor, model: Decomposition) -> float:
    """Log-density of float64 [N, D] features of labelled samples under a decomposition, without its constant.

    Samples of a class are dependent through their common mean. With n of them, their sum's deviation and their scatter
    are independent: the mean has covariance between + within / n, the n - 1 remaining directions have ``within``.
    """
    total = 0.0
    for rows in rows_per_class(labels, int(labels.max()) + 1):
        if len(rows):
            mine = features[rows] - model.mean
            centre = mine.mean(0)
            inner = mine - centre
            of_mean = model.between + model.within / len(rows)
            total -= 0.5 * float(torch.logdet(of_mean) + centre @ torch.linalg.solve(of_mean, centre))
            total -= 0.5 * (len(rows) - 1) * float(torch.logdet(model.within))
            total -= 0.5 * float((inner * torch.linalg.solve(model.within, inner.T).T).sum())
    return total


def decompose(features: Tensor, labels: Tensor, rounds: int = 100, tolerance: float = 1e-5) -> Decomposition:
    """Fit a decomposition by expectation maximisation.

    Args:
        features: float64 [N, D].
        labels: int64 [N]; classes may be missing.
        rounds: at most.
        tolerance: stops when no entry of the within-class covariance moves by more than this share of the largest.

    Returns:
        The maximum of the likelihood that is reached from the moments of the sample, with a ridge of a millionth of the
        mean variance, so that both covariances can be inverted.
    """
    mean = features.mean(0)
    centred = features - mean
    groups = [rows for rows in rows_per_class(labels, int(labels.max()) + 1) if len(rows)]
    counts = torch.tensor([len(rows) for rows in groups], dtype=torch.float64)
    centres = torch.stack([centred[rows].mean(0) for rows in groups])
    scatter = sum((centred[r] - c).T @ (centred[r] - c) for r, c in zip(groups, centres, strict=True))
    dims = features.shape[1]
    ridge = 1e-6 * float(centred.square().mean().clamp_min(1e-12)) * torch.eye(dims, dtype=torch.float64)
    within = scatter / len(features) + ridge
    between = centres.T @ centres / len(groups) + ridge
    for _ in range(rounds):
        # Posterior of each class mean: gain = between (between + within / n)^-1, so that u = gain r and
        # its covariance is between - gain between.
        noisy = between + within / counts[:, None, None]
        gain = torch.linalg.solve(noisy, between.expand(len(groups), dims, dims)).transpose(1, 2)
        means = (gain @ centres[:, :, None])[:, :, 0]
        spread = between - gain @ between
        rest = centres - means
        last = within
        between = (means.T @ means + spread.sum(0)) / len(groups) + ridge
        within = (scatter + (counts[:, None] * rest).T @ rest + (counts[:, None, None] * spread).sum(0)) / len(features)
        within = (within + within.T) / 2 + ridge
        between = (between + between.T) / 2
        if float((within - last).abs().max()) <= tolerance * float(last.abs().max()):
            break
    return Decomposition(mean, between, within)


def shrunk(covariance: Tensor, residuals: Tensor) -> Tensor:
    """A covariance drawn toward a multiple of the identity, by the share that Ledoit and Wolf derive from residuals."""
    share = float(ledoit_wolf_shrinkage(residuals.numpy(), assume_centered=True))
    size = covariance.diagonal().mean()
    return (1 - share) * covariance + share * size * torch.eye(len(covariance), dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class TwoGroups:
    """The best division of one class in two.

    Attributes:
        second: bool [N], members of the second group.
        centres: float64 [2, D], means of both groups.
        ratio: log-likelihood ratio per sample between two groups and one.
    """

    second: Tensor
    centres: Tensor
    ratio: float


def two_groups(whitened: Tensor, restarts: int, seed: int) -> TwoGroups | None:
    """Divide samples in two groups around means of their own, all with the identity as covariance.

    Maximising the likelihood over groups and means is 2-means; the ratio of log-likelihoods per sample, twice, is then
    the scatter between the groups, n1 n2 / n^2 times the squared distance of their means.

    Args:
        whitened: float64 [N, D].
        restarts: of 2-means; the best counts.
        seed: of the restarts.

    Returns:
        None if fewer than two samples differ.
    """
    if len(whitened) < 2 or bool((whitened == whitened[0]).all()):
        return None
    order = np.lexsort(whitened.numpy().T[::-1])  # the outcome must not depend on the order of the samples
    means = KMeans(2, n_init=restarts, random_state=seed).fit(whitened.numpy()[order])
    second = torch.zeros(len(whitened), dtype=torch.bool)
    second[torch.from_numpy(order)] = torch.from_numpy(means.labels_.astype(bool))
    centres = torch.stack([whitened[~second].mean(0), whitened[second].mean(0)])
    share = float(second.double().mean())
    return TwoGroups(second, centres, share * (1 - share) * float((centres[0] - centres[1]).square().sum()) / 2)


@dataclass(frozen=True, eq=False)
class Contamination:
    """What the analysis says.

    Attributes:
        margins: float64 [N], log-likelihood of the suspicious group of its class minus that of the other, for every
            suspicious sample; the lowest of all in classes that were not judged.
        evidence: log-likelihood ratio per sample between two groups and one, of each class.
        targets: suspected classes, most suspicious first.
    """

    margins: Tensor
    evidence: Evidence
    targets: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SubgroupAnalysis:
    """The hyper-parameters of SCAn and the analysis itself, for whatever reports it."""

    dims: int = param(64, "dimensions that the features are reduced to", low=1, source="ours")
    threshold: float = param(7.389056, "anomaly index above which a class is suspected", low=0, source="paper: e^2")
    level: float = param(
        0.05,
        "chance of the clean samples' division at most (1: the index decides alone, as in the paper)",
        above=0,
        high=1,
        source="ours",
    )
    restarts: int = param(5, "of the search for two groups", low=1, source="ours")
    rounds: int = param(100, "of expectation maximisation, at most", low=1, source="BackdoorBench")
    min_samples: int = param(20, "smaller classes are not judged", low=2, source="ours")

    def analyse(self, model: Classifier, suspicious: Split, clean: Split, ctx: Context) -> Contamination:
        """Look for two groups in every class.

        Raises:
            InputError: if there are no suspicious samples, fewer than three clean ones, or other classes than the
                model's.
            NotApplicable: if the model has no penultimate features.
        """
        need_samples("scan", "suspicious", suspicious)
        need_samples("scan", "clean", clean, 3)
        need_classes("scan", model, suspicious)
        seen, known = (predict_features(model, part.inputs).double() for part in (suspicious, clean))
        return self.judge(seen, suspicious.labels.cpu(), known, clean.labels.cpu(), model.num_classes, ctx)

    def judge(
        self, seen: Tensor, labels: Tensor, known: Tensor, known_labels: Tensor, num_classes: int, ctx: Context
    ) -> Contamination:
        """The same for features float64 [N, D] of suspicious and [M, D] of clean samples."""
        white, white_known = self.whiten(seen, known, known_labels)
        evidence = Evidence.none(num_classes)
        margins = torch.full((len(seen),), math.nan, dtype=torch.float64)
        groups = zip(rows_per_class(labels, num_classes), rows_per_class(known_labels, num_classes), strict=True)
        seed = spawn(ctx.generator("scan")) % 2**31
        for k, (mine, owned) in ctx.track(enumerate(groups), "scan: looking for two groups", num_classes):
            if len(mine) < self.min_samples:
                continue
            found = two_groups(torch.cat([white[mine], white_known[owned]]), self.restarts, seed)
            if found is None:
                continue
            second, clean_second = found.second[: len(mine)], found.second[len(mine) :]
            bad = second_is_suspicious(second, clean_second)
            if not bad:
                second, clean_second = ~second, ~clean_second
            centres = found.centres if bad else found.centres.flip(0)
            gap = (white[mine, None] - centres).square().sum(2)
            margins[mine] = (gap[:, 0] - gap[:, 1]) / 2
            evidence.put(k, found.ratio, second, clean_second)
        lowest = float(margins.nan_to_num(math.inf).min()) if evidence.judged else 0.0
        targets = evidence.suspects(self.threshold, self.level)
        return Contamination(margins.nan_to_num(min(lowest, 0.0)), evidence, targets)

    def whiten(self, seen: Tensor, known: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Features in coordinates in which the variation within a class of clean samples is the identity."""
        centre = seen.mean(0)
        axes = torch.linalg.svd(seen - centre, full_matrices=False).Vh[: self.dims]
        seen, known = (seen - centre) @ axes.T, (known - centre) @ axes.T
        fitted = decompose(known, labels, self.rounds)
        means = torch.zeros_like(known)
        for rows in rows_per_class(labels, int(labels.max()) + 1):
            if len(rows):
                means[rows] = known[rows].mean(0)
        within = shrunk(fitted.within, known - means)
        factor = torch.linalg.cholesky(torch.linalg.inv(within))
        return seen @ factor, known @ factor


def second_is_suspicious(second: Tensor, clean_second: Tensor) -> bool:
    """Is the second group the one that holds fewer of the clean samples than of the others (smaller, without any)?"""
    if len(clean_second):
        return float(clean_second.double().mean()) <= float(second.double().mean())
    return 2 * int(second.sum()) <= len(second)
