"""SCAn as a scan of a model: which class, if any, was poisoned.

The analysis is that of :mod:`backdoorlab.defenses.dataset.scan`. It reads the suspicious training set too: the evidence
is the two groups that the model makes of a class's samples. Score: the largest anomaly index J*_k; evidence per class:
the log-likelihood ratio J_k (0 for classes that are not judged). A class is suspected if its index exceeds e^2 and its
clean samples avoid the suspicious group.

Deviation: none beyond those described there. Among fewer than 5 judged classes there is no index; the score is then 1
minus the smallest chance with which the clean samples of a class would be divided as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from backdoorlab.defenses.base import ModelDefense, ScanReport, defenses
from backdoorlab.defenses.common.subgroups import SubgroupAnalysis
from backdoorlab.defenses.view import DefenderView
from backdoorlab.training.context import Context


@defenses.register
@dataclass(frozen=True, kw_only=True)
class ScanModel(SubgroupAnalysis, ModelDefense):
    """Whether two groups instead of one make up a class."""

    name: ClassVar[str] = "scan_model"
    paper: ClassVar[str] = "Tang et al., Demon in the Variant (SCAn), USENIX Security 2021, arXiv 1908.00686"
    year: ClassVar[int] = 2021
    modalities: ClassVar[tuple[str, ...]] = ("image", "text", "audio", "video")
    reads: ClassVar[tuple[str, ...]] = ("model", "clean", "suspicious")
    needs_clean_fraction: ClassVar[float] = 0.05

    def run(self, view: DefenderView, ctx: Context) -> ScanReport:
        """The largest anomaly index, the suspected classes, and J_k of every class."""
        found = self.analyse(view.model, view.suspicious, view.clean, ctx)
        per_class = found.evidence.values.nan_to_num(0.0)
        return ScanReport(found.evidence.score, bool(found.targets), found.targets, tuple(per_class.tolist()))
