"""SD: samples whose features change most when they are turned and shifted are suspicious.

The sample-distinguishing module of Chen, Wu, Wang, "Effective Backdoor Defense by Exploiting Sensitivity of Poisoned
Samples", NeurIPS 2022, as a filter; :mod:`~backdoorlab.defenses.common.sensitivity` tells what it does and where it
deviates. The score is the sensitivity D, the share ``suspected`` of highest D is flagged (of samples that are not
trusted, the lowest fifth of their class).

Limits: the flags are a fixed share of the set, in benign data too; a filter that is to remove all poison needs
``suspected`` as high as the poison rate. Costs 0.12 trainings of the recipe and ``transforms`` + 1 passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from backdoorlab.defenses.base import DatasetDefense, defenses
from backdoorlab.defenses.common.classes import need_samples
from backdoorlab.defenses.common.sensitivity import Distinguishing
from backdoorlab.defenses.view import DefenderView
from backdoorlab.training.context import Context


@defenses.register
@dataclass(frozen=True, kw_only=True)
class SampleDistinguishing(Distinguishing, DatasetDefense):
    """Change of features under random turns and shifts."""

    name: ClassVar[str] = "sd"
    paper: ClassVar[str] = "Chen et al., Effective Backdoor Defense by Exploiting Sensitivity, NeurIPS 2022"
    year: ClassVar[int] = 2022
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    reads: ClassVar[tuple[str, ...]] = ("suspicious", "blueprint")

    def score(self, view: DefenderView, ctx: Context) -> Tensor:
        """D of every sample."""
        need_samples(self.name, "suspicious", view.suspicious, 2)
        return self.distinguish(view.suspicious, view.blueprint, ctx, self.name)

    def flags(self, scores: Tensor, view: DefenderView) -> Tensor:
        """The share of highest D."""
        return self.divided(scores, view.suspicious.labels)[1]
