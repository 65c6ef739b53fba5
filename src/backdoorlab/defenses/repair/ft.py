"""FT: fine-tune the whole model on the defender's clean samples.

The plain baseline of the field; protocol of Wu et al., "BackdoorBench", NeurIPS 2022 Datasets and Benchmarks.
Normalisation layers stay in training mode and adapt to clean statistics. A higher learning rate removes more at the
price of clean accuracy.

Optimiser and rate are those by which the model was trained, where the defender knows them, as in the benchmark, which
trains and fine-tunes at 0.01; :mod:`~backdoorlab.defenses.common.finetuning` says why, and what happens elsewhere.

Limits: a trigger that covers the image (Blended) mostly survives fine-tuning at 0.01 in the benchmark.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

from backdoorlab.defenses.base import defenses
from backdoorlab.defenses.common.finetuning import FineTunes
from backdoorlab.defenses.view import DefenderView
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.context import Context
from backdoorlab.training.loop import fit


@defenses.register
@dataclass(frozen=True, kw_only=True)
class FineTuning(FineTunes):
    """Fine-tuning on clean samples."""

    name: ClassVar[str] = "ft"
    paper: ClassVar[str] = "baseline as in Wu et al., BackdoorBench, NeurIPS 2022, arXiv 2206.12654"
    year: ClassVar[int] = 2022
    modalities: ClassVar[tuple[str, ...]] = ("image", "text", "audio", "video")

    def run(self, view: DefenderView, ctx: Context) -> Classifier:
        """Fine-tune a copy with a cosine schedule."""
        repaired = copy.deepcopy(view.model)
        fit(repaired, view.clean, self.recipe(view), context=ctx, label="ft: fine-tuning")
        return repaired
