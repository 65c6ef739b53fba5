"""Blind: the attack sits in the loss; no poisoned data ever exist.

Bagdasaryan, Shmatikov, "Blind Backdoors in Deep Learning Models", USENIX Security 2021 (arXiv 2005.03823).

Whoever controls the loss code computes, from each ordinary batch, a clean loss and one for the same batch with the
trigger and the attacker's labels, and trains on their weighted sum:

    l = w_n CE(f(x), y) + w_b CE(f(T(x)), t)

The weights are fixed, or those of the shortest convex combination of both gradients ("MGDA"; each gradient divided
beforehand by min(loss norm, 10)):

    w_n = clamp(<g_b - g_n, g_b> / |g_n - g_b|^2, 0, 1),   w_b = 1 - w_n

The attack waits until the clean loss, averaged over a window of batches, falls below a threshold. T is a fixed pattern
of 5x3 pixels near the upper right.

Choices: clean and triggered samples go through the network in one batch, so that batch norms see a single mixture
(two passes are one cause of the poor clean accuracy of earlier implementations). The gate stays open once it has
opened instead of toggling; its threshold is 1, or ln(K) / 2 for more than ten classes; its window is the published 1000
batches as a share of the published training (39 000 steps), applied to the recipe. Position and size follow the image:
multiples of 5x3, at least one. w_b = 0.5 instead of 0.9, which costs less clean accuracy. Every sample is attacked in
every batch: poison rate and ``exclude_target`` do not influence training, only the snapshot kept with the result.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorlab.attacks.base import attacks
from backdoorlab.attacks.poisoning import TrainingAttack
from backdoorlab.attacks.result import Backdoor
from backdoorlab.attacks.targets import TargetMap
from backdoorlab.attacks.triggers.patch import PatchTrigger
from backdoorlab.core.errors import BackdoorLabError, InputError
from backdoorlab.core.method import param
from backdoorlab.modalities.filters import expect_images
from backdoorlab.models.classifier import Classifier
from backdoorlab.tasks import Task
from backdoorlab.training.context import Context

PATTERN = ((1, 0, 1), (-1, 1, -1), (-1, -1, 0), (-1, 1, -1), (1, 0, 1))
"""1 is white, 0 black, -1 leaves the pixel alone; at rows 3 to 7, columns 23 to 25 of 32x32."""


def draw_pattern(channels: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The pattern on an empty canvas: uint8 [channels, height, width] and its mask bool [height, width].

    Raises:
        InputError: if it does not fit.
    """
    times = max(1, round(min(height, width) / 32))
    cells = torch.tensor(PATTERN).repeat_interleave(times, 0).repeat_interleave(times, 1)
    rows, columns = cells.shape
    if rows > height or columns > width:
        raise InputError(f"blind: a pattern of {rows}x{columns} px does not fit an image of {height}x{width}")
    top, left = min(round(3 * height / 32), height - rows), min(round(23 * width / 32), width - columns)
    canvas = torch.full((height, width), -1)
    canvas[top : top + rows, left : left + columns] = cells
    return (canvas.clamp_min(0) * 255).to(torch.uint8).repeat(channels, 1, 1), canvas >= 0


