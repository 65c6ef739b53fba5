"""Spectral signatures: poisoned samples stand out along the top singular direction of their class.

Tran, Li, Madry, "Spectral Signatures in Backdoor Attacks", NeurIPS 2018 (arXiv 1811.00636).

For each (given) class with penultimate features h_1..h_n and mean m, let v be the top right singular vector of the
matrix with rows h_i - m. The score of a sample is

    s_i = <h_i - m, v>^2

and the 1.5 eps n samples of the class that score highest are removed, eps being an upper bound on the share of poison
in a class.

Choices: features are pooled and centred before *both* the decomposition and the projection (projecting uncentred
features onto the direction of centred ones measures the class mean). Scores are standardised within their class, so
that one ranking serves all classes; the order within a class, and with it the paper's decision, is not touched.
``percentile=85`` is BackdoorBench's rule.

Limits: the rule removes a fixed share of *every* class, so clean classes pay a false alarm rate of 1.5 eps. The
signature is that of a minority: where half of the target class is poison (10 % of a ten-class set), both halves lie
equally far from their common mean and the score says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backdoorlab.core.method import param
from backdoorlab.defenses.base import DatasetDefense, defenses, no_flags
from backdoorlab.defenses.view import DefenderView
from backdoorlab.training.context import Context
from backdoorlab.training.evaluate import predict_features

LARGEST_SHARE = 0.5
"""No rule removes more than this share of a class: beyond it the poison is what looks normal."""


def spectral_scores(features: Tensor) -> Tensor:
    """Squared projection of centred features on their top right singular vector.

    Args:
        features: float [N, D].

    Returns:
        float64 [N].
    """
    centred = features.double() - features.double().mean(0)
    top = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    return (centred @ top).square()


def standardise(scores: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1; zeros if all are equal."""
    spread = scores.std(correction=0)
    return (scores - scores.mean()) / spread if spread > 0 else torch.zeros_like(scores)


@defenses.register
@dataclass(frozen=True, kw_only=True)
class SpectralSignatures(DatasetDefense):
    """Outliers along the top singular direction of each class."""

    name: ClassVar[str] = "spectral"
    paper: ClassVar[str] = "Tran et al., Spectral Signatures in Backdoor Attacks, NeurIPS 2018, arXiv 1811.00636"
    year: ClassVar[int] = 2018
    modalities: ClassVar[tuple[str, ...]] = ("image", "text", "audio", "video")

    eps: float = param(0.1, "upper bound on the share of poison within a class", above=0, high=1, source="ours")
    excess: float = param(1.5, "samples removed per class, as a multiple of eps n", above=0, source="paper")
    percentile: float | None = param(
        None, "remove what scores above this percentile of its class instead (BackdoorBench: 85)", low=50, high=100
    )

    def score(self, view: DefenderView, ctx: Context) -> Tensor:
        """Spectral score, standardised within each class."""
        data = view.suspicious
        features, scores = predict_features(view.model, data.inputs), torch.zeros(len(data))
        for k in range(data.num_classes):
            rows = (data.labels.cpu() == k).nonzero().flatten()
            if len(rows) > 1:
                scores[rows] = standardise(spectral_scores(features[rows])).float()
        return scores

    def flags(self, scores: Tensor, view: DefenderView) -> Tensor:
        """The highest 1.5 eps n scores of every class (at most half of it)."""
        data = view.suspicious
        share = self.excess * self.eps if self.percentile is None else 1 - self.percentile / 100
        flagged = no_flags(len(data))
        for k in range(data.num_classes):
            rows = (data.labels.cpu() == k).nonzero().flatten()
            count = round(min(share, LARGEST_SHARE) * len(rows))
            flagged[rows[scores[rows].topk(count).indices]] = True
        return flagged
