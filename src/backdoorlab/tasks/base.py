"""What every kind of task offers, so that the benchmark treats classifiers and generative models alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from backdoorlab.core.errors import InputError, NotApplicable
from backdoorlab.core.excerpt import shown
from backdoorlab.core.registry import Registry
from backdoorlab.data.sources import DatasetSpec
from backdoorlab.data.split import Dataset, Split
from backdoorlab.metrics.result import Metrics
from backdoorlab.modalities.base import Modality
from backdoorlab.models.persistence import StoredModel
from backdoorlab.training.blueprint import Blueprint
from backdoorlab.training.context import Context
from backdoorlab.training.log import FitLog


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """What a task is made of, JSON-able; part of every run's specification.

    Attributes:
        dataset: which data.
        model: architecture, or "auto" for the default of the modality.
        recipe: "reference", "fast" or "smoke".
        recipe_changes: fields of the recipe to change, as (name, value) pairs.
        kind: of task: "classification", or "diffusion" for unconditional diffusion models.
    """

    dataset: DatasetSpec = field(default_factory=DatasetSpec)
    model: str = "auto"
    recipe: str = "fast"
    recipe_changes: tuple[tuple[str, Any], ...] = ()
    kind: str = "classification"

    def __post_init__(self) -> None:
        for name in ("model", "recipe", "kind"):
            if not isinstance(getattr(self, name), str):
                raise InputError(f"the {name} of a task must be text, got {shown(getattr(self, name))}")


class BaseTask(ABC):
    """A loaded task.

    Attributes:
        spec: of the task, with "auto" resolved.
        dataset: training and test data.
        modality: how samples become model input.
        recipe: how models are trained on it, a dataclass of JSON-able fields.
    """

    name: ClassVar[str]
    """Of the kind, as in ``TaskSpec.kind``."""
    modalities: ClassVar[tuple[str, ...]]
    """Under which names methods for such tasks are registered."""

    spec: TaskSpec
    dataset: Dataset
    modality: Modality
    recipe: Any

    @classmethod
    @abstractmethod
    def load(cls, spec: TaskSpec, *, root: str | Path | None = None, download: bool = False) -> Self:
        """Load the data, resolve model and recipe.

        Raises:
            InputError: for missing data, an unknown model, recipe or field.
        """

    @classmethod
    @abstractmethod
    def check(cls, spec: TaskSpec) -> tuple[str, ...]:
        """Check what can be checked without the data.

        Returns:
            The names under which methods may serve such a task (several only where the data will tell).

        Raises:
            InputError: for an unknown data set, recipe or field.
        """

    @classmethod
    @abstractmethod
    def recipe_changes(cls, values: Mapping[str, object]) -> tuple[tuple[str, Any], ...]:
        """Changes of a recipe's fields, as :class:`TaskSpec` holds them, with values of the right type.

        Args:
            values: by field, or text that stands for them.

        Raises:
            InputError: for an unknown field, or a value of another type.
        """

    @property
    def methods(self) -> str:
        """The name under which methods for this task are looked up: its modality, or its kind."""
        return self.modality.name

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

    @property
    def blueprint(self) -> Blueprint:
        """How its models are built and trained, without its data.

        Raises:
            NotApplicable: for tasks whose models are no classifiers.
        """
        raise NotApplicable(f"a task of kind {self.name} trains no classifier")

    @abstractmethod
    def train_benign(self, ctx: Context) -> tuple[StoredModel, FitLog]:
        """The same architecture and recipe on clean data."""

    @abstractmethod
    def measure_benign(self, model: StoredModel, ctx: Context) -> Metrics:
        """What a model without a backdoor does."""


kinds: Registry[BaseTask] = Registry("kind of task", ("backdoorlab.tasks",), "backdoorlab.tasks")


def load_task(spec: TaskSpec, *, root: str | Path | None = None, download: bool = False) -> BaseTask:
    """Load a task of any kind.

    Raises:
        InputError: for an unknown kind, and as :meth:`BaseTask.load`.
    """
    return kinds.get(spec.kind).load(spec, root=root, download=download)