def min_norm_weight(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Weight w in [0, 1] for which w first + (1 - w) second is shortest, each a list of tensors: scalar."""
    product = torch.stack([((b - a) * b).sum() for a, b in zip(first, second, strict=True)]).sum()
    square = torch.stack([(a - b).square().sum() for a, b in zip(first, second, strict=True)]).sum()
    return (product / square.clamp_min(1e-12)).clamp(0, 1)


def mgda_weights(model: Classifier, clean: Tensor, backdoor: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of two losses of one graph, which is kept: scalars without gradient."""
    params = [p for p in model.parameters() if p.requires_grad]
    scaled = []
    for loss in (clean, backdoor):
        grads = torch.autograd.grad(loss, params, retain_graph=True)
        norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        scale = (loss.detach() * norm).clamp(1e-12, 10)
        scaled.append([g / scale for g in grads])
    weight = min_norm_weight(*scaled)
    return weight, 1 - weight


@dataclass(eq=False)
class BlindObjective:
    """The loss with the attack in it.

    Attributes:
        pattern: float32 [C,H,W] in [0, 1].
        mask: bool [H,W].
        target_map: labels of triggered samples.
        window: batches over which the clean loss is averaged.
        threshold: the gate opens when that average is below it.
        weights: (clean, backdoor), or None for MGDA.
        waited: batches before the gate opened.
        open: whether it has.
    """

    pattern: Tensor
    mask: Tensor
    target_map: TargetMap
    window: int
    threshold: float
    weights: tuple[float, float] | None
    waited: int = 0
    open: bool = False
    recent: deque[float] = field(default_factory=deque)

    def __call__(self, model: Classifier, inputs: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """Loss of a batch prepared for training."""
        if not self.open:
            loss = F.cross_entropy(model(inputs), labels)
            self._watch(float(loss.detach()))
            return loss
        triggered = torch.where(self.mask, self.pattern, inputs)
        logits, stamped = model(torch.cat([inputs, triggered])).chunk(2)
        clean, backdoor = F.cross_entropy(logits, labels), F.cross_entropy(stamped, self.target_map(labels))
        w_n, w_b = self.weights or mgda_weights(model, clean, backdoor)
        return w_n * clean + w_b * backdoor

    def _watch(self, loss: float) -> None:
        self.waited += 1
        self.recent.append(loss)
        if len(self.recent) > self.window:
            self.recent.popleft()
        self.open = len(self.recent) == self.window and sum(self.recent) / self.window < self.threshold


@attacks.register
@dataclass(frozen=True, kw_only=True)
class Blind(TrainingAttack):
    """A second loss term on the same batch."""

    name: ClassVar[str] = "blind"
    paper: ClassVar[str] = "Bagdasaryan and Shmatikov, Blind Backdoors, USENIX Security 2021, arXiv 2005.03823"
    year: ClassVar[int] = 2021
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    trigger_visibility: ClassVar[str] = "visible"

    weighting: str = param("fixed", "how the two losses are weighted", choices=("fixed", "mgda"), source="paper")
    clean_weight: float = param(1.0, "weight of the clean loss with weighting=fixed", above=0, source="paper")
    backdoor_weight: float = param(0.5, "weight of the backdoor loss with weighting=fixed", above=0, source="ours")
    gate_window: float = param(
        0.026,
        "batches over which the clean loss is averaged before the attack begins / all training steps",
        low=0,
        high=1,
        source="BackdoorBench",
    )
    gate_threshold: float | None = param(
        None, "clean loss below which the attack begins; none = 1, or ln(K) / 2 for K > 10", above=0, source="ours"
    )

    def run(self, task: Task, ctx: Context) -> Backdoor:
        """Train with both losses.

        Raises:
            BackdoorLabError: if the gate never opened, for then the model is benign.
        """
        target_map = self.target_map_for(task)
        channels, height, width = expect_images(task.train.inputs).shape[1:]
        trigger = PatchTrigger(*draw_pattern(channels, height, width))
        recipe = task.recipe.resolve(len(task.train))
        steps = recipe.epochs * (len(task.train) // recipe.batch_size)
        threshold = self.gate_threshold or (1.0 if task.num_classes <= 10 else 0.5 * math.log(task.num_classes))
        weights = (self.clean_weight, self.backdoor_weight) if self.weighting == "fixed" else None
        objective = BlindObjective(
            trigger.pattern.to(ctx.device) / 255,
            trigger.mask.to(ctx.device),
            target_map,
            max(1, round(self.gate_window * steps)),
            threshold,
            weights,
        )
        self.warn_if_too_weak(trigger, task, ctx)
        poison = self.replay(trigger, task, ctx)
        model, log = task.fit(task.train, ctx, objective=objective, label=f"{self.name}: training the victim")
        if not objective.open:
            raise BackdoorLabError(
                f"{self.name}: the clean loss never fell below {threshold:g}, so the attack never began and the model "
                "is benign; train longer (another recipe) or raise gate_threshold"
            )
        notes = {"schedule": task.recipe.name, "batches_waited": objective.waited}
        return Backdoor(model, trigger, target_map, poison, log, notes=notes)
