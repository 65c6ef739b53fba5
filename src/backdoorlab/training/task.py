"""A task: data, modality, architecture and recipe together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from backdoorlab.core.errors import InputError
from backdoorlab.core.excerpt import shown
from backdoorlab.data.sources import DatasetSpec, load_dataset
from backdoorlab.data.split import Dataset, Split
from backdoorlab.modalities.base import Modality, modality_of
from backdoorlab.models.classifier import Classifier, build_model, default_model
from backdoorlab.training.context import Context
from backdoorlab.training.loop import FitLog, Objective, OnEpoch, Stamp, cross_entropy, fit
from backdoorlab.training.recipes import Recipe, recipe_for


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """What a task is made of, JSON-able; part of every run's specification.

    Attributes:
        dataset: which data.
        model: architecture, or "auto" for the default of the modality.
        recipe: "reference", "fast" or "smoke".
        recipe_changes: fields of the recipe to change, as (name, value) pairs.
        kind: "classifier", or "diffusion" for generative tasks (see :mod:`backdoorlab.diffusion.task`).
    """

    dataset: DatasetSpec = field(default_factory=DatasetSpec)
    model: str = "auto"
    recipe: str = "fast"
    recipe_changes: tuple[tuple[str, float | int | str | bool], ...] = ()
    kind: str = "classifier"

    def __post_init__(self) -> None:
        for name in ("model", "recipe", "kind"):
            if not isinstance(getattr(self, name), str):
                raise InputError(f"the {name} of a task must be text, got {shown(getattr(self, name))}")


@dataclass(frozen=True, eq=False)
class Task:
    """A loaded task.

    Attributes:
        spec: what it was made from, with "auto" resolved.
        dataset: training and test data.
        modality: how samples become model input.
        recipe: how models are trained on it.
    """

    spec: TaskSpec
    dataset: Dataset
    modality: Modality
    recipe: Recipe

    @classmethod
    def load(cls, spec: TaskSpec, *, root: str | Path | None = None, download: bool = False) -> Task:
        """Load the data and resolve model and recipe.

        Raises:
            InputError: see :func:`~backdoorlab.data.sources.load_dataset`.
        """
        dataset = load_dataset(spec.dataset, root=root, download=download)
        modality = modality_of(dataset)
        model = default_model(modality) if spec.model == "auto" else spec.model
        recipe = recipe_for(modality.name, spec.recipe, **dict(spec.recipe_changes))
        # An impossible model is an error now, not in an hour; a pre-trained one brings its tokenizer.
        modality = build_model(model, modality, dataset.train.num_classes).modality
        return cls(dataclasses.replace(spec, model=model), dataset, modality, recipe)

    @property
    def train(self) -> Split:
        """The clean training split."""
        return self.dataset.train

    @property
    def test(self) -> Split:
        """The clean test split."""
        return self.dataset.test

    @property
    def num_classes(self) -> int:
        """K."""
        return self.dataset.train.num_classes

    def build_model(self, context: Context) -> Classifier:
        """A fresh model with weights drawn from the context's seed, on its device."""
        return build_model(self.spec.model, self.modality, self.num_classes, context.seed).to(context.device)

    def fit(
        self,
        split: Split,
        context: Context,
        *,
        model: Classifier | None = None,
        recipe: Recipe | None = None,
        objective: Objective = cross_entropy,
        stamp: Stamp | None = None,
        on_epoch: Sequence[OnEpoch] = (),
        chance: float | None = None,
        label: str = "training",
    ) -> tuple[Classifier, FitLog]:
        """Train a fresh model (or the one given) by the task's recipe (or the one given); see :func:`fit`."""
        model = model if model is not None else self.build_model(context)
        log = fit(model, split, recipe or self.recipe, objective=objective, stamp=stamp, on_epoch=on_epoch,
                  chance=chance, context=context, label=label)  # fmt: skip
        return model, log
