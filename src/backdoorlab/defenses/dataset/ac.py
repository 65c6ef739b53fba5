"""AC, activation clustering: in a poisoned class the activations fall into two clusters.

Chen et al., "Detecting Backdoor Attacks on Deep Neural Networks by Activation Clustering", SafeAI at AAAI 2019
(arXiv 1811.03728).

The penultimate features of all samples that carry one label are centred, reduced to 10 dimensions and split by 2-means.
Whether a class is poisoned, and by which cluster, is decided by a ``rule``:

- ``silhouette`` (default): the smaller cluster holds less than ``max_share`` of the class and the mean silhouette is at
  least ``min_silhouette``;
- ``relative-size``: the first half of that rule;
- ``smaller``: the smaller cluster of every class. It deletes a part of every clean class and is here for comparison.

The score of a sample in a poisoned class is (distance to the large cluster's centre) - (distance to the small one's),
in the reduced space; it is positive exactly for the members of the small cluster. In the other classes it is 0.

Choices: a class is clustered once, as a whole (clustering mini-batches gives clusters whose numbers mean nothing across
batches). Rows are sorted along the first component beforehand, so that the outcome does not depend on the order of the
data set. Classes with fewer than ``min_samples`` samples are skipped. FastICA, the paper's reduction, is an option;
where it does not converge PCA's components are used, which span the same space unwhitened.

Limits: the poison must be the *minority* of its class. 10 % poison in ten balanced classes makes it about one half, and
no rule on sizes can then tell which cluster is the poison (the paper retrains without the cluster to find out). The
paper's silhouette of 0.15 is lenient on small networks, where clean classes reach it too; ``min_silhouette`` raises it.
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

from backdoorlab.core.method import param
from backdoorlab.core.seeding import spawn
from backdoorlab.defenses.base import DatasetDefense, defenses
from backdoorlab.defenses.view import DefenderView
from backdoorlab.training.context import Context
from backdoorlab.training.evaluate import predict_features

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


@defenses.register
@dataclass(frozen=True, kw_only=True)
class ActivationClustering(DatasetDefense):
    """2-means in the activations of each class."""

    name: ClassVar[str] = "ac"
    paper: ClassVar[str] = "Chen et al., Activation Clustering, SafeAI@AAAI 2019, arXiv 1811.03728"
    year: ClassVar[int] = 2019
    modalities: ClassVar[tuple[str, ...]] = ("image", "text", "audio", "video")

    rule: str = param(
        "silhouette", "which classes are poisoned", choices=("silhouette", "relative-size", "smaller"), source="paper"
    )
    dims: int = param(10, "dimensions that the features are reduced to", low=1, source="paper")
    reduction: str = param("pca", "how they are reduced", choices=("pca", "ica"), source="ours")
    max_share: float = param(
        0.35, "a poison cluster is smaller than this share of its class", above=0, high=0.5, source="BackdoorBench"
    )
    min_silhouette: float = param(
        0.15, "two clusters are real from this mean silhouette on", low=-1, high=1, source="paper"
    )
    min_samples: int = param(20, "smaller classes are not judged", low=3, source="ours")

    def score(self, view: DefenderView, ctx: Context) -> Tensor:
        """Margin toward the small cluster in poisoned classes, 0 elsewhere."""
        data = view.suspicious
        features, scores = predict_features(view.model, data.inputs), torch.zeros(len(data))
        seed = spawn(ctx.generator("ac")) % 2**31
        for k in ctx.track(range(data.num_classes), "ac: clustering classes", data.num_classes):
            rows = (data.labels.cpu() == k).nonzero().flatten()
            if len(rows) < self.min_samples:
                continue
            found = two_clusters(features[rows], self.dims, self.reduction, seed)
            if found is not None and self.poisoned(found):
                scores[rows] = found.margin.float()
        return scores

    def poisoned(self, found: TwoClusters) -> bool:
        """Does the rule take the small cluster of a class for poison?"""
        if self.rule == "smaller":
            return True
        small = found.share < self.max_share
        return small if self.rule == "relative-size" else small and found.silhouette >= self.min_silhouette

    def flags(self, scores: Tensor, view: DefenderView) -> Tensor:
        """Members of the small clusters of poisoned classes."""
        return scores > 0
