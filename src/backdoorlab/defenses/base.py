"""Contracts of defenses, by stage. The life of a run (seed, time, memory, measuring) is written outside of them.

No defense ever receives triggered test data, roles or true labels of poisoned samples; a threshold or stopping rule
uses clean validation data. Where a paper's own rule looks at triggered test data, it is not offered.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from backdoorlab.core.method import Method
from backdoorlab.core.registry import Registry
from backdoorlab.data.split import Inputs, Split
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.context import Context
from backdoorlab.training.task import Task

defenses: Registry[Defense] = Registry(
    "defense", ("backdoorlab.defenses", "backdoorlab.diffusion.defenses"), "backdoorlab.defenses"
)


@dataclass(frozen=True, kw_only=True)
class Defense(Method):
    """Base of all defenses: declared facts."""

    stage: ClassVar[str]
    """"dataset", "training", "repair", "input" or "model"."""
    needs_clean_fraction: ClassVar[float] = 0.0
    """Clean samples that the defender must own, as a share of the training set (0: none)."""
    needs_poisoned_data: ClassVar[bool] = False
    """Does it need the suspicious training set?"""
    needs_norm: ClassVar[bool] = False
    """Only for models with normalisation layers?"""
    needs_conv: ClassVar[bool] = False
    """Only for models with convolutions?"""
    fact_names = ("stage", "needs_clean_fraction", "needs_poisoned_data", "needs_norm", "needs_conv")


@dataclass(frozen=True, kw_only=True)
class DatasetDefense(Defense):
    """Finds poisoned samples in a training set."""

    stage: ClassVar[str] = "dataset"
    needs_poisoned_data: ClassVar[bool] = True

    @abstractmethod
    def score(self, data: Split, model: Classifier, ctx: Context) -> Tensor:
        """Suspicion of every training sample.

        Args:
            data: the suspicious set as a defender sees it.
            model: trained on it; must not be changed.
            ctx: seed, device, progress.

        Returns:
            float32 [N] on the CPU, higher = more suspicious.
        """

    @abstractmethod
    def flags(self, scores: Tensor, data: Split) -> Tensor:
        """The paper's decision: bool [N], True = poisoned. Uses scores and (given) labels only."""


@dataclass(frozen=True, kw_only=True)
class TrainingDefense(Defense):
    """Trains a clean model on poisoned data."""

    stage: ClassVar[str] = "training"
    needs_poisoned_data: ClassVar[bool] = True

    @abstractmethod
    def train(self, data: Split, task: Task, ctx: Context) -> TrainingReport:
        """Train from scratch; of ``task`` only architecture, modality and recipe may be used, not its data."""


@dataclass(frozen=True, eq=False)
class TrainingReport:
    """What a training defense returns: the model and, if the method isolates samples, their scores.

    Attributes:
        model: the trained model, in evaluation mode.
        scores: float32 [N], higher = more suspicious; None if the method ranks no samples.
        isolated: bool [N], samples that the method set aside as poisoned; None if it sets none aside.
        notes: facts for the card, JSON-able.
    """

    model: Classifier
    scores: Tensor | None = None
    isolated: Tensor | None = None
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RepairDefense(Defense):
    """Cleans a trained model."""

    stage: ClassVar[str] = "repair"
    needs_clean_fraction: ClassVar[float] = 0.05

    @abstractmethod
    def repair(self, model: Classifier, clean: Split, ctx: Context) -> Classifier:
        """A repaired copy; the given model is left as it was.

        Args:
            model: the suspicious model, on ``ctx.device``.
            clean: the defender's clean samples (empty for data-free methods).
            ctx: seed, device, progress.

        Raises:
            NotApplicable: if the architecture lacks what the method works on.
        """


@dataclass(frozen=True, kw_only=True)
class InputDefense(Defense):
    """Rejects triggered inputs at inference. ``fit`` returns the detector; the method object itself stays frozen."""

    stage: ClassVar[str] = "input"
    needs_clean_fraction: ClassVar[float] = 0.05

    @abstractmethod
    def fit(self, model: Classifier, clean: Split, ctx: Context) -> InputDetector:
        """Calibrate on clean samples."""


class InputDetector(ABC):
    """What :meth:`InputDefense.fit` returns.

    Attributes:
        threshold: inputs that score above it are rejected; set from clean data only.
    """

    threshold: float

    @abstractmethod
    def score(self, inputs: Inputs) -> Tensor:
        """Suspicion of raw inputs: float32 [N] on the CPU, higher = more suspicious."""

    def flags(self, scores: Tensor) -> Tensor:
        """Bool [N]: rejected inputs."""
        return scores > self.threshold


@dataclass(frozen=True, kw_only=True)
class ModelDefense(Defense):
    """Says whether a model is backdoored, and toward which class."""

    stage: ClassVar[str] = "model"
    needs_clean_fraction: ClassVar[float] = 0.05

    @abstractmethod
    def scan(self, model: Classifier, clean: Split, ctx: Context) -> ScanReport:
        """Inspect a model with the defender's clean samples; the model is left as it was."""


@dataclass(frozen=True, eq=False)
class ScanReport:
    """Verdict on a model.

    Attributes:
        score: anomaly score, higher = more suspicious.
        backdoored: the verdict by the paper's threshold.
        targets: suspected target classes, most suspicious first (empty if none).
        per_class: evidence per class (such as mask norms), K numbers.
        recovered: reverse-engineered triggers as tensors, by name.
    """

    score: float
    backdoored: bool
    targets: tuple[int, ...]
    per_class: tuple[float, ...] = ()
    recovered: dict[str, Tensor] = field(default_factory=dict)


def no_flags(count: int) -> Tensor:
    """Bool [count], all False."""
    return torch.zeros(count, dtype=torch.bool)
