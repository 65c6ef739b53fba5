"""ABL's isolation as a filter: what is learned too fast is suspicious.

Li, Lyu, Koren, Lyu, Li, Ma, "Anti-Backdoor Learning: Training Clean Models on Poisoned Data", NeurIPS 2021
(arXiv 2110.11571); the isolation phase is that of :mod:`backdoorlab.defenses.training.abl`.

A fresh model is trained on the suspicious set for a share of the recipe, with the gradient going up wherever the loss
falls below ``gamma``. Poisoned samples still reach the lowest losses. The score is minus the loss, the mean over the
later half of these epochs; the share ``isolation`` of lowest losses is flagged.

Deviations: none in the ranking. ``isolation`` is the paper's 1 %, which isolates samples to unlearn; a filter that is
to remove *all* poison needs it as high as the poison rate, which a defender does not know. Some code sets it to the
true rate.

Limits: the flags are a fixed share of the set, in benign data too. Attacks that are learned slowly (clean label, low
rates) are not ranked first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from backdoorlab.core.method import param
from backdoorlab.defenses.base import DatasetDefense, defenses, no_flags
from backdoorlab.defenses.common.classes import need_samples
from backdoorlab.defenses.training.abl import AntiBackdoorLearning
from backdoorlab.defenses.view import DefenderView
from backdoorlab.training.context import Context


@defenses.register
@dataclass(frozen=True, kw_only=True)
class AblRank(DatasetDefense):
    """Rank of the losses after a short training with local gradient ascent."""

    name: ClassVar[str] = "abl_rank"
    paper: ClassVar[str] = "Li et al., Anti-Backdoor Learning, NeurIPS 2021, arXiv 2110.11571"
    year: ClassVar[int] = 2021
    modalities: ClassVar[tuple[str, ...]] = ("image", "text", "audio", "video")
    reads: ClassVar[tuple[str, ...]] = ("suspicious", "blueprint")

    isolation: float = param(0.01, "share of the training set that is flagged", above=0, high=0.5, source="paper")
    local_loss: str = param("lga", "loss of the isolation phase", choices=("lga", "flooding"), source="paper")
    gamma: float = param(0.5, "loss below which the training ascends", low=0, source="paper")
    turning: float = param(0.2, "length of the training / recipe", above=0, high=1, source="paper")

    def score(self, view: DefenderView, ctx: Context) -> Tensor:
        """Minus the loss."""
        need_samples(self.name, "suspicious", view.suspicious)
        method = AntiBackdoorLearning(local_loss=self.local_loss, gamma=self.gamma, turning=self.turning)
        _, losses = method.isolate(view.suspicious, view.blueprint, ctx)
        return -losses.float()

    def flags(self, scores: Tensor, view: DefenderView) -> Tensor:
        """The share of lowest losses, at least one sample."""
        flagged = no_flags(len(scores))
        flagged[scores.topk(max(1, int(self.isolation * len(scores))) if len(scores) else 0).indices] = True
        return flagged
