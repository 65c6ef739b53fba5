"""CD for single inputs: of a triggered image a small part suffices for the model's output.

Huang, Ma, Erfani, Bailey, "Distilling Cognitive Backdoor Patterns within an Image", ICLR 2023 (arXiv 2301.10908).

The mask that is optimised for each input, and how, is described in :mod:`backdoorlab.defenses.dataset.cd`, which
filters training sets by it; here inputs are judged at inference. The score is -|m|_1: a *small* mask is suspicious.

The threshold comes from the masks of clean samples: the ``frr`` quantile by default, ``rule="gamma"`` is the paper's
mean - gamma standard deviations, which rejects a sixth of normally distributed clean samples at gamma = 1.

Limits: triggers that cover the whole image (blended, warped, sinusoidal) need large masks. Costs 100 forward and
backward passes an input.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backdoorlab.core.method import param
from backdoorlab.data.split import Inputs
from backdoorlab.defenses.base import InputDefense, InputDetector, defenses
from backdoorlab.defenses.common.calibration import clean_quantile
from backdoorlab.defenses.common.classes import need_samples
from backdoorlab.defenses.common.distillation import Distillation
from backdoorlab.defenses.view import DefenderView
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.context import Context


@dataclass(frozen=True, eq=False)
class DistillationDetector(InputDetector):
    """Scores inputs by how little of them keeps the output."""

    model: Classifier
    method: Distillation
    ctx: Context
    threshold: float = float("inf")

    def score(self, inputs: Inputs) -> Tensor:
        """-|m|_1 of raw inputs: float32 [N] on the CPU."""
        if not len(inputs):
            return torch.zeros(0)
        masks = self.method.masks(self.model, inputs, self.ctx, "cd_input: distilling masks")
        return -masks.flatten(1).sum(1)


@defenses.register
@dataclass(frozen=True, kw_only=True)
class CognitiveDistillationInput(Distillation, InputDefense):
    """Size of the smallest mask that keeps the output, input by input."""

    name: ClassVar[str] = "cd_input"
    paper: ClassVar[str] = "Huang et al., Cognitive Distillation, ICLR 2023, arXiv 2301.10908"
    year: ClassVar[int] = 2023
    modalities: ClassVar[tuple[str, ...]] = ("image", "video")

    rule: str = param("quantile", "where clean masks end", choices=("quantile", "gamma"), source="ours")
    frr: float = param(0.05, "share of clean inputs that may be rejected", above=0, high=0.5, source="ours")
    gamma: float = param(1.0, "rule gamma: standard deviations below the clean mean", low=0, source="paper")

    def run(self, view: DefenderView, ctx: Context) -> DistillationDetector:
        """Distil the masks of the clean samples and set the threshold on their sizes.

        Raises:
            InputError: if there are fewer than two clean samples.
        """
        need_samples(self.name, "clean", view.clean, 2)
        detector = DistillationDetector(view.model, self, ctx)
        scores = detector.score(view.clean.inputs).double()
        if self.rule == "quantile":
            return dataclasses.replace(detector, threshold=clean_quantile(scores, self.frr))
        return dataclasses.replace(detector, threshold=float(scores.mean() + self.gamma * scores.std(correction=0)))
