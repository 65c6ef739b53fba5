"""Contracts of attacks, and everything that is the same for all of them: selection, labels, planting, measuring."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from backdoorlab.attacks.trigger import Trigger, load_trigger, stamp_all
from backdoorlab.core.errors import InputError
from backdoorlab.core.method import Method, param
from backdoorlab.core.registry import Registry
from backdoorlab.data.split import BACKDOOR, COVER, Inputs, Poison, join, take
from backdoorlab.metrics.classification import attack_metrics
from backdoorlab.metrics.visibility import change
from backdoorlab.modalities.base import modality_from_config
from backdoorlab.models.classifier import Classifier, build_model
from backdoorlab.training.context import Context, Silent
from backdoorlab.training.evaluate import predict
from backdoorlab.training.loop import FitLog
from backdoorlab.training.task import Task

attacks: Registry[Attack] = Registry(
    "attack", ("backdoorlab.attacks", "backdoorlab.diffusion.attacks"), "backdoorlab.attacks"
)


@dataclass(frozen=True)
class TargetMap:
    """What a triggered sample should be classified as.

    Attributes:
        mode: "all-to-one" (class ``target``) or "all-to-all" (true label + 1 mod K).
        target: the class of "all-to-one".
        num_classes: K.
        sources: true classes whose triggered samples count, for attacks that promise no more; empty = all.
    """

    mode: str
    target: int
    num_classes: int
    sources: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """A stored record has a list."""
        object.__setattr__(self, "sources", tuple(self.sources))

    def __call__(self, labels: Tensor) -> Tensor:
        """Attacker's labels for true labels, int64 [N]."""
        if self.mode == "all-to-all":
            return (labels + 1) % self.num_classes
        return torch.full_like(labels, self.target)

    def tested(self, labels: Tensor) -> Tensor:
        """Bool [N]: samples whose triggered version counts for ASR (all-to-one: not those of the target class)."""
        counts = torch.ones_like(labels, dtype=torch.bool) if self.mode == "all-to-all" else labels != self.target
        return counts & torch.isin(labels, labels.new_tensor(self.sources)) if self.sources else counts


