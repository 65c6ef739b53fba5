"""FT: fine-tune the whole model on the defender's clean samples.

The plain baseline of the field; protocol of Wu et al., "BackdoorBench", NeurIPS 2022 Datasets and Benchmarks.
Normalisation layers stay in training mode and adapt to clean statistics. A higher learning rate removes more at the
price of clean accuracy.

Deviation: models that are trained by AdamW (text, audio, video) are fine-tuned by AdamW at ``lr`` / 10, as SGD's
rates do not suit them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

from backdoorlab.core.method import param
from backdoorlab.defenses.base import RepairDefense, defenses
from backdoorlab.defenses.view import DefenderView
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.context import Context
from backdoorlab.training.loop import fit
from backdoorlab.training.recipes import Recipe


@defenses.register
@dataclass(frozen=True, kw_only=True)
class FineTuning(RepairDefense):
    """Fine-tuning on clean samples."""

    name: ClassVar[str] = "ft"
    paper: ClassVar[str] = "baseline as in Wu et al., BackdoorBench, NeurIPS 2022, arXiv 2206.12654"
    year: ClassVar[int] = 2022
    modalities: ClassVar[tuple[str, ...]] = ("image", "text", "audio", "video")

    epochs: int = param(100, "passes over the clean samples", low=1, source="BackdoorBench")
    lr: float = param(0.01, "peak learning rate of SGD (AdamW: a tenth)", above=0, source="BackdoorBench")
    batch_size: int = param(256, "samples per step", low=1, source="BackdoorBench")
    weight_decay: float = param(5e-4, "L2 penalty", low=0, source="BackdoorBench")

    def run(self, view: DefenderView, ctx: Context) -> Classifier:
        """Fine-tune a copy by SGD with a cosine schedule (AdamW for modalities trained by it)."""
        repaired = copy.deepcopy(view.model)
        adam = repaired.modality.name != "image"
        recipe = Recipe(
            epochs=self.epochs,
            batch_size=self.batch_size,
            optimizer="adamw" if adam else "sgd",
            lr=self.lr / 10 if adam else self.lr,
            weight_decay=self.weight_decay,
        )
        fit(repaired, view.clean, recipe, context=ctx, label="ft: fine-tuning")
        return repaired
