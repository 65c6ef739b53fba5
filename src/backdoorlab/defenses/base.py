"""Contracts of defenses, by stage. The life of a run (seed, time, memory, measuring) is written outside of them.

A defense reads a :class:`~backdoorlab.defenses.view.DefenderView` and returns an *outcome*; what the outcome is worth
is measured elsewhere, by whoever knows the truth. No defense ever receives triggered test data, roles or true labels
of poisoned samples; a threshold or stopping rule uses clean validation data.
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
from backdoorlab.defenses.view import PARTS, DefenderView
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.blueprint import Blueprint
from backdoorlab.training.context import Context
from backdoorlab.training.session import session

defenses: Registry[Defense] = Registry("defense", ("backdoorlab.defenses",), "backdoorlab.defenses")


@dataclass(frozen=True, eq=False)
class Screening:
    """What a dataset defense says of a training set.

    Attributes:
        scores: float32 [N], higher = more suspicious.
        flags: bool [N], True = taken for poisoned.
    """

    scores: Tensor
    flags: Tensor

    @property
    def kept(self) -> Tensor:
        """int64, rows that were not flagged."""
        return (~self.flags.cpu().bool()).nonzero().flatten()


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


@dataclass(frozen=True, eq=False)
class Repair:
    """What a repair defense returns.

    Attributes:
        model: the repaired copy, in evaluation mode.
    """

    model: Classifier


class InputDetector(ABC):
    """What an input defense returns.

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


@dataclass(frozen=True, eq=False)
class ScanReport:
    """Verdict on a model.

    Attributes:
        score: anomaly score, higher = more suspicious.
        backdoored: the verdict by the paper's threshold.
        targets: suspected target classes, most suspicious first (empty if none, or if the method names no class).
        per_class: evidence per class (such as mask norms), K numbers.
        recovered: reverse-engineered triggers as tensors, by name.
    """

    score: float
    backdoored: bool
    targets: tuple[int, ...]
    per_class: tuple[float, ...] = ()
    recovered: dict[str, Tensor] = field(default_factory=dict)


Outcome = Screening | TrainingReport | Repair | InputDetector | ScanReport
"""What applying a defense gives; nothing in it depends on the truth."""