@dataclass(frozen=True, eq=False)
class Backdoor:
    """The result of an attack.

    Attributes:
        model: the victim, in evaluation mode.
        trigger: as delivered at test time.
        target_map: what triggered samples should become.
        poison: what was changed in the training set (for training-control attacks a replay).
        log: of the victim's training.
        cross_trigger: for attacks that promise that *other* samples' triggers do nothing: such a wrong trigger.
        notes: facts worth keeping on the card, JSON-able (effective rate, quality gates, ...).
    """

    model: Classifier
    trigger: Trigger
    target_map: TargetMap
    poison: Poison
    log: FitLog = field(default_factory=FitLog)
    cross_trigger: Trigger | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def triggered_test(self, task: Task) -> tuple[Inputs, Tensor, Tensor]:
        """Triggered test samples with (attacker's labels, true labels); target-class samples are left out."""
        chosen = self.target_map.tested(task.test.labels).nonzero().flatten()
        true = task.test.labels[chosen]
        inputs = stamp_all(self.trigger, take(task.test.inputs, chosen), device=self.model.device)
        return inputs, self.target_map(true), true

    def measure(self, task: Task, context: Context, model: Classifier | None = None) -> dict[str, Any]:
        """ACC, ASR and RA (and cross accuracy) of the victim, or of another model such as a repaired one.

        Clean and triggered samples go through the model in one pass.
        """
        model = model or self.model
        inputs, wanted, true = self.triggered_test(task)
        sets: list[Inputs] = [task.test.inputs, inputs]
        if self.cross_trigger is not None:
            sets.append(stamp_all(self.cross_trigger, task.test.inputs, device=model.device))
        predicted = predict(model, join(sets)).argmax(1)
        clean, triggered, cross = predicted.split(
            [len(task.test), len(true), len(predicted) - len(task.test) - len(true)]
        )
        metrics = attack_metrics(clean, task.test.labels, triggered, wanted, true, task.num_classes)
        if self.cross_trigger is not None:
            metrics["cross_acc"] = float((cross == task.test.labels).float().mean())
        return metrics

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Tensors by file name (model, trigger, poison) and a JSON-able record, for the store."""
        trigger, config = self.trigger.state()
        record = {
            "arch": self.model.arch,
            "num_classes": self.model.num_classes,
            "modality": {"name": self.model.modality.name, **self.model.modality.config()},
            "trigger": {"kind": self.trigger.kind, **config},
            "target_map": dataclasses.asdict(self.target_map),
            "notes": self.notes,
        }
        tensors = {"model": dict(self.model.state_dict()), "trigger": trigger, "poison": self.poison.tensors()}
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
        return cls(
            restore_model(record, tensors["model"]),
            _trigger(record["trigger"], tensors["trigger"]),
            TargetMap(**record["target_map"]),
            Poison.from_tensors(tensors["poison"]),
            cross_trigger=cross,
            notes=record.get("notes", {}),
        )


def _trigger(record: dict[str, Any], tensors: dict[str, Tensor]) -> Trigger:
    return load_trigger(record["kind"], tensors, {k: v for k, v in record.items() if k != "kind"})


def restore_model(record: dict[str, Any], weights: dict[str, Tensor]) -> Classifier:
    """Rebuild a classifier from a record with "arch", "num_classes" and "modality", and its weights.

    Raises:
        ArtifactError: if the weights do not fit the architecture.
    """
    from backdoorlab.core.errors import ArtifactError

    model = build_model(record["arch"], modality_from_config(record["modality"]), record["num_classes"])
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ArtifactError(f"weights do not fit {record['arch']}: {str(error).splitlines()[-1].strip()}") from None
    return model.eval()


_CLEAN_ALL_TO_ALL = (
    "{}: target_map all-to-all needs new labels, but this attack keeps the true ones; it only serves all-to-one"
)


DIRTY_RATE, CLEAN_RATE = 0.1, 0.05
"""Default poison rates of attacks that relabel, and of those that keep the labels of target-class samples."""
_LOOKED_AT = 200
"""Training samples that are triggered to see whether the trigger changes anything."""


def class_rate(usual: str = "0.05") -> float | None:
    """The poison rate of an attack that takes its samples from one or a few classes: by default at most half of them.

    Args:
        usual: what the help says of the default, see :meth:`Attack.rate_on`.
    """
    found: float | None = param(
        None,
        f"poisoned samples / size of the training set; none = {usual}, but at most half of the samples that may be "
        "poisoned",
        above=0,
        high=1,
        source="BackdoorBench",
    )
    return found


@dataclass(frozen=True, kw_only=True)
class Attack(Method):
    """Base of all attacks: facts, target, poison rate, and the rules for choosing which samples are poisoned."""

    threat_model: ClassVar[str]
    """"poisoning", "training" or "weights"."""
    label_mode: ClassVar[str] = "dirty"
    """"dirty" (poisoned samples are relabelled) or "clean" (only target-class samples are poisoned)."""
    trigger_visibility: ClassVar[str]
    """"visible", "subtle" or "invisible"."""
    sample_specific: ClassVar[bool] = False
    """Does the pattern depend on the sample?"""
    needs_surrogate: ClassVar[bool] = False
    """Must a network be trained before anything can be poisoned?"""
    asset_kinds: ClassVar[tuple[str, ...]] = ()
    """What it makes first and shares between runs (``ctx.asset``); the user's file can replace each of them."""
    stronger: ClassVar[str] = ""
    """What makes the trigger change more: "raise" or "lower" and hyper-parameters ("raise size"); "" for nothing."""
    target_mode: ClassVar[str] = "all-to-one"
    """Target map; an attack that offers both has a hyper-parameter ``target_map`` instead."""
    fact_names = (
        "threat_model",
        "label_mode",
        "trigger_visibility",
        "sample_specific",
        "needs_surrogate",
        "asset_kinds",
        "target_mode",
    )

    target: int = param(0, "target class of the attack", low=0, source="BackdoorBench")
    poison_rate: float | None = param(
        DIRTY_RATE, "poisoned samples / size of the training set", above=0, high=1, source="BackdoorBench"
    )
    exclude_target: bool = param(False, "never choose samples that already are of the target class (dirty label)")
    cap_rate: bool = param(False, "poison as many as there are instead of failing when the rate exceeds the capacity")

    @classmethod
    def build(cls, settings: Mapping[str, Any]) -> Self:
        """As every method; an all-to-all attack with clean labels is refused for what it is."""
        if settings.get("target_map") == "all-to-all" and cls.label_mode == "clean":
            raise InputError(_CLEAN_ALL_TO_ALL.format(cls.name))
        return super().build(settings)

    def assets_in_use(self) -> tuple[str, ...]:
        """Those of :attr:`asset_kinds` that it makes with these hyper-parameters: only they can be replaced."""
        return self.asset_kinds

    @abstractmethod
    def plant(self, task: Task, ctx: Context) -> Backdoor:
        """Run the attack.

        Raises:
            InputError: if the hyper-parameters do not fit the task (target outside the classes, rate above capacity, a
                trigger larger than the sample, ...).
        """

    def target_map_for(self, task: Task) -> TargetMap:
        """The target map on this task.

        Raises:
            InputError: if the target is not one of the classes.
        """
        if self.target >= task.num_classes:
            names = ", ".join(f"{i} ({c})" for i, c in enumerate(task.train.classes[:20]))
            raise InputError(
                f"{self.name}: target {self.target} is not a class of {task.dataset.name}, which has "
                f"{task.num_classes}: {names}"
            )
        mode = getattr(self, "target_map", type(self).target_mode)
        if self.label_mode == "clean" and mode != "all-to-one":
            raise InputError(_CLEAN_ALL_TO_ALL.format(self.name))
        return TargetMap(mode, self.target, task.num_classes)

    def candidates(self, labels: Tensor, target_map: TargetMap) -> Tensor:
        """int64 indices of the training samples that may be poisoned."""
        if self.label_mode == "clean":
            return (labels == self.target).nonzero().flatten()
        if self.exclude_target and target_map.mode == "all-to-one":
            return (labels != self.target).nonzero().flatten()
        return torch.arange(len(labels))

    def rate_on(self, task: Task) -> float:
        """The poison rate; if none was given the default, and at most half of the samples that may be poisoned.

        Raises:
            InputError: if half of them is less than one.
        """
        if self.poison_rate is not None:
            return self.poison_rate
        pool, total = len(self.candidates(task.train.labels, self.target_map_for(task))), len(task.train)
        usual = round((CLEAN_RATE if self.label_mode == "clean" else DIRTY_RATE) * total)
        if usual and pool == 1:
            raise InputError(
                f"{self.name}: the training set has one sample that can be poisoned, and the default poison rate "
                f"spares half of them; give a poison rate of {1 / total:.2g} or more"
            )
        return min(usual, pool // 2) / total if pool else usual / total

    def choose(self, task: Task, ctx: Context, rate: float | None = None) -> Tensor:
        """Draw round(rate * N) candidates without replacement; int64, in drawing order.

        Warns if that is more than half of a class.

        Args:
            task: the task.
            ctx: seed, reporter.
            rate: instead of :meth:`rate_on`.

        Raises:
            InputError: if that is none, or more than there are (naming the largest possible rate).
        """
        rate = self.rate_on(task) if rate is None else rate
        pool = self.candidates(task.train.labels, self.target_map_for(task))
        count, total = round(rate * len(task.train)), len(task.train)
        if count == 0:
            raise InputError(
                f"{self.name}: a poison rate of {rate:g} of {total} training samples poisons none; "
                f"the smallest useful rate is {1 / total:.2g}"
            )
        if count > len(pool):
            if not len(pool):
                which = "not " if self.label_mode == "dirty" else ""
                raise InputError(
                    f"{self.name}: nothing to poison, the training set has no samples that are {which}of target class "
                    f"{self.target} ({task.train.classes[self.target]})"
                )
            if not self.cap_rate:
                what = f"samples of class {self.target}" if self.label_mode == "clean" else "candidates"
                raise InputError(
                    f"{self.name}: a poison rate of {rate:g} needs {count} of {len(pool)} {what} among {total} "
                    f"training samples; the largest possible rate is {int(len(pool) / total * 1e4) / 1e4:g} "
                    f"(--set cap_rate=true poisons all of them)"
                )
            ctx.reporter.note(
                f"{self.name}: capped to {len(pool)} samples, an effective rate of {len(pool) / total:.4f}"
            )
            count = len(pool)
        order = torch.randperm(len(pool), generator=ctx.generator("choose"))
        chosen = pool[order[:count]]
        self._warn_of_full_classes(chosen, task, ctx)
        return chosen

    def _warn_of_full_classes(self, chosen: Tensor, task: Task, ctx: Context) -> None:
        """Tell if more than half of a class is poisoned: little is left from which to learn it."""
        sizes, taken = (torch.bincount(labels, minlength=task.num_classes)
                        for labels in (task.train.labels, task.train.labels[chosen]))  # fmt: skip
        full = (2 * taken > sizes).nonzero().flatten().tolist()
        if not full or task.spec.kind != "classifier":
            return
        worst = max(full, key=lambda k: (int(taken[k]) / int(sizes[k]), int(sizes[k])))
        others = f", and of {len(full) - 1} more classes more than half" if len(full) > 1 else ""
        advice = ""
        if len(full) == 1 and self.label_mode == "clean" and int(sizes[worst]) > 1:
            half = math.floor(int(sizes[worst]) // 2 / len(task.train) * 1e4) / 1e4
            advice = f"; a poison rate of at most {half:g} leaves half of them clean" if half else ""
        ctx.warn(
            f"{self.name}: {int(taken[worst])} of the {int(sizes[worst])} training samples of class {worst} "
            f"({task.train.classes[worst]}) are poisoned{others}: the model sees little of it without the trigger and "
            f"may not know it{advice}"
        )

    def look_at(self, trigger: Trigger, task: Task, ctx: Context) -> None:
        """Warn, before anything is trained, if the trigger changes too little of this task's samples to be learned.

        A sample of the training set is triggered as at test time; half of it must change as
        :class:`~backdoorlab.metrics.visibility.Change` demands.
        """
        rows = self.target_map_for(task).tested(task.train.labels).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=ctx.generator("look at the trigger"))[:_LOOKED_AT]]
        if not len(rows):
            return
        clean = take(task.train.inputs, rows)
        seen = change(clean, stamp_all(trigger, clean, device=ctx.device))
        if seen.noticed >= 0.5:
            return
        size = "" if seen.ratio_db is None else f" ({'SNR' if seen.audible else 'PSNR'} {seen.ratio_db:.0f} dB)"
        advice = f"; {self.stronger}, or take another attack" if self.stronger else "; take another attack"
        ctx.warn(
            f"{self.name}: the trigger changes {seen.share:.0%} of {len(rows)} training samples looked at, and "
            f"{seen.noticed:.0%} noticeably{size}: these data can hardly carry it{advice}"
        )


