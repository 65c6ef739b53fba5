"""The one training loop. Methods that train differently hand it an objective or a stamp, never a copy of it."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from backdoorlab.core.errors import BackdoorLabError, InputError
from backdoorlab.core.seeding import isolated_rng, spawn
from backdoorlab.data.split import Split
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.context import Context, autocast
from backdoorlab.training.recipes import Recipe

Objective = Callable[[Classifier, Tensor, Tensor, Tensor], Tensor]
"""(model, prepared batch, labels int64 [B], sample indices int64 [B]) -> scalar loss to be minimised."""

Stamp = Callable[[Tensor, Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
"""(encoded raw batch, labels, sample indices, generator) -> (raw batch, labels): what an attacker who controls
training does to each batch before augmentation."""

_ENOUGH = 100
"""Steps after which a training must have learned something."""

OnEpoch = Callable[[int, Classifier], None]
"""(epochs finished, model in training mode) -> None; may change learning state, must not train."""


def cross_entropy(model: Classifier, inputs: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
    """Mean cross-entropy: the ordinary objective."""
    return F.cross_entropy(model(inputs), labels)


@dataclass(frozen=True)
class Collapse:
    """A training that broke down and was taken back.

    Attributes:
        epoch: in which it was noticed, from 1.
        loss: mean of the latest steps; None if it or a weight was not finite.
        lr: learning rate of the epoch's last step.
        seconds: wall time of the epoch.
        back_to: epoch after which training went on, with half the learning rate; 0 is the initial weights.
    """

    epoch: int
    loss: float | None
    lr: float
    seconds: float
    back_to: int

    def row(self) -> dict[str, Any]:
        """JSON-able."""
        return {"epoch": self.epoch, "loss": self.loss, "lr": self.lr, "seconds": self.seconds, "back_to": self.back_to}


@dataclass
class FitLog:
    """What happened: one entry per epoch that the model went through.

    Attributes:
        loss: mean training loss.
        lr: learning rate of the epoch's last step.
        seconds: wall time.
        steps: optimiser steps in all, those that were taken back included.
        collapses: what was taken back; at most one per call of :func:`fit`.
    """

    loss: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    steps: int = 0
    collapses: list[Collapse] = field(default_factory=list)

    def __add__(self, more: FitLog) -> FitLog:
        """The log of two trainings in a row."""
        return FitLog(
            self.loss + more.loss,
            self.lr + more.lr,
            self.seconds + more.seconds,
            self.steps + more.steps,
            self.collapses + more.collapses,
        )

    def rows(self) -> list[dict[str, Any]]:
        """One JSON-able record per epoch, then one per collapse (with "back_to")."""
        epochs = zip(self.loss, self.lr, self.seconds, strict=True)
        kept = [{"epoch": i + 1, "loss": loss, "lr": lr, "seconds": s} for i, (loss, lr, s) in enumerate(epochs)]
        return kept + [collapse.row() for collapse in self.collapses]

    def notes(self) -> dict[str, Any]:
        """For a card: the collapses, or nothing if there was none."""
        return {"collapses": [collapse.row() for collapse in self.collapses]} if self.collapses else {}


@dataclass(frozen=True)
class _Kept:
    """A state to go back to, in CPU memory."""

    epoch: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]


class _Watch:
    """Notices that a training breaks down, and keeps what it can go back to.

    The loss that is judged is the mean of the latest quarter epoch, at least ten steps: a spike that is over by the
    end of its epoch does not count. "Chance" is the loss of a model that knows nothing. A training has collapsed if

    - a loss, a weight or a running statistic is not finite;
    - its loss exceeds the start (chance, or the loss of the very first step if that is higher) by a quarter, or by a
      factor of two under an objective that is not the plain cross-entropy, whose scale is not known;
    - under plain cross-entropy, it had fallen below 0.7 of chance and is back at 0.95 or more.
    """

    WINDOW = 10
    APART = 20
    """Steps between two states that are kept, at least: with few steps an epoch, copying would cost too much."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, chance: float, plain: bool) -> None:
        self.model, self.optimizer, self.chance, self.plain = model, optimizer, chance, plain
        self.start, self.lowest, self.since = math.nan, math.inf, 0
        self.recent: list[float] = []
        self.kept = [self._copy(0)]

    def judge(self, losses: list[float]) -> float | None:
        """The loss, if the epoch with these losses of its steps has collapsed (NaN if it is not finite), else None."""
        if math.isnan(self.start):
            self.start = max(losses[0], self.chance) if math.isfinite(losses[0]) else self.chance
        if not all(map(math.isfinite, losses)) or not self._finite():
            return math.nan
        self.recent += losses
        del self.recent[: -max(self.WINDOW, len(losses) // 4)]
        loss = sum(self.recent) / len(self.recent)
        if len(self.recent) >= self.WINDOW:
            if loss > self.start * (1.25 if self.plain else 2.0):
                return loss
            if self.plain and self.lowest < 0.7 * self.chance and loss > 0.95 * self.chance:
                return loss
        self.lowest = min(self.lowest, sum(losses) / len(losses))
        return None

    def keep(self, epoch: int, steps: int) -> None:
        """Keep the state after a good epoch, and the one before it."""
        self.since += steps
        if self.since >= self.APART:
            self.kept, self.since = [self.kept[-1], self._copy(epoch)], 0

    def restore(self, losses: list[float]) -> int:
        """Go back, after an epoch with these losses that collapsed; returns the epoch whose end it went back to.

        If its very first loss, which is that of the latest state kept, is bad already, the state before is taken.
        """
        state = self.kept[-1 if losses[0] <= self.start else 0]
        self.model.load_state_dict(state.model)
        self.optimizer.load_state_dict(state.optimizer)
        self.recent, self.since = [], 0
        self.kept = [state]
        return state.epoch

    def _copy(self, epoch: int) -> _Kept:
        def copied(value: Any) -> Any:
            return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)

        return _Kept(
            epoch, tree_map(copied, dict(self.model.state_dict())), tree_map(copied, self.optimizer.state_dict())
        )

    def _finite(self) -> bool:
        tensors = (v for v in self.model.state_dict().values() if isinstance(v, Tensor))
        values = [v for v in tensors if v.is_floating_point() and v.numel()]
        return bool(torch.stack(torch._foreach_norm(values, math.inf)).isfinite().all())


def make_optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser over all parameters that require a gradient, fused where the device allows."""
    params = [p for p in model.parameters() if p.requires_grad]
    fused = params[0].device.type in ("cuda", "cpu")
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            params, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=recipe.nesterov, fused=fused
        )
    return torch.optim.AdamW(params, recipe.lr, weight_decay=recipe.weight_decay, fused=fused)


def fit(
    model: Classifier,
    split: Split,
    recipe: Recipe,
    *,
    objective: Objective = cross_entropy,
    stamp: Stamp | None = None,
    on_epoch: Sequence[OnEpoch] = (),
    chance: float | None = None,
    context: Context | None = None,
    label: str = "training",
) -> FitLog:
    """Train a model in place.

    Raw data lie on the device as one tensor; batches are gathered, stamped, augmented and prepared there. Losses stay
    on the device until the end of an epoch, so nothing waits for the host in between.

    A training that collapses (:class:`_Watch` says when) is noticed at the end of the epoch, told to the reporter,
    taken back to the last good epoch (model and optimiser; what else an objective trains stays as it is) and continued
    with half the learning rate. That happens once; a second collapse is an error. So is a training by plain
    cross-entropy that took at least 100 steps and ends no better than chance.

    Args:
        model: moved to the context's device, left in evaluation mode.
        split: training data as the trainer sees them.
        recipe: resolved here for the size of the split.
        objective: the loss of a batch; receives sample indices for per-sample methods.
        stamp: edits raw batches (training-control attacks).
        on_epoch: called after each epoch that is kept, once for each number.
        chance: loss of a model that knows nothing, by which a collapse is recognised; None = ln K. ``math.inf``
            declares that the loss may rise without limit (gradient ascent): only values that are not finite count.
        context: seed, device and progress display; all randomness derives from its seed.
        label: shown beside the progress bar.

    Returns:
        Loss, learning rate and seconds per epoch.

    Raises:
        BackdoorLabError: if the training collapses twice, or learned nothing.
        InputError: if the split is empty.
    """
    context = context or Context()
    device, generator = context.device, context.generator("fit", device=context.device)
    if not len(split):
        raise InputError("cannot train on an empty set")
    recipe = recipe.resolve(len(split))
    model.to(device).train()
    table, labels = model.modality.encode(split.inputs).to(device), split.labels.to(device)
    if table.dim() == 4:  # rows in the order in which crops, flips and convolutions read them
        table = table.contiguous(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, recipe)
    compute = torch.compile(objective, dynamic=False) if recipe.compile else objective
    steps, batch, log = len(split) // recipe.batch_size, recipe.batch_size, FitLog()
    plain = objective is cross_entropy
    chance = math.log(max(2, model.num_classes)) if chance is None else chance
    watch, share, reached, losses = _Watch(model, optimizer, chance, plain), 1.0, 0, []

    def epochs_left() -> Iterator[int]:
        while len(log.loss) < recipe.epochs:
            yield len(log.loss)

    params = [p for p in model.parameters() if p.requires_grad]
    with isolated_rng(spawn(generator)):
        for epoch in context.track(epochs_left(), label, recipe.epochs):
            started, on_device = time.perf_counter(), []
            order = torch.randperm(len(split), generator=generator, device=device)
            for step in range(steps):
                indices = order[step * batch : (step + 1) * batch]
                rate = share * recipe.lr * recipe.factor(epoch * steps + step, steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                raw, wanted = table[indices], labels[indices]
                if stamp is not None:
                    raw, wanted = stamp(raw, wanted, indices, generator)
                inputs = model.modality.prepare(raw, train=recipe.augment, generator=generator)
                with autocast(device, recipe.precision):
                    loss = compute(model, inputs, wanted, indices)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                if recipe.clip:
                    torch.nn.utils.clip_grad_norm_(params, recipe.clip, foreach=True)
                optimizer.step()
                on_device.append(loss.detach())
            losses = torch.stack(on_device).tolist()
            seconds = time.perf_counter() - started
            log.steps += steps
            collapsed = watch.judge(losses)
            if collapsed is not None:
                if log.collapses:
                    raise BackdoorLabError(
                        f"{label} diverged in epoch {epoch + 1} (loss {collapsed:g}), for the second time and with "
                        f"half the learning rate; a smaller learning rate than {recipe.lr:g} may help"
                    )
                back, share = watch.restore(losses), share / 2
                finite = collapsed if math.isfinite(collapsed) else None
                log.collapses.append(Collapse(epoch + 1, finite, rate, seconds, back))
                for row in (log.loss, log.lr, log.seconds):
                    del row[back:]
                context.warn(
                    f"{label}: collapsed in epoch {epoch + 1} (loss {collapsed:.3g}, at the start {watch.start:.3g}); "
                    f"going on from {f'epoch {back}' if back else 'the start'} with half the learning rate"
                )
                continue
            log.loss.append(sum(losses) / steps)
            log.lr.append(rate)
            log.seconds.append(seconds)
            watch.keep(epoch + 1, steps)
            if epoch + 1 > reached:
                reached = epoch + 1
                for call in on_epoch:
                    call(reached, model)
    if plain and steps * recipe.epochs >= _ENOUGH and log.loss[-1] >= chance:
        raise BackdoorLabError(
            f"{label} learned nothing: its loss ends at {log.loss[-1]:.3g}, chance is {chance:.3g}; another "
            f"learning rate than {recipe.lr:g} may help"
        )
    model.eval()
    return log