@dataclass(frozen=True, kw_only=True)
class Defense(Method):
    """Base of all defenses: declared facts."""

    stage: ClassVar[str]
    """"dataset", "training", "repair", "input" or "model"."""
    reads: ClassVar[tuple[str, ...]]
    """What of a :class:`DefenderView` it looks at: "model", "clean", "suspicious", "blueprint"."""
    may_read: ClassVar[tuple[str, ...]] = ()
    """What it also looks at if the view has it, and does without otherwise (:meth:`DefenderView.has`)."""
    needs_clean_fraction: ClassVar[float] = 0.0
    """Clean samples that the defender must own, as a share of the training set (0: none)."""
    needs_norm: ClassVar[bool] = False
    """Only for models with normalisation layers?"""
    needs_conv: ClassVar[bool] = False
    """Only for models with convolutions?"""
    fact_names: ClassVar[tuple[str, ...]] = (
        "stage",
        "reads",
        "may_read",
        "needs_clean_fraction",
        "needs_norm",
        "needs_conv",
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a declaration of something that no view holds."""
        super().__init_subclass__(**kwargs)
        for part in (*cls.__dict__.get("reads", ()), *cls.__dict__.get("may_read", ())):
            if part not in PARTS:
                raise TypeError(f"{cls.__name__}.reads: no part {part!r}; a defender's view has {', '.join(PARTS)}")

    def apply(self, view: DefenderView, ctx: Context) -> Outcome:
        """Run the defense on what it declares to read.

        Args:
            view: what the defender has; may hold more than is read.
            ctx: seed, device, progress.

        Raises:
            InputError: if the view lacks a part that the defense reads, or the part does not suffice.
            NotApplicable: if the method cannot work on such a model or such data.
        """
        return self._apply(view.limited(self.name, self.reads, self.may_read), ctx)

    @abstractmethod
    def _apply(self, view: DefenderView, ctx: Context) -> Outcome:
        """Call the hook of the stage: :meth:`run`, or ``score`` and ``flags``."""

    def _prepared(
        self,
        seed: int,
        device: str | torch.device,
        progress: bool | None,
        *,
        model: Classifier | None = None,
        clean: Split | None = None,
        suspicious: Split | None = None,
        blueprint: Blueprint | None = None,
    ) -> tuple[DefenderView, Context]:
        """What the verbs of all stages pass to :meth:`_apply`: a view limited to what is read, and a context."""
        ctx = session(seed, device, progress, "defense")
        moved = None if model is None else model.to(ctx.device)
        view = DefenderView(model=moved, clean=clean, suspicious=suspicious, blueprint=blueprint)
        return view.limited(self.name, self.reads, self.may_read), ctx


@dataclass(frozen=True, kw_only=True)
class DatasetDefense(Defense):
    """Finds poisoned samples in a training set."""

    stage: ClassVar[str] = "dataset"
    reads: ClassVar[tuple[str, ...]] = ("model", "suspicious")

    @abstractmethod
    def score(self, view: DefenderView, ctx: Context) -> Tensor:
        """Suspicion of every training sample.

        Args:
            view: by default the suspicious set and the model that was trained on it.
            ctx: seed, device, progress.

        Returns:
            float32 [N] on the CPU, higher = more suspicious.
        """

    @abstractmethod
    def flags(self, scores: Tensor, view: DefenderView) -> Tensor:
        """The paper's decision: bool [N], True = poisoned. Uses scores and (given) labels only."""

    def screen(
        self,
        suspicious: Split,
        model: Classifier | None = None,
        *,
        clean: Split | None = None,
        blueprint: Blueprint | None = None,
        seed: int = 0,
        device: str | torch.device = "auto",
        progress: bool | None = None,
    ) -> Screening:
        """Find poisoned samples of a training set whose truth nobody needs to know.

        Args:
            suspicious: the training set.
            model: trained on it, for defenses that read one.
            clean: samples known to be clean, for defenses that read some.
            blueprint: how such a model is trained (``task.blueprint``), for defenses that read it.
            seed: all randomness derives from it.
            device: "auto", "cpu", "cuda", ...
            progress: show bars; None shows them on a terminal and in a notebook.

        Returns:
            Scores float32 [N], flags bool [N] and the rows that were kept.

        Raises:
            InputError: if something that this defense reads is missing.
            NotApplicable: if the method cannot work on such a model or such data.
        """
        view, ctx = self._prepared(
            seed, device, progress, model=model, clean=clean, suspicious=suspicious, blueprint=blueprint
        )
        return self._apply(view, ctx)

    def _apply(self, view: DefenderView, ctx: Context) -> Screening:
        scores = self.score(view, ctx)
        return Screening(scores, self.flags(scores, view))


@dataclass(frozen=True, kw_only=True)
class TrainingDefense(Defense):
    """Trains a clean model on poisoned data."""

    stage: ClassVar[str] = "training"
    reads: ClassVar[tuple[str, ...]] = ("suspicious", "blueprint")

    @abstractmethod
    def run(self, view: DefenderView, ctx: Context) -> TrainingReport:
        """Train from scratch; by default ``view`` holds the suspicious set and the blueprint."""

    def train(
        self,
        suspicious: Split,
        blueprint: Blueprint,
        *,
        clean: Split | None = None,
        seed: int = 0,
        device: str | torch.device = "auto",
        progress: bool | None = None,
    ) -> TrainingReport:
        """Train a model on data that may be poisoned.

        Args:
            suspicious: the training set.
            blueprint: architecture and recipe (``task.blueprint``).
            clean: samples known to be clean, for defenses that read some.
            seed: all randomness derives from it.
            device: "auto", "cpu", "cuda", ...
            progress: show bars; None shows them on a terminal and in a notebook.

        Raises:
            InputError: if something that this defense reads is missing, or the data do not suffice.
            NotApplicable: if the method cannot work on such data.
        """
        view, ctx = self._prepared(seed, device, progress, clean=clean, suspicious=suspicious, blueprint=blueprint)
        return self._apply(view, ctx)

    def _apply(self, view: DefenderView, ctx: Context) -> TrainingReport:
        return self.run(view, ctx)


@dataclass(frozen=True, kw_only=True)
class RepairDefense(Defense):
    """Cleans a trained model."""

    stage: ClassVar[str] = "repair"
    reads: ClassVar[tuple[str, ...]] = ("model", "clean")
    needs_clean_fraction: ClassVar[float] = 0.05

    @abstractmethod
    def run(self, view: DefenderView, ctx: Context) -> Classifier:
        """A repaired copy; the given model is left as it was.

        Args:
            view: by default the suspicious model and the defender's clean samples.
            ctx: seed, device, progress.

        Raises:
            NotApplicable: if the architecture lacks what the method works on.
        """

    def repair(
        self,
        model: Classifier,
        clean: Split | None = None,
        *,
        suspicious: Split | None = None,
        blueprint: Blueprint | None = None,
        seed: int = 0,
        device: str | torch.device = "auto",
        progress: bool | None = None,
    ) -> Classifier:
        """Clean a model.

        Args:
            model: the suspicious model; left as it is.
            clean: samples known to be clean (data-free methods need none).
            suspicious: the training set, for defenses that read it.
            blueprint: how such a model is trained (``task.blueprint``), for defenses that read it.
            seed: all randomness derives from it.
            device: "auto", "cpu", "cuda", ...
            progress: show bars; None shows them on a terminal and in a notebook.

        Returns:
            A repaired copy, in evaluation mode; its ``title`` is the name of the defense.

        Raises:
            InputError: if something that this defense reads is missing, or the data do not suffice.
            NotApplicable: if the architecture lacks what the method works on.
        """
        view, ctx = self._prepared(
            seed, device, progress, model=model, clean=clean, suspicious=suspicious, blueprint=blueprint
        )
        return self._apply(view, ctx).model

    def _apply(self, view: DefenderView, ctx: Context) -> Repair:
        repaired = self.run(view, ctx)
        repaired.title = self.name
        return Repair(repaired)


@dataclass(frozen=True, kw_only=True)
class InputDefense(Defense):
    """Rejects triggered inputs at inference. ``run`` returns the detector; the method object itself stays frozen."""

    stage: ClassVar[str] = "input"
    reads: ClassVar[tuple[str, ...]] = ("model", "clean")
    needs_clean_fraction: ClassVar[float] = 0.05

    @abstractmethod
    def run(self, view: DefenderView, ctx: Context) -> InputDetector:
        """Calibrate on clean samples."""

    def detector(
        self,
        model: Classifier,
        clean: Split | None = None,
        *,
        suspicious: Split | None = None,
        blueprint: Blueprint | None = None,
        seed: int = 0,
        device: str | torch.device = "auto",
        progress: bool | None = None,
    ) -> InputDetector:
        """A detector of triggered inputs for a model.

        Args:
            model: the suspicious model; left as it is.
            clean: samples known to be clean, on which the threshold is set.
            suspicious: the training set, for defenses that read it.
            blueprint: how such a model is trained (``task.blueprint``), for defenses that read it.
            seed: all randomness derives from it.
            device: "auto", "cpu", "cuda", ...
            progress: show bars; None shows them on a terminal and in a notebook.

        Returns:
            An object with ``score(inputs)``, ``threshold`` and ``flags(scores)``.

        Raises:
            InputError: if something that this defense reads is missing, or the data do not suffice.
            NotApplicable: if the method cannot work on such a model.
        """
        view, ctx = self._prepared(
            seed, device, progress, model=model, clean=clean, suspicious=suspicious, blueprint=blueprint
        )
        return self._apply(view, ctx)

    def _apply(self, view: DefenderView, ctx: Context) -> InputDetector:
        return self.run(view, ctx)


@dataclass(frozen=True, kw_only=True)
class ModelDefense(Defense):
    """Says whether a model is backdoored, and toward which class."""

    stage: ClassVar[str] = "model"
    reads: ClassVar[tuple[str, ...]] = ("model", "clean")
    needs_clean_fraction: ClassVar[float] = 0.05

    @abstractmethod
    def run(self, view: DefenderView, ctx: Context) -> ScanReport:
        """Inspect a model with the defender's clean samples; the model is left as it was."""

    def scan(
        self,
        model: Classifier,
        clean: Split | None = None,
        *,
        suspicious: Split | None = None,
        blueprint: Blueprint | None = None,
        seed: int = 0,
        device: str | torch.device = "auto",
        progress: bool | None = None,
    ) -> ScanReport:
        """Say whether a model is backdoored, and toward which class.

        Args:
            model: the suspicious model; left as it is.
            clean: samples known to be clean.
            suspicious: the training set, for defenses that read it.
            blueprint: how such a model is trained (``task.blueprint``), for defenses that read it.
            seed: all randomness derives from it.
            device: "auto", "cpu", "cuda", ...
            progress: show bars; None shows them on a terminal and in a notebook.

        Raises:
            InputError: if something that this defense reads is missing, or the data do not suffice.
            NotApplicable: if the method cannot work on such a model.
        """
        view, ctx = self._prepared(
            seed, device, progress, model=model, clean=clean, suspicious=suspicious, blueprint=blueprint
        )
        return self._apply(view, ctx)

    def _apply(self, view: DefenderView, ctx: Context) -> ScanReport:
        return self.run(view, ctx)


def no_flags(count: int) -> Tensor:
    """Bool [count], all False."""
    return torch.zeros(count, dtype=torch.bool)
