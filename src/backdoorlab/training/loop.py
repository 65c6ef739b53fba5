"""The one training loop. Methods that train differently hand it an objective or a stamp, never a copy of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

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

OnEpoch = Callable[[int, Classifier], None]
"""(epochs finished, model in training mode) -> None; may change learning state, must not train."""


def cross_entropy(model: Classifier, inputs: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
    """Mean cross-entropy: the ordinary objective."""
    return F.cross_entropy(model(inputs), labels)


@dataclass
class FitLog:
    """What happened: one entry per epoch.

    Attributes:
        loss: mean training loss.
        lr: learning rate of the epoch's last step.
        seconds: wall time.
        steps: optimiser steps in all.
    """

    loss: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    steps: int = 0

    def rows(self) -> list[dict[str, float]]:
        """One JSON-able record per epoch."""
        return [
            {"epoch": i + 1, "loss": loss, "lr": lr, "seconds": seconds}
            for i, (loss, lr, seconds) in enumerate(zip(self.loss, self.lr, self.seconds, strict=True))
        ]


def make_optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser over all parameters that require a gradient, fused where the device allows."""
    params = [p for p in model.parameters() if p.requires_grad]
    fused = params[0].device.type in ("cuda", "cpu")
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(params, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay,
                               nesterov=recipe.nesterov, fused=fused)  # fmt: skip
    return torch.optim.AdamW(params, recipe.lr, weight_decay=recipe.weight_decay, fused=fused)


def fit(
    model: Classifier,
    split: Split,
    recipe: Recipe,
    *,
    objective: Objective = cross_entropy,
    stamp: Stamp | None = None,
    on_epoch: Sequence[OnEpoch] = (),
    context: Context | None = None,
    label: str = "training",
) -> FitLog:
    """Train a model in place.

    Raw data lie on the device as one tensor; batches are gathered, stamped, augmented and prepared there. Losses stay
    on the device until the end of an epoch, so nothing waits for the host in between.

    Args:
        model: moved to the context's device, left in evaluation mode.
        split: training data as the trainer sees them.
        recipe: resolved here for the size of the split.
        objective: the loss of a batch; receives sample indices for per-sample methods.
        stamp: edits raw batches (training-control attacks).
        on_epoch: called after each epoch.
        context: seed, device and progress display; all randomness derives from its seed.
        label: shown beside the progress bar.

    Returns:
        Loss, learning rate and seconds per epoch.

    Raises:
        BackdoorLabError: if the loss becomes infinite or NaN.
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
    with isolated_rng(spawn(generator)):
        for epoch in context.track(range(recipe.epochs), label, recipe.epochs):
            started, total = time.perf_counter(), torch.zeros((), device=device)
            order = torch.randperm(len(split), generator=generator, device=device)
            for step in range(steps):
                indices = order[step * batch : (step + 1) * batch]
                rate = recipe.lr * recipe.factor(epoch * steps + step, steps)
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
                optimizer.step()
                total += loss.detach()
            log.loss.append(float(total) / steps)
            log.lr.append(rate)
            log.seconds.append(time.perf_counter() - started)
            log.steps += steps
            if not math.isfinite(log.loss[-1]):
                raise BackdoorLabError(
                    f"{label} diverged in epoch {epoch + 1} (loss {log.loss[-1]}); a smaller learning rate than "
                    f"{recipe.lr:g} may help"
                )
            for call in on_epoch:
                call(epoch + 1, model)
    model.eval()
    return log
