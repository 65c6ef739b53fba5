"""Beatrix: the correlations of features inside a poisoned sample are not those of its class.

Ma, Wang, Sun, Gong, Xue, Zhang, Shi, "The 'Beatrix' Resurrections: Robust Backdoor Detection via Gram Matrices", NDSS
2023 (arXiv 2209.11715).

Of the feature map F [C, M] that the last stage of convolutions receives, with all powers element by element,

    G^p = (F^p F^pT)^(1/p),     p = 1..8     (the root keeps the sign; upper triangle)

Clean samples of a class give a median and a median absolute deviation of every entry, and so the bounds median -+ 10
MAD. The deviation of a sample is how far its entries lie outside, relative to the bound, on average over all of them.
The clean samples, held out in 5 folds, give the threshold that a share ``frr`` of them exceeds.

Which classes are attacked: the squared maximum mean discrepancy between the features of the n samples of a class that
deviate and the m that do not, times n m / (n + m), gives J_k, and

    (J_k - median) / (1.4826 MAD(J)) > e^2

The score of a sample is its deviation over the threshold of its class, less 1; classes that are not suspected follow
below in an order of their own. Flagged is what is above 0.

Choices and deviations
- The power of F is part of the published method, though some code lacks it; without it all orders say the same.
- Only suspected classes are filtered. Flagging what deviates in all classes costs ``frr`` of the clean data.
- A class is suspected only if few of its own held-out clean samples deviate, beside its others (Fisher's exact test,
  ``level``), or none of them. ``level=1`` is the paper's rule. Only classes above the median are suspected.
- A class with fewer than 1 / ``frr`` clean samples has no quantile of its own; all classes together give it one.
- The discrepancy compares penultimate features (a sum of two Gaussian kernels, median width), at most 500 a group.
- Where most classes have no sample that deviates, the spread of J is taken as 1, the size of J by chance.
- Networks without convolutions are read by the tokens of their last layer as positions, and without tokens by the
  feature vector as a map with one position.
- Fewer than 5 judged classes give no index; the clean samples then decide alone.

Limits: classes with fewer than three clean samples are not judged, and about 30 are needed for bounds that hold. Memory
grows with C^2; ``layer`` names another map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from backdoorlab.defenses.base import DatasetDefense, defenses
from backdoorlab.defenses.common.classes import gated
from backdoorlab.defenses.common.gram import GramAnalysis
from backdoorlab.defenses.view import DefenderView
from backdoorlab.training.context import Context


@defenses.register
@dataclass(frozen=True, kw_only=True)
class Beatrix(GramAnalysis, DatasetDefense):
    """Deviation of Gram matrices from those of the clean samples of a class."""

    name: ClassVar[str] = "beatrix"
    paper: ClassVar[str] = "Ma et al., The Beatrix Resurrections, NDSS 2023, arXiv 2209.11715"
    year: ClassVar[int] = 2023
    modalities: ClassVar[tuple[str, ...]] = ("image", "text", "audio", "video")
    reads: ClassVar[tuple[str, ...]] = ("model", "suspicious", "clean")
    needs_clean_fraction: ClassVar[float] = 0.05

    def score(self, view: DefenderView, ctx: Context) -> Tensor:
        """Deviation over the threshold of the class, less 1; classes without suspicion lie below."""
        found = self.analyse(view.model, view.suspicious, view.clean, ctx)
        return gated(found.ratios - 1, view.suspicious.labels, found.targets)

    def flags(self, scores: Tensor, view: DefenderView) -> Tensor:
        """What deviates in suspected classes."""
        return scores > 0
