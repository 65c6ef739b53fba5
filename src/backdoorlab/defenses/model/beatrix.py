"""Beatrix as a scan of a model: which class, if any, was poisoned.

The analysis is that of :mod:`backdoorlab.defenses.dataset.beatrix`. It reads the suspicious training set too: the
evidence is the difference between the samples of a class whose Gram matrices deviate and the others. Score: the largest
anomaly index; evidence per class: J_k (0 for classes that are not judged). A class is suspected if its index exceeds
e^2 and its clean samples do not deviate in the same way.

Deviation: none beyond those described there. Among fewer than 5 judged classes there is no index; the score is then 1
minus the smallest chance with which the clean samples of a class would be divided as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from backdoorlab.defenses.base import ModelDefense, ScanReport, defenses
from backdoorlab.defenses.common.gram import GramAnalysis
from backdoorlab.defenses.view import DefenderView
from backdoorlab.training.context import Context


@defenses.register
@dataclass(frozen=True, kw_only=True)
class BeatrixModel(GramAnalysis, ModelDefense):
    """Whether the samples of a class differ by their Gram matrices."""

    name: ClassVar[str] = "beatrix_model"
    paper: ClassVar[str] = "Ma et al., The Beatrix Resurrections, NDSS 2023, arXiv 2209.11715"
    year: ClassVar[int] = 2023
    modalities: ClassVar[tuple[str, ...]] = ("image", "text", "audio", "video")
    reads: ClassVar[tuple[str, ...]] = ("model", "clean", "suspicious")
    needs_clean_fraction: ClassVar[float] = 0.05

    def run(self, view: DefenderView, ctx: Context) -> ScanReport:
        """The largest anomaly index, the suspected classes, and J_k of every class."""
        found = self.analyse(view.model, view.suspicious, view.clean, ctx)
        per_class = found.evidence.values.nan_to_num(0.0)
        return ScanReport(found.evidence.score, bool(found.targets), found.targets, tuple(per_class.tolist()))