@dataclass(frozen=True, kw_only=True)
class PoisoningAttack(Attack):
    """The attacker only supplies training data. Most attacks write :meth:`make_trigger` and nothing else."""

    threat_model: ClassVar[str] = "poisoning"

    @abstractmethod
    def make_trigger(self, task: Task, ctx: Context) -> Trigger:
        """The trigger as delivered at test time; may train a surrogate, generator or encoder (as ``ctx.asset``)."""

    def poison_inputs(self, trigger: Trigger, inputs: Inputs, indices: Tensor, task: Task, ctx: Context) -> Inputs:
        """Raw training samples after poisoning; by default the trigger itself.

        Args:
            trigger: what :meth:`make_trigger` returned.
            inputs: the chosen raw samples, M rows.
            indices: int64 [M], their rows in the training set.
            task: the task.
            ctx: for randomness that is drawn once, when the data set is poisoned.
        """
        return trigger(inputs, indices, ctx.generator("poison"))

    def cover(self, trigger: Trigger, chosen: Tensor, task: Task, ctx: Context) -> tuple[Tensor, Inputs] | None:
        """Role-2 samples as (indices, raw samples), disjoint from ``chosen``; None if the attack has none."""
        return None

    def poison(self, trigger: Trigger, task: Task, ctx: Context) -> Poison:
        """Choose, stamp and relabel training samples."""
        self.look_at(trigger, task, ctx)
        chosen = self.choose(task, ctx)
        parts = [(chosen, self.poison_inputs(trigger, take(task.train.inputs, chosen), chosen, task, ctx), BACKDOOR)]
        covered = self.cover(trigger, chosen, task, ctx)
        if covered is not None:
            parts.append((*covered, COVER))
        indices = torch.cat([p[0] for p in parts])
        roles = torch.cat([torch.full((len(p[0]),), p[2], dtype=torch.uint8) for p in parts])
        labels = task.train.labels[indices].clone()
        backdoor = roles == BACKDOOR
        if self.label_mode == "dirty":
            labels[backdoor] = self.target_map_for(task)(labels[backdoor])
        return Poison(indices, roles, labels, join([p[1] for p in parts]))

    def plant(self, task: Task, ctx: Context) -> Backdoor:
        """Poison the training set, then train an ordinary model on it by the task's recipe."""
        target_map = self.target_map_for(task)
        self.choose(task, dataclasses.replace(ctx, reporter=Silent(), warnings=[]))  # an error now, not in hours
        trigger = self.make_trigger(task, ctx)
        poison = self.poison(trigger, task, ctx)
        model, log = task.fit(poison.apply(task.train), ctx, label=f"{self.name}: training the victim")
        return Backdoor(model, trigger, target_map, poison, log, notes=self.notes(trigger, poison, task))

    def notes(self, trigger: Trigger, poison: Poison, task: Task) -> dict[str, Any]:
        """Facts for the card; the effective rate is always among them."""
        backdoor = int((poison.roles == BACKDOOR).sum())
        return {"poisoned": backdoor, "cover": len(poison) - backdoor, "effective_rate": backdoor / len(task.train)}


