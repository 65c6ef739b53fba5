"""STRIP as a filter of training sets: samples whose label survives any overlay.

Gao, Xu, Wang, Chen, Ranasinghe, Nepal, "STRIP: A Defence Against Trojan Attacks on Deep Neural Networks", ACSAC 2019
(arXiv 1902.06531); the entropy is that of :mod:`backdoorlab.defenses.input.strip`.

Deviation: whoever filters a training set has no clean samples, so overlays are drawn from the suspicious set itself. A
share of them carries the trigger too, which lowers the entropy of all samples alike and leaves the ranking intact. The
paper models clean entropies as normal and rejects below their ``frr`` quantile; here mean and standard deviation are
estimated robustly, by median and 1.4826 times the median absolute deviation, since the poison is in the sample:

    flag if  -H > median(-H) + z_(1 - frr) 1.4826 MAD(-H)
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar

import torch
from torch import Tensor

from backdoorlab.core.method import param
from backdoorlab.data.split import take
from backdoorlab.defenses.base import DatasetDefense, defenses
from backdoorlab.defenses.input.strip import Overlay, overlay_entropy
from backdoorlab.defenses.view import DefenderView
from backdoorlab.training.context import Context


@defenses.register
@dataclass(frozen=True, kw_only=True)
class StripDataset(DatasetDefense):
    """Entropy of predictions under superimposed training samples."""

    name: ClassVar[str] = "strip_dataset"
    paper: ClassVar[str] = "Gao et al., STRIP, ACSAC 2019, arXiv 1902.06531"
    year: ClassVar[int] = 2019
    modalities: ClassVar[tuple[str, ...]] = ("image", "text", "audio", "video")

    overlays: int = param(20, "overlays per sample; the paper's 100 are costly on a whole training set", low=1)
    superimpose: str = param(
        "add",
        "saturating sum, or the modality's blend (text: always)",
        choices=("add", "blend"),
        source="authors' code",
    )
    weight: float = param(1.0, "weight of the overlay in the sum", above=0, high=10, source="authors' code")
    ratio: float = param(0.5, "share of the overlay in the blend", above=0, high=1, source="ours")
    frr: float = param(0.05, "share of clean samples that may be flagged", above=0, high=0.5, source="BackdoorBench")

    def score(self, view: DefenderView, ctx: Context) -> Tensor:
        """-H of every sample."""
        data = view.suspicious
        drawn = torch.randperm(len(data), generator=ctx.generator("overlays"))[: self.overlays]
        overlay = Overlay(self.superimpose, self.weight, self.ratio)
        return -overlay_entropy(view.model, data.inputs, take(data.inputs, drawn), overlay, ctx.generator("blend"))

    def flags(self, scores: Tensor, view: DefenderView) -> Tensor:
        """Scores above the (1 - frr) quantile of a normal distribution fitted to the bulk."""
        centre = scores.median()
        spread = 1.4826 * (scores - centre).abs().median()
        return scores > centre + NormalDist().inv_cdf(1 - self.frr) * spread
