"""SCAn, statistical contamination analyser: the samples of a poisoned class are two groups, not one.

Tang, Wang, Tang, Zhang, "Demon in the Variant: Statistical Analysis of DNNs for Robust Backdoor Contamination
Detection", USENIX Security 2021 (arXiv 1908.00686).

Penultimate features are modelled as r = mean + u_k + e: a mean of the class, u ~ N(0, S_u), and a variation e ~
N(0, S_e) that all classes share. Both covariances are found by expectation maximisation on clean samples. Then every
class of the suspicious set, with the clean samples of that class added, is divided in two groups that both vary by S_e;
J_k is the log-likelihood ratio per sample between two groups and one. With the median over classes,

    J*_k = (J_k - median) / (1.4826 MAD(J)),       class k is suspected if J*_k > e^2

and the group with the smaller share of the clean samples is the poison. The score is the log-likelihood of that group
minus the other's, l = (|r - c_0|^2 - |r - c_1|^2) / 2 in the metric of S_e, and positive in that group; classes
that are not suspected follow below in an order of their own. Flagged is what is above 0.

Choices and deviations
- Features are reduced to ``dims`` principal components of the suspicious set (not of the clean one, in which the
  direction of a trigger may not occur) and S_e is shrunk as Ledoit and Wolf do: S_e of 512 features cannot be had of
  100 clean samples, and its pseudo-inverse, which published code takes, ignores all directions that they do not span.
- Groups are found by 2-means in the whitened space, best of ``restarts``: the maximum of the likelihood, which the
  paper's iteration also climbs. Published code starts once from a random division.
- EM counts the uncertainty of the class means too, so that the likelihood rises in every round.
- Only classes *above* the median are suspected: a class that is one group to an unusual degree is no evidence.
- A class is suspected only if its clean samples avoid the suspicious group more than chance has it (Fisher's exact
  test, ``level``), or altogether. On natural data some class often has two groups (two ways to write a 7) and an index
  above e^2; its clean samples then lie in both. ``level=1`` is the paper's rule. A group of the share p needs about
  3 / p clean samples of the class for a judgement; a class without clean samples is not suspected.
- Fewer than 5 judged classes give no index; then the clean samples decide alone.

Limits: a class that is nearly all poison, or whose poison shares the features of the class (clean label, adaptive
attacks), is one group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from backdoorlab.defenses.base import DatasetDefense, defenses
from backdoorlab.defenses.common.classes import gated
from backdoorlab.defenses.common.subgroups import SubgroupAnalysis
from backdoorlab.defenses.view import DefenderView
from backdoorlab.training.context import Context


@defenses.register
@dataclass(frozen=True, kw_only=True)
class Scan(SubgroupAnalysis, DatasetDefense):
    """Two groups instead of one in the features of a class."""

    name: ClassVar[str] = "scan"
    paper: ClassVar[str] = "Tang et al., Demon in the Variant (SCAn), USENIX Security 2021, arXiv 1908.00686"
    year: ClassVar[int] = 2021
    modalities: ClassVar[tuple[str, ...]] = ("image", "text", "audio", "video")
    reads: ClassVar[tuple[str, ...]] = ("model", "suspicious", "clean")
    needs_clean_fraction: ClassVar[float] = 0.05

    def score(self, view: DefenderView, ctx: Context) -> Tensor:
        """Log-likelihood of the suspicious group minus that of the other; classes without suspicion lie below."""
        found = self.analyse(view.model, view.suspicious, view.clean, ctx)
        return gated(found.margins, view.suspicious.labels, found.targets)

    def flags(self, scores: Tensor, view: DefenderView) -> Tensor:
        """Members of the suspicious groups of suspected classes."""
        return scores > 0