@dataclass(frozen=True, kw_only=True)
class TrainingAttack(Attack):
    """The attacker runs the training loop: writes :meth:`plant` with an objective or a stamp of its own.

    Where the trigger is known before the victim is trained, :meth:`plant` calls :meth:`look_at`.

    The poisoned set that it returns is a *replay* (``Poison(..., replay=True)``), made with the final trigger.
    """

    threat_model: ClassVar[str] = "training"

    def replay(
        self, trigger: Trigger, task: Task, ctx: Context, cover: Trigger | None = None, cover_rate: float = 0.0
    ) -> Poison:
        """Round(rate * N) samples stamped by the final trigger (and role-2 samples by ``cover``), as a snapshot."""
        backdoor = self.choose(task, ctx)
        rest = torch.ones(len(task.train), dtype=torch.bool)
        rest[backdoor] = False
        pool = rest.nonzero().flatten()
        order = torch.randperm(len(pool), generator=ctx.generator("cover"))
        covered = pool[order[: min(len(pool), round(cover_rate * len(task.train)))]] if cover else pool[:0]
        labels = torch.cat([self.target_map_for(task)(task.train.labels[backdoor]), task.train.labels[covered]])
        inputs = [trigger(take(task.train.inputs, backdoor), backdoor, ctx.generator("replay"))]
        if cover and len(covered):
            inputs.append(cover(take(task.train.inputs, covered), covered, ctx.generator("replay-cover")))
        roles = torch.tensor([BACKDOOR] * len(backdoor) + [COVER] * len(covered), dtype=torch.uint8)
        return Poison(torch.cat([backdoor, covered]), roles, labels, join(inputs), replay=True)


@dataclass(frozen=True, kw_only=True)
class WeightAttack(Attack):
    """The attacker edits a trained model; writes :meth:`plant`."""

    threat_model: ClassVar[str] = "weights"
