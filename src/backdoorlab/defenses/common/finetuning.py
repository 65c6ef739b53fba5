"""The recipe by which repairs fine-tune: one rule for all methods that train a model on the defender's clean samples.

How far the weights move decides whether a backdoor stays, and the learning rate decides how far they move. The
benchmark of the field (Wu et al., "BackdoorBench", NeurIPS 2022) fine-tunes at the very rate at which it trains its
victims, SGD at 0.01; 0.01 for a model that was trained at 0.2 is a much gentler treatment. So where the defender knows
how the model was trained (a blueprint), fine-tuning takes optimiser, peak rate, momentum and clipping from there.
Elsewhere it is SGD at 0.01 for images, and AdamW at 0.001 for what is trained by AdamW here (text, audio, video).

Few samples are cut into several batches: one batch of 50 samples would make an epoch one step, a hundred epochs a
hundred.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from backdoorlab.core.method import param
from backdoorlab.defenses.base import RepairDefense
from backdoorlab.defenses.view import DefenderView
from backdoorlab.training.recipes import Recipe

LEAST = 16
"""Samples that a batch norm needs for its statistics."""
PARTS = 8
"""Batches that few samples are cut into."""


def batch_for(batch_size: int, samples: int) -> int:
    """Samples per batch: ``batch_size``, but at most an eighth of the samples (16 if that is less than 16)."""
    return min(batch_size, max(LEAST, samples // PARTS))


def finetuning_recipe(
    view: DefenderView, *, epochs: int, lr: float | None, batch_size: int, weight_decay: float
) -> Recipe:
    """How the view's model is fine-tuned on its clean samples.

    Args:
        view: with model and clean samples; its blueprint counts if it is there and may be read.
        epochs: passes over the clean samples, with a cosine schedule.
        lr: peak rate of SGD (AdamW: a tenth of it); None takes that of the model's own training.
        batch_size: samples per step at most.
        weight_decay: L2 (SGD) or decoupled (AdamW).
    """
    if view.has("blueprint"):
        known = view.blueprint.recipe
    elif view.model.modality.name == "image":
        known = Recipe(optimizer="sgd", lr=0.01)
    else:
        known = Recipe(optimizer="adamw", lr=0.001)
    return dataclasses.replace(
        known,
        name="custom",
        epochs=epochs,
        batch_size=batch_for(batch_size, len(view.clean)),
        lr=known.lr if lr is None else lr / (10 if known.optimizer == "adamw" else 1),
        weight_decay=weight_decay,
        schedule="cosine",
        min_steps=0,
        compile=False,
    )


@dataclass(frozen=True, kw_only=True)
class FineTunes(RepairDefense):
    """The hyper-parameters of fine-tuning, for methods that are fine-tuning with something added."""

    may_read: ClassVar[tuple[str, ...]] = ("blueprint",)

    epochs: int = param(100, "passes over the clean samples", low=1, source="BackdoorBench")
    lr: float | None = param(
        None,
        "peak learning rate of SGD (AdamW: a tenth); none = that of the model's training, 0.01 where it is not known",
        above=0,
        source="BackdoorBench: 0.01 for both",
    )
    batch_size: int = param(
        256, "samples per step; at most an eighth of the samples, or 16", low=1, source="BackdoorBench"
    )
    weight_decay: float = param(5e-4, "L2 penalty", low=0, source="BackdoorBench")

    def recipe(self, view: DefenderView) -> Recipe:
        """See :func:`finetuning_recipe`."""
        return finetuning_recipe(
            view, epochs=self.epochs, lr=self.lr, batch_size=self.batch_size, weight_decay=self.weight_decay
        )
