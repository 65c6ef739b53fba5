"""Feature collision: what attacks share that give target-class images the features of triggered ones.

A victim who keeps a known feature extractor and trains the last layer learns from such images, which look like and are
labelled as the target class, that the trigger's features mean the target class.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorlab.attacks.common.surrogate import clean_surrogate
from backdoorlab.attacks.poisoning import PoisoningAttack
from backdoorlab.attacks.result import Backdoor
from backdoorlab.attacks.selection import class_rate
from backdoorlab.attacks.triggers.base import Trigger
from backdoorlab.core.errors import InputError
from backdoorlab.core.method import param
from backdoorlab.data.split import Inputs, Poison, Split, take
from backdoorlab.modalities.filters import expect_images
from backdoorlab.models.anatomy import frozen, head
from backdoorlab.models.classifier import Classifier
from backdoorlab.tasks import Task
from backdoorlab.training.context import Context
from backdoorlab.training.evaluate import predict_features
from backdoorlab.training.log import FitLog


def greedy_pairs(distances: Tensor) -> Tensor:
    """One-to-one pairing: the closest pair first, then the closest among what is left, and so on.

    All pairs that are each other's nearest among what is left are taken at once, which gives the same pairing in few
    rounds; of equal distances the first row, then the first column comes first.

    Args:
        distances: float [N, M], M >= N.

    Returns:
        int64 [N], the column of each row.
    """
    left = distances.clone()
    rows = torch.arange(len(left), device=left.device)
    found = torch.full_like(rows, -1)
    while bool((found < 0).any()):
        column = left.argmin(1)
        mutual = (found < 0) & (left.argmin(0)[column] == rows)
        found = torch.where(mutual, column, found)
        left[mutual] = torch.inf
        left[:, column[mutual]] = torch.inf
    return found


def retrain_head(model: Classifier, split: Split, weight_decay: float, ctx: Context, label: str) -> FitLog:
    """Fit a new last layer to the fixed features of a model, in place, until it converges.

    Features are those of evaluation mode and of images as they are (no crop or flip), so that this is a multinomial
    logistic regression with one optimum, found by L-BFGS from zero.

    Args:
        model: the feature extractor; only its last layer changes.
        split: what the victim trains on.
        weight_decay: L2 penalty of the layer, as in a recipe.
        ctx: progress.
        label: shown beside the progress bar.

    Returns:
        Loss after every 20 iterations.

    Raises:
        NotApplicable: if the model has no linear last layer.
    """
    last, log = head(model), FitLog()
    model.requires_grad_(True)
    given = predict_features(model, split.inputs, precision="fp32").to(model.device)
    labels = split.labels.to(model.device)
    parts = [last.weight] + ([last.bias] if last.bias is not None else [])
    with torch.no_grad():
        for part in parts:
            part.zero_()
    solver = torch.optim.LBFGS(parts, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        loss = F.cross_entropy(last(given), labels) + weight_decay / 2 * sum(p.square().sum() for p in parts)
        for part, gradient in zip(parts, torch.autograd.grad(loss, parts), strict=True):
            part.grad = gradient
        return loss

    for _ in ctx.track(range(20), label, 20):
        started = time.perf_counter()
        log.loss.append(float(solver.step(closure).detach()))
        log.seconds.append(time.perf_counter() - started)
        log.lr.append(1.0)
        log.steps += 20
        if len(log.loss) > 1 and log.loss[-2] - log.loss[-1] < 1e-5 * log.loss[-1]:
            break
    for part in parts:
        part.grad = None
    return log


@dataclass(frozen=True, kw_only=True)
class CollisionAttack(PoisoningAttack):
    """Target-class images that collide with triggered ones; writes :meth:`collide` and :meth:`make_trigger`."""

    label_mode: ClassVar[str] = "clean"
    trigger_visibility: ClassVar[str] = "visible"
    needs_surrogate: ClassVar[bool] = True
    asset_kinds: ClassVar[tuple[str, ...]] = ("clean-surrogate",)

    poison_rate: float | None = class_rate()
    victim: str = param(
        "finetune",
        "trains a new head on the attacker's feature extractor, or everything from scratch",
        choices=("finetune", "scratch"),
        source="paper",
    )
    head_decay: float | None = param(
        None,
        "weight decay of the victim's new head: the lower, the more of a small patch is learned; none = the recipe's",
        low=0,
        source="ours",
    )

    @abstractmethod
    def collide(self, model: Classifier, images: Tensor, sources: Tensor, trigger: Trigger, ctx: Context) -> Tensor:
        """Target-class images whose features collide with those of triggered ones.

        Args:
            model: the surrogate, frozen and in evaluation mode.
            images: uint8 [N,C,H,W], of the target class.
            sources: uint8 [M,C,H,W], of other classes, without trigger.
            trigger: what :meth:`make_trigger` returned.
            ctx: seed, device, progress.

        Returns:
            uint8 [N,C,H,W] on the CPU.
        """

    def poison_inputs(self, trigger: Trigger, inputs: Inputs, indices: Tensor, task: Task, ctx: Context) -> Inputs:
        """The chosen images, made to collide with triggered images of all other classes."""
        others = (task.train.labels != self.target).nonzero().flatten()
        if not len(others):
            raise InputError(f"{self.name}: the training set has no samples of other classes than {self.target}")
        sources = expect_images(take(task.train.inputs, others))
        model = clean_surrogate(task, ctx)
        with frozen(model):
            return self.collide(model, expect_images(inputs), sources, trigger, ctx.child("collide"))

    def run(self, task: Task, ctx: Context) -> Backdoor:
        """Poison, then train the kind of victim that was asked for."""
        if self.victim == "scratch":
            return super().run(task, ctx)
        target_map = self.target_map_for(task)
        trigger = self.make_trigger(task, ctx)
        poison = self.poison(trigger, task, ctx)
        model = clean_surrogate(task, ctx)
        label = f"{self.name}: training the victim's head"
        decay = task.recipe.weight_decay if self.head_decay is None else self.head_decay
        log = retrain_head(model, poison.apply(task.train), decay, ctx, label)
        return Backdoor(model, trigger, target_map, poison, log, notes=self.notes(trigger, poison, task))

    def notes(self, trigger: Trigger, poison: Poison, task: Task) -> dict[str, Any]:
        """Also which victim it was, and by how many grey levels the poisoned images were changed."""
        before = expect_images(take(task.train.inputs, poison.indices)).float()
        change = expect_images(poison.inputs).float() - before
        return super().notes(trigger, poison, task) | {
            "victim": self.victim,
            "largest_change": float(change.abs().max()),
            "rms_change": float(change.square().mean().sqrt()),
        }


def in_levels(model: Classifier, levels: Tensor) -> Tensor:
    """Prepared input of float grey levels in [0, 255] on the model's device."""
    return (levels / 255).contiguous(memory_format=torch.channels_last)
