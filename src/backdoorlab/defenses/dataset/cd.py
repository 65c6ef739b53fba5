"""CD, cognitive distillation: of a triggered sample a small part suffices for the model's output.

Huang, Ma, Erfani, Bailey, "Distilling Cognitive Backdoor Patterns within an Image", ICLR 2023 (arXiv 2301.10908).

For every sample x a mask m in [0, 1], shared by the channels, is optimised:

    min_m  |f(x) - f(x m + (1 - m) r)|_1  +  alpha |m|_1  +  beta TV(m)

f gives the logits (mean over the classes) or the features, r is a random color that changes in every step, TV the mean
squared difference of neighbours, and m = (tanh u + 1) / 2. The model recognises a trigger by few pixels, so that a
*small* |m|_1 is suspicious. The threshold comes from masks of clean samples. The score is

    (threshold - |m|_1) / standard deviation of clean |m|_1

so that what is above 0 is flagged.

Choices and deviations
- ``rule="quantile"`` (default): a share ``frr`` of the clean samples lies below the threshold. ``rule="gamma"`` is the
  paper's: mean - gamma standard deviations, which rejects a sixth of normally distributed clean samples at gamma = 1.
- The paper's alpha is 0.01 at 32 px and 0.001 at 224 px. |m|_1 grows with the number of pixels; alpha shrinks with its
  root here, which agrees with both.
- All samples see the same colors, so that a score does not depend on the batch.
- Videos: one mask for all frames.

Limits: triggers that cover the whole image (blended, warped, sinusoidal) need large masks. Costs 100 forward and
backward passes a sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from backdoorlab.core.method import param
from backdoorlab.defenses.base import DatasetDefense, defenses
from backdoorlab.defenses.common.calibration import clean_quantile
from backdoorlab.defenses.common.classes import need_samples
from backdoorlab.defenses.common.distillation import Distillation
from backdoorlab.defenses.view import DefenderView
from backdoorlab.training.context import Context


@defenses.register
@dataclass(frozen=True, kw_only=True)
class CognitiveDistillation(Distillation, DatasetDefense):
    """Size of the smallest mask that keeps the output."""

    name: ClassVar[str] = "cd"
    paper: ClassVar[str] = "Huang et al., Cognitive Distillation, ICLR 2023, arXiv 2301.10908"
    year: ClassVar[int] = 2023
    modalities: ClassVar[tuple[str, ...]] = ("image", "video")
    reads: ClassVar[tuple[str, ...]] = ("model", "suspicious", "clean")
    needs_clean_fraction: ClassVar[float] = 0.05

    rule: str = param("quantile", "where clean masks end", choices=("quantile", "gamma"), source="ours")
    frr: float = param(0.05, "share of clean samples that may be flagged", above=0, high=0.5, source="ours")
    gamma: float = param(1.0, "rule gamma: standard deviations below the clean mean", low=0, source="paper")

    def score(self, view: DefenderView, ctx: Context) -> Tensor:
        """(threshold - |m|_1) / standard deviation of clean |m|_1."""
        need_samples(self.name, "suspicious", view.suspicious)
        need_samples(self.name, "clean", view.clean, 2)
        size, clean_size = (
            self.masks(view.model, part.inputs, ctx, "cd: distilling masks").double().flatten(1).sum(1)
            for part in (view.suspicious, view.clean)
        )
        return self.margin(size, clean_size).float()

    def margin(self, size: Tensor, clean_size: Tensor) -> Tensor:
        """How far mask sizes float64 [N] lie below those of clean samples, in their standard deviations."""
        spread = float(clean_size.std(correction=0))
        if self.rule == "quantile":
            threshold = -clean_quantile(-clean_size, self.frr)
        else:
            threshold = float(clean_size.mean()) - self.gamma * spread
        return (threshold - size) / max(spread, 1e-6)

    def flags(self, scores: Tensor, view: DefenderView) -> Tensor:
        """Masks smaller than the threshold."""
        return scores > 0
