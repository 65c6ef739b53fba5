"""How models of a task are built and trained, without its data: what a defender may know about a training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Unpack

from backdoorlab.data.split import Split
from backdoorlab.modalities.base import Modality
from backdoorlab.models.classifier import Classifier, build_model
from backdoorlab.training.context import Context
from backdoorlab.training.log import FitLog
from backdoorlab.training.loop import FitOptions, fit
from backdoorlab.training.recipes import Recipe


@dataclass(frozen=True, eq=False)
class Blueprint:
    """Architecture, modality and recipe.

    Attributes:
        arch: name of the architecture, as :func:`~backdoorlab.models.classifier.build_model` knows it.
        modality: how samples become model input.
        num_classes: K.
        recipe: how such models are trained.
    """

    arch: str
    modality: Modality
    num_classes: int
    recipe: Recipe

    def build_model(self, context: Context) -> Classifier:
        """A fresh model with weights drawn from the context's seed, on its device."""
        return build_model(self.arch, self.modality, self.num_classes, context.seed).to(context.device)

    def fit(
        self,
        split: Split,
        context: Context,
        *,
        model: Classifier | None = None,
        recipe: Recipe | None = None,
        **options: Unpack[FitOptions[Classifier]],
    ) -> tuple[Classifier, FitLog]:
        """Train a fresh model (or the one given) by the recipe (or the one given).

        Args:
            split: training data as the trainer sees them.
            context: seed, device, progress.
            model: trained in place; None builds one.
            recipe: None takes the blueprint's.
            **options: of :func:`~backdoorlab.training.loop.fit`.
        """
        model = model if model is not None else self.build_model(context)
        return model, fit(model, split, recipe or self.recipe, context=context, **options)
