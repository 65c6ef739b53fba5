"""The three ways in which attackers of classifiers work: through data, through training, through weights."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from backdoorlab.attacks.result import Backdoor
from backdoorlab.attacks.selection import ClassificationAttack
from backdoorlab.attacks.triggers.base import Trigger
from backdoorlab.data.split import BACKDOOR, COVER, Inputs, Poison, join, take
from backdoorlab.tasks import Task
from backdoorlab.training.context import Context, Silent


@dataclass(frozen=True, kw_only=True)
class PoisoningAttack(ClassificationAttack):
    """The attacker only supplies training data. Most attacks write :meth:`make_trigger` and nothing else."""

    threat_model: ClassVar[str] = "poisoning"

    @abstractmethod
    def make_trigger(self, task: Task, ctx: Context) -> Trigger:
        """The trigger as delivered at test time; may train a surrogate, generator or encoder (``common.assets``)."""

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
        self.warn_if_too_weak(trigger, task, ctx)
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

    def run(self, task: Task, ctx: Context) -> Backdoor:
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
class TrainingAttack(ClassificationAttack):
    """The attacker runs the training loop: writes :meth:`run` with an objective or a stamp.

    Where the trigger is known before the victim is trained, :meth:`run` calls :meth:`warn_if_too_weak`.

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
class WeightAttack(ClassificationAttack):
    """The attacker edits a trained model; writes :meth:`run`."""

    threat_model: ClassVar[str] = "weights"
