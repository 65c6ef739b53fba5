"""AC, activation clustering: in a poisoned class the activations fall into two clusters.

Chen et al., "Detecting Backdoor Attacks on Deep Neural Networks by Activation Clustering", SafeAI at AAAI 2019
(arXiv 1811.03728).

The penultimate features of all samples that carry one label are centred, reduced to 10 dimensions and split by 2-means.
Whether a class is poisoned, and by which cluster, is decided by a ``rule``:

- ``silhouette`` (default): the smaller cluster holds less than ``max_share`` of the class and the mean silhouette is at
  least ``min_silhouette``;
- ``relative-size``: the first half of that rule;
- ``smaller``: the smaller cluster of every class. It deletes a part of every clean class and is here for comparison;
- ``reclassify``: exclusionary re-classification, the paper's own test. A fresh model is trained without the smaller
  clusters of all classes and classifies them. Of a cluster of the class k, let l samples be classified as k and p as
  the other class that is named most often; it is poison if l / p < ``ratio``. Poison, unlike a rare kind of k, goes
  back to where it came from. Needs the blueprint and costs a training.

The score of a sample in a poisoned class is (distance to the large cluster's centre) - (distance to the small one's),
in the reduced space; it is positive exactly for the members of the small cluster. In the other classes it is 0.

Choices: a class is clustered once, as a whole (clustering mini-batches gives clusters whose numbers mean nothing across
batches). ``reclassify`` removes the smaller clusters of all classes at once, where the paper looks at one cluster after
the other, which costs a training each; poison that its cluster misses stays in that training and keeps the backdoor
alive, so that the rule needs clean clusters. Rows are sorted along the first component beforehand, so that the outcome
does not depend on the order of the data set. Classes with fewer than ``min_samples`` samples are skipped. FastICA, the
paper's reduction, is an option; where it does not converge PCA's components are used, which span the same space
unwhitened.

Limits: the poison must be the *minority* of its class. 10 % poison in ten balanced classes makes it about one half, and
no rule on sizes can then tell which cluster is the poison. ``reclassify`` judges the smaller one, whatever its size.
The paper's silhouette of 0.15 is lenient on small networks, where clean classes reach it too; ``min_silhouette`` raises
it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA, FastICA
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import silhouette_score
from torch import Tensor

from backdoorlab.core.errors import InputError
from backdoorlab.core.method import param
from backdoorlab.core.seeding import spawn
from backdoorlab.data.split import take
from backdoorlab.defenses.base import DatasetDefense, defenses
from backdoorlab.defenses.view import DefenderView
from backdoorlab.training.context import Context
from backdoorlab.training.evaluate import predict, predict_features

SILHOUETTE_SAMPLES = 5000
"""Silhouettes cost time quadratic in the class size; larger classes are judged by a sample of so many."""


@dataclass(frozen=True, eq=False)
class TwoClusters:
    """2-means of one class.

    Attributes:
        margin: float64 [N], distance to the large cluster's centre minus distance to the small one's; positive for
            members of the small cluster.
        share: of the small cluster.
        silhouette: mean over the class.
    """

    margin: Tensor
    share: float
    silhouette: float


def reduce_features(features: np.ndarray, dims: int, method: str, seed: int) -> np.ndarray:
    """Centre and reduce float [N, D] to float [N, min(dims, D, N)] by "pca" or "ica"."""
    dims = min(dims, *features.shape)
    pca: np.ndarray = PCA(dims, svd_solver="full").fit_transform(features)
    if method == "pca":
        return pca
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        ica: np.ndarray = FastICA(dims, whiten="unit-variance", max_iter=1000, random_state=seed).fit_transform(
            features
        )
    return pca if any(issubclass(w.category, ConvergenceWarning) for w in caught) else ica


def two_clusters(features: Tensor, dims: int, method: str, seed: int) -> TwoClusters | None:
    """Reduce the features float [N, D] of one class and split them in two; None if they are all equal."""
    if bool((features == features[0]).all()):
        return None
    points = reduce_features(features.double().numpy(), dims, method, seed)
    order = np.argsort(points[:, 0], kind="stable")
    points = points[order]
    means = KMeans(2, n_init=10, random_state=seed).fit(points)
    small = int(np.bincount(means.labels_, minlength=2).argmin())
    distances = means.transform(points)
    margin = torch.empty(len(points), dtype=torch.float64)
    margin[torch.from_numpy(order)] = torch.from_numpy(distances[:, 1 - small] - distances[:, small])
    size = SILHOUETTE_SAMPLES if len(points) > SILHOUETTE_SAMPLES else None
    silhouette = silhouette_score(points, means.labels_, sample_size=size, random_state=seed)
    return TwoClusters(margin, float((means.labels_ == small).mean()), float(silhouette))


def own_over_other(predicted: Tensor, own: int) -> float:
    """How many are predicted (int64 [N]) as the class ``own``, over the most frequent other class; inf without one."""
    counts = torch.bincount(predicted)
    others = [int(count) for k, count in enumerate(counts) if k != own]
    most = max(others, default=0)
    mine = int(counts[own]) if own < len(counts) else 0
    return mine / most if most else float("inf")


@defenses.register
@dataclass(frozen=True, kw_only=True)
class ActivationClustering(DatasetDefense):
    """2-means in the activations of each class."""

    name: ClassVar[str] = "ac"
    paper: ClassVar[str] = "Chen et al., Activation Clustering, SafeAI@AAAI 2019, arXiv 1811.03728"
    year: ClassVar[int] = 2019
    modalities: ClassVar[tuple[str, ...]] = ("image", "text", "audio", "video")
    may_read: ClassVar[tuple[str, ...]] = ("blueprint",)

    rule: str = param(
        "silhouette",
        "which classes are poisoned",
        choices=("silhouette", "relative-size", "smaller", "reclassify"),
        source="paper",
    )
    dims: int = param(10, "dimensions that the features are reduced to", low=1, source="paper")
    reduction: str = param("pca", "how they are reduced", choices=("pca", "ica"), source="ours")
    max_share: float = param(
        0.35, "a poison cluster is smaller than this share of its class", above=0, high=0.5, source="BackdoorBench"
    )
    min_silhouette: float = param(
        0.15, "two clusters are real from this mean silhouette on", low=-1, high=1, source="paper"
    )
    ratio: float = param(
        1.0, "rule reclassify: least l / p of a cluster that is no poison", above=0, high=100, source="paper"
    )
    min_samples: int = param(20, "smaller classes are not judged", low=3, source="ours")

    def score(self, view: DefenderView, ctx: Context) -> Tensor:
        """Margin toward the small cluster in poisoned classes, 0 elsewhere.

        Raises:
            InputError: if the rule is ``reclassify`` and there is no blueprint.
        """
        data = view.suspicious
        if self.rule == "reclassify" and not view.has("blueprint"):
            raise InputError("ac: rule=reclassify trains a model and needs the blueprint of the task; it was not given")
        features, scores = predict_features(view.model, data.inputs), torch.zeros(len(data))
        seed = spawn(ctx.generator("ac")) % 2**31
        clusters: dict[int, tuple[Tensor, TwoClusters]] = {}
        for k in ctx.track(range(data.num_classes), "ac: clustering classes", data.num_classes):
            rows = (data.labels.cpu() == k).nonzero().flatten()
            if len(rows) < self.min_samples:
                continue
            found = two_clusters(features[rows], self.dims, self.reduction, seed)
            if found is not None:
                clusters[k] = rows, found
        judged = self.reclassified(clusters, view, ctx) if self.rule == "reclassify" else set(clusters)
        for k, (rows, found) in clusters.items():
            if k in judged and (self.rule == "reclassify" or self.poisoned(found)):
                scores[rows] = found.margin.float()
        return scores

    def reclassified(
        self, clusters: dict[int, tuple[Tensor, TwoClusters]], view: DefenderView, ctx: Context
    ) -> set[int]:
        """Classes whose small cluster a model that was trained without the small clusters takes for another class."""
        data = view.suspicious
        out = {k: rows[found.margin > 0] for k, (rows, found) in clusters.items()}
        kept = torch.ones(len(data), dtype=torch.bool)
        for rows in out.values():
            kept[rows] = False
        if not out or not bool(kept.any()):
            return set()
        model, _ = view.blueprint.fit(data[kept], ctx.child("ac", "reclassify"), label="ac: training without clusters")
        return {
            k
            for k, rows in out.items()
            if len(rows) and own_over_other(predict(model, take(data.inputs, rows)).argmax(1), k) < self.ratio
        }

    def poisoned(self, found: TwoClusters) -> bool:
        """Does the rule take the small cluster of a class for poison?"""
        if self.rule == "smaller":
            return True
        small = found.share < self.max_share
        return small if self.rule == "relative-size" else small and found.silhouette >= self.min_silhouette

    def flags(self, scores: Tensor, view: DefenderView) -> Tensor:
        """Members of the small clusters of poisoned classes."""
        return scores > 0
