"""Classification: data of any modality, an architecture and a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Unpack

from backdoorlab.core.errors import InputError
from backdoorlab.data.sources import datasets, load_dataset
from backdoorlab.data.split import Dataset, Split, clean_indices
from backdoorlab.metrics.classification import rate
from backdoorlab.metrics.result import Metrics
from backdoorlab.modalities.base import Modality, modality_of
from backdoorlab.models.classifier import Classifier, build_model, default_model
from backdoorlab.models.persistence import StoredModel
from backdoorlab.tasks.base import BaseTask, TaskSpec, kinds
from backdoorlab.training.blueprint import Blueprint
from backdoorlab.training.context import Context
from backdoorlab.training.evaluate import predict
from backdoorlab.training.log import FitLog
from backdoorlab.training.loop import FitOptions
from backdoorlab.training.recipes import Recipe, recipe_for, typed_changes


@kinds.register
@dataclass(frozen=True, eq=False, repr=False)
class Task(BaseTask):
    """A loaded task.

    Attributes:
        spec: of the task, with "auto" resolved.
        dataset: training and test data.
        modality: how samples become model input.
        recipe: how models are trained on it.
    """

    spec: TaskSpec
    dataset: Dataset
    modality: Modality
    recipe: Recipe

    name: ClassVar[str] = "classification"
    modalities: ClassVar[tuple[str, ...]] = ("image", "text", "audio", "video")

    @classmethod
    def check(cls, spec: TaskSpec) -> tuple[str, ...]:
        """See :meth:`BaseTask.check`."""
        head, colon, _ = spec.dataset.name.partition(":")
        served = tuple(datasets.get(head + colon).modalities)
        for modality in served:
            recipe_for(modality, spec.recipe, **dict(spec.recipe_changes))
        return served

    @classmethod
    def recipe_changes(cls, values: Mapping[str, object]) -> tuple[tuple[str, Any], ...]:
        """See :meth:`BaseTask.recipe_changes`."""
        return tuple(typed_changes(Recipe, values).items())

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

    def clean_subset(self, fraction: float, *, seed: int = 0) -> Split:
        """Clean samples that a defender holds.

        Class counts are as equal as the data allow; the same seed gives the same rows as in the benchmark, and the rows
        of a smaller fraction are among those of a larger one.

        Args:
            fraction: share of the training set, in [0, 1]; at least one sample unless it is 0.
            seed: of the run.

        Raises:
            InputError: for a fraction outside of [0, 1].
        """
        if not 0 <= fraction <= 1:
            raise InputError(f"a clean subset is a share of the training set in [0, 1], got {fraction!r}")
        return self.train[clean_indices(self.train.labels, self.num_classes, fraction, seed)]

    def __repr__(self) -> str:
        counts = f"{len(self.train)} training and {len(self.test)} test samples, {self.num_classes} classes"
        return f"Task({self.dataset.name}: {counts}; {self.spec.model}, recipe {self.recipe.name})"

    @property
    def blueprint(self) -> Blueprint:
        """How its models are built and trained, without its data."""
        return Blueprint(self.spec.model, self.modality, self.num_classes, self.recipe)

    def build_model(self, context: Context) -> Classifier:
        """A fresh model with weights drawn from the context's seed, on its device."""
        return self.blueprint.build_model(context)

    def fit(
        self,
        split: Split,
        context: Context,
        *,
        model: Classifier | None = None,
        recipe: Recipe | None = None,
        **options: Unpack[FitOptions[Classifier]],
    ) -> tuple[Classifier, FitLog]:
        """Train a fresh model (or the one given) by the task's recipe (or the one given); see :meth:`Blueprint.fit`."""
        return self.blueprint.fit(split, context, model=model, recipe=recipe, **options)

    def train_benign(self, ctx: Context) -> tuple[Classifier, FitLog]:
        """See :meth:`BaseTask.train_benign`."""
        return self.fit(self.train, ctx, label="training the benign model")

    def measure_benign(self, model: StoredModel, ctx: Context) -> Metrics:
        """Clean accuracy, overall and per class."""
        if not isinstance(model, Classifier):
            raise InputError(f"a classification task measures classifiers, got a model of kind {model.kind!r}")
        right = predict(model, self.test.inputs).argmax(1) == self.test.labels
        per_class = [rate(right[self.test.labels == k]) for k in range(self.num_classes)]
        return Metrics({"acc": rate(right), "n_clean": len(right), "acc_per_class": per_class})
