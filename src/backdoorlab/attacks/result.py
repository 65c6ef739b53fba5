"""What attacks return: a backdoor that measures itself, can be stored, and may know its task."""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from backdoorlab.attacks.files import write_folder
from backdoorlab.attacks.targets import TargetMap
from backdoorlab.attacks.triggers.base import Trigger, load_trigger, stamp_all
from backdoorlab.core.errors import ArtifactError, InputError
from backdoorlab.data.split import Inputs, Poison, join, take
from backdoorlab.metrics.classification import attack_metrics
from backdoorlab.metrics.result import Metrics
from backdoorlab.metrics.tables import Evaluation
from backdoorlab.metrics.visibility import visibility
from backdoorlab.modalities.filters import expect_images
from backdoorlab.models.classifier import Classifier
from backdoorlab.models.persistence import State, restore_model
from backdoorlab.tasks import Task
from backdoorlab.training.context import Context
from backdoorlab.training.evaluate import predict
from backdoorlab.training.log import FitLog
from backdoorlab.training.session import session


class Planted(ABC):
    """Base of the results of attacks; subclasses are frozen dataclasses that declare these fields.

    Attributes:
        model: the victim, in evaluation mode.
        trigger: as delivered at test time.
        log: of the victim's training.
        notes: facts worth keeping on the card, JSON-able.
        task: that it was planted in; None where the benchmark keeps the task itself.
        seed: of the run, from which the randomness of measurements derives too.
        title: what tables call it.
    """

    kind: ClassVar[str]
    """Under which the class is found again when a backdoor is loaded."""

    _kinds: ClassVar[dict[str, type[Planted]]] = {}

    model: Any
    trigger: Trigger
    log: FitLog
    notes: dict[str, Any]
    task: Any
    seed: int
    title: str

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in cls.__dict__:
            Planted._kinds[cls.kind] = cls

    @abstractmethod
    def state(self) -> State:
        """Tensors by file name, and a JSON-able record whose "backdoor" is :attr:`kind`."""

    def stored(self) -> State:
        """:meth:`state` with the record as it comes back from JSON."""
        tensors, record = self.state()
        return tensors, json.loads(json.dumps(record, allow_nan=False))

    @classmethod
    @abstractmethod
    def from_state(cls, tensors: dict[str, dict[str, Tensor]], record: dict[str, Any]) -> Self:
        """Inverse of :meth:`state`.

        Raises:
            ArtifactError: if the record and the tensors do not belong together.
        """

    @abstractmethod
    def measure(self, task: Any, context: Context, model: Any = None) -> Metrics:
        """Metrics of the victim, or of another model such as a repaired one."""

    def try_on(self, task: Any) -> None:
        """Use what was restored once, so that tensors which do not fit the task are noticed at once.

        Raises:
            ArtifactError: naming what does not fit.
            RuntimeError: whatever torch says of tensors that do not fit.
        """
        return

    def visibility(self, task: Any) -> dict[str, Any]:
        """How much the trigger changes, for the card's notes; empty where that is not defined."""
        return {}

    def on(self, task: Any, seed: int = 0, title: str = "backdoor") -> Self:
        """The same backdoor, knowing its task."""
        return dataclasses.replace(self, task=task, seed=seed, title=title)  # type: ignore[type-var]

    def measuring(self, device: str | torch.device = "auto") -> Context:
        """The context in which it is measured: the same for every model that is compared."""
        return session(self.seed, device, False, "attack").child("measure")

    def evaluate(self, model: Any = None, *, title: str | None = None) -> Evaluation:
        """ACC, ASR and RA with their counts.

        Args:
            model: instead of the victim, such as a repaired one.
            title: of the row; None takes the title of the backdoor or the model.

        Raises:
            InputError: if it does not know its task.
        """
        if self.task is None:
            raise InputError("this backdoor does not know its task; attach it with backdoor.on(task)")
        victim: Any = self if model is None else model
        metrics = self.measure(self.task, self.measuring(getattr(model, "device", "auto")), model)
        return Evaluation(title or getattr(victim, "title", "") or "model", metrics)

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write model, trigger, poisoned samples and task into a new folder; ``backdoorlab.load`` reads it.

        Args:
            folder: made here.
            force: replace an earlier one (never anything else).

        Raises:
            InputError: if the folder exists or cannot be written; nothing is left behind.
        """
        tensors, record = self.stored()
        spec = None if self.task is None else dataclasses.asdict(self.task.spec)
        about = {"title": self.title, "seed": self.seed, "task": spec}
        return write_folder(folder, tensors, {**about, "backdoor": record}, force=force)


_COMPARED = 1 << 22
"""Values that :meth:`Backdoor.visibility` compares at most; SSIM needs some ten copies of them in float64."""


@dataclass(frozen=True, eq=False)
class Backdoor(Planted):
    """The result of an attack.

    Attributes:
        model: the victim, in evaluation mode.
        trigger: as delivered at test time.
        target_map: what triggered samples should become.
        poison: what was changed in the training set (for training-control attacks a replay).
        log: of the victim's training.
        cross_trigger: for attacks whose triggers should work on their own sample only: the trigger of another sample.
        task: that it was planted in; None where the benchmark keeps the task itself.
        seed: of the run, from which the randomness of measurements derives too.
        title: what tables call it.
        notes: facts worth keeping on the card, JSON-able (effective rate, quality gates, ...).
    """

    kind: ClassVar[str] = "classification"

    model: Classifier
    trigger: Trigger
    target_map: TargetMap
    poison: Poison
    log: FitLog = field(default_factory=FitLog)
    cross_trigger: Trigger | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    task: Task | None = field(default=None, repr=False)
    seed: int = 0
    title: str = "backdoor"

    def triggered_test(self, task: Task) -> tuple[Inputs, Tensor, Tensor]:
        """Triggered test samples with (attacker's labels, true labels); target-class samples are left out."""
        chosen = self.target_map.eligible(task.test.labels).nonzero().flatten()
        true_labels = task.test.labels[chosen]
        inputs = stamp_all(self.trigger, take(task.test.inputs, chosen), device=self.model.device)
        return inputs, self.target_map(true_labels), true_labels

    def measure(self, task: Task, context: Context, model: Classifier | None = None) -> Metrics:
        """ACC, ASR and RA (and cross accuracy) of the victim, or of another model such as a repaired one.

        Clean and triggered samples go through the model in one pass.
        """
        model = model or self.model
        inputs, target_labels, true_labels = self.triggered_test(task)
        sets: list[Inputs] = [task.test.inputs, inputs]
        if self.cross_trigger is not None:
            sets.append(stamp_all(self.cross_trigger, task.test.inputs, device=model.device))
        predicted = predict(model, join(sets)).argmax(1)
        clean, triggered, cross = predicted.split(
            [len(task.test), len(true_labels), len(predicted) - len(task.test) - len(true_labels)]
        )
        metrics = attack_metrics(clean, task.test.labels, triggered, target_labels, true_labels, task.num_classes)
        if self.cross_trigger is not None:
            metrics["cross_acc"] = float((cross == task.test.labels).float().mean())
        return Metrics(metrics)

    def try_on(self, task: Task) -> None:
        """Apply trigger and model to one sample, see :meth:`Planted.try_on`."""
        sample = task.test.inputs[:1]
        if stamp_all(self.trigger, sample, device=self.model.device).shape != sample.shape:
            raise ArtifactError("the trigger changes the form of samples")
        if predict(self.model, sample).shape[1] != task.num_classes:
            raise ArtifactError(f"the model has other classes than the {task.num_classes} of the data")

    def visibility(self, task: Task) -> dict[str, Any]:
        """PSNR in dB, SSIM and L-infinity of the trigger on the first test images that count for ASR.

        Empty for other data than images, and if no test image counts. At most 256 images, fewer if they are large.
        """
        images = task.test.inputs
        if task.modality.name != "image" or not isinstance(images, Tensor):
            return {}
        count = max(1, min(256, _COMPARED // images[0].numel()))
        clean = images[self.target_map.eligible(task.test.labels).nonzero().flatten()[:count]]
        if not len(clean):
            return {}
        stamped = expect_images(stamp_all(self.trigger, clean, device=self.model.device), clean.shape[1:])
        difference = visibility(clean, stamped)
        return {"psnr_db": difference.psnr, "ssim": difference.ssim, "linf": difference.linf}

    def state(self) -> State:
        """Tensors by file name (model, trigger, poison) and a JSON-able record, for the store."""
        weights, model = self.model.state()
        trigger, config = self.trigger.state()
        record = {
            "backdoor": self.kind,
            "model": model,
            "trigger": {"kind": self.trigger.kind, **config},
            "target_map": dataclasses.asdict(self.target_map),
            "notes": self.notes,
        }
        tensors = {**weights, "trigger": trigger, "poison": self.poison.tensors()}
        if self.cross_trigger is not None:
            tensors["cross"], cross = self.cross_trigger.state()
            record["cross_trigger"] = {"kind": self.cross_trigger.kind, **cross}
        return tensors, record

    @classmethod
    def from_state(cls, tensors: dict[str, dict[str, Tensor]], record: dict[str, Any]) -> Backdoor:
        """Inverse of :meth:`state` (without the training log).

        Raises:
            ArtifactError: if the record and the tensors do not belong together.
        """
        cross = None
        if "cross_trigger" in record:
            cross = _trigger(record["cross_trigger"], tensors["cross"])
        model = restore_model((tensors, record["model"]))
        if not isinstance(model, Classifier):
            raise ArtifactError(f"the victim of a backdoor of kind {cls.kind} is a classifier, got a {model.kind}")
        return cls(
            model,
            _trigger(record["trigger"], tensors["trigger"]),
            TargetMap(**record["target_map"]),
            Poison.from_tensors(tensors["poison"]),
            cross_trigger=cross,
            notes=record.get("notes", {}),
        )


def _trigger(record: dict[str, Any], tensors: dict[str, Tensor]) -> Trigger:
    return load_trigger(record["kind"], tensors, {k: v for k, v in record.items() if k != "kind"})
