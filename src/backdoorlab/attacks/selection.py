"""Attacks on classifiers: target class, poison rate, and the rules for choosing which samples are poisoned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from backdoorlab.attacks.base import Attack
from backdoorlab.attacks.targets import TargetMap
from backdoorlab.attacks.triggers.base import Trigger, stamp_all
from backdoorlab.core.errors import InputError
from backdoorlab.core.method import param
from backdoorlab.data.split import take
from backdoorlab.metrics.visibility import change
from backdoorlab.tasks import Task
from backdoorlab.training.context import Context

_CLEAN_ALL_TO_ALL = (
    "{}: target_map all-to-all needs new labels, but this attack keeps the true ones; it only serves all-to-one"
)


DIRTY_RATE, CLEAN_RATE = 0.1, 0.05
"""Default poison rates of attacks that relabel, and of those that keep the labels of target-class samples."""
_INSPECTED = 200
"""Training samples that are triggered to see whether the trigger changes anything."""


def class_rate(usual: str = "0.05") -> float | None:
    """The poison rate of an attack that takes its samples from one or a few classes: by default at most half of them.

    Args:
        usual: what the help says of the default, see :meth:`Attack.rate_on`.
    """
    field: float | None = param(
        None,
        f"poisoned samples / size of the training set; none = {usual}, but at most half of the samples that may be "
        "poisoned",
        above=0,
        high=1,
        source="BackdoorBench",
    )
    return field


@dataclass(frozen=True, kw_only=True)
class ClassificationAttack(Attack):
    """Chooses by label which training samples are poisoned, and what triggered samples should be classified as."""

    label_mode: ClassVar[str] = "dirty"
    """"dirty" (poisoned samples are relabelled) or "clean" (only target-class samples are poisoned)."""
    target_mode: ClassVar[str] = "all-to-one"
    """Target map; an attack that offers both has a hyper-parameter ``target_map`` instead."""
    fact_names: ClassVar[tuple[str, ...]] = (*Attack.fact_names, "label_mode", "target_mode")

    target: int = param(0, "target class of the attack", low=0, source="BackdoorBench")
    poison_rate: float | None = param(
        DIRTY_RATE, "poisoned samples / size of the training set", above=0, high=1, source="BackdoorBench"
    )
    exclude_target: bool = param(
        False, "never poison samples that already are of the target class (attacks that relabel)", source="ours"
    )
    cap_rate: bool = param(
        False,
        "poison all samples that may be poisoned where the poison rate asks for more, instead of failing",
        source="ours",
    )

    @classmethod
    def build(cls, settings: Mapping[str, Any]) -> Self:
        """As every method; an all-to-all attack with clean labels is refused for what it is."""
        if settings.get("target_map") == "all-to-all" and cls.label_mode == "clean":
            raise InputError(_CLEAN_ALL_TO_ALL.format(cls.name))
        return super().build(settings)

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
                negation = "not " if self.label_mode == "dirty" else ""
                raise InputError(
                    f"{self.name}: nothing to poison, the training set has no samples that are {negation}of target "
                    f"class {self.target} ({task.train.classes[self.target]})"
                )
            if not self.cap_rate:
                pool_name = f"samples of class {self.target}" if self.label_mode == "clean" else "candidates"
                raise InputError(
                    f"{self.name}: a poison rate of {rate:g} needs {count} of {len(pool)} {pool_name} among {total} "
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
        """Warn if more than half of a class is poisoned: little is left from which to learn it."""
        sizes, poisoned = (
            torch.bincount(labels, minlength=task.num_classes)
            for labels in (task.train.labels, task.train.labels[chosen])
        )
        full = (2 * poisoned > sizes).nonzero().flatten().tolist()
        if not full or task.spec.kind != "classification":
            return
        worst = max(full, key=lambda k: (int(poisoned[k]) / int(sizes[k]), int(sizes[k])))
        others = f", and of {len(full) - 1} more classes more than half" if len(full) > 1 else ""
        advice = ""
        if len(full) == 1 and self.label_mode == "clean" and int(sizes[worst]) > 1:
            half = math.floor(int(sizes[worst]) // 2 / len(task.train) * 1e4) / 1e4
            advice = f"; a poison rate of at most {half:g} leaves half of them clean" if half else ""
        ctx.warn(
            f"{self.name}: {int(poisoned[worst])} of the {int(sizes[worst])} training samples of class {worst} "
            f"({task.train.classes[worst]}) are poisoned{others}: the model sees little of it without the trigger and "
            f"may not know it{advice}"
        )

    def warn_if_too_weak(self, trigger: Trigger, task: Task, ctx: Context) -> None:
        """Warn, before anything is trained, if the trigger changes too little of this task's samples to be learned.

        A sample of the training set is triggered as at test time; half of it must change as
        :class:`~backdoorlab.metrics.visibility.Change` demands.
        """
        rows = self.target_map_for(task).eligible(task.train.labels).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=ctx.generator("look at the trigger"))[:_INSPECTED]]
        if not len(rows):
            return
        clean = take(task.train.inputs, rows)
        effect = change(clean, stamp_all(trigger, clean, device=ctx.device))
        if effect.noticed >= 0.5:
            return
        size = "" if effect.ratio_db is None else f" ({'SNR' if effect.audible else 'PSNR'} {effect.ratio_db:.0f} dB)"
        advice = f"; {self.stronger}, or take another attack" if self.stronger else "; take another attack"
        ctx.warn(
            f"{self.name}: the trigger changes {effect.share:.0%} of {len(rows)} training samples inspected, and "
            f"{effect.noticed:.0%} noticeably{size}: these data can hardly carry it{advice}"
        )
