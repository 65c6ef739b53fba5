"""The one loop in which networks are trained. What a batch does to them is a step's business.

A step owns its optimisers, the modes of its networks and the clipping of its gradients. The loop sets learning rates,
shows progress, collects losses without waiting for the device, watches for a collapse, and stops when it is told to.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from backdoorlab.core.errors import BackdoorLabError
from backdoorlab.core.seeding import derive_seed, isolated_rng
from backdoorlab.training.batches import Epochs
from backdoorlab.training.context import Context
from backdoorlab.training.log import Collapse, FitLog
from backdoorlab.training.watch import Watch

B = TypeVar("B")
B_contra = TypeVar("B_contra", contravariant=True)

Schedule = Callable[[int], float]
"""Number of the step, from 0 -> learning rate as a multiple of the optimiser's own."""


class Step(Protocol[B_contra]):
    """What one batch does."""

    @property
    def modules(self) -> Sequence[nn.Module]:
        """Everything that it changes, and that a collapse takes back."""
        ...

    @property
    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        """Their learning rates follow the schedule, as multiples of those that they had; the log shows the first's."""
        ...

    def __call__(self, batch: B_contra) -> Tensor:
        """Take the step; returns the loss, a detached scalar on the device."""
        ...


class LossStep(Generic[B]):
    """One step of one optimiser down a loss of the batch."""

    def __init__(
        self, loss: Callable[[B], Tensor], optimizer: torch.optim.Optimizer, modules: Sequence[nn.Module] = ()
    ) -> None:
        """``loss`` makes a differentiable scalar; ``modules`` are those whose parameters the optimiser has."""
        self.loss, self.optimizers, self.modules = loss, [optimizer], list(modules)

    def __call__(self, batch: B) -> Tensor:
        """See :class:`Step`."""
        loss, (optimizer,) = self.loss(batch), self.optimizers
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()


def constant(step: int) -> float:
    """The schedule that changes nothing."""
    return 1.0


def run_steps(
    step: Step[B],
    batches: Epochs[B],
    epochs: int,
    *,
    schedule: Schedule = constant,
    watch: Watch | None = None,
    on_epoch: Callable[[int], bool] | None = None,
    context: Context,
    label: str,
    noise: int | None = None,
) -> FitLog:
    """Take a step for every batch of every epoch.

    Losses stay on the device until the end of an epoch. With one epoch, the progress bar counts steps.

    Args:
        step: see :class:`Step`.
        batches: of an epoch, each time they are iterated.
        epochs: how often.
        schedule: of the learning rates.
        watch: judges each epoch; without one, only losses that are not finite end the training.
        on_epoch: called with the number of epochs after each one that is kept, once for each number; True ends the
            training.
        context: progress display, and the seed of ``noise``.
        label: shown beside the progress bar, and in messages.
        noise: seed of torch's global generator (dropout) while the loop runs; None derives one from the context.

    Returns:
        Mean loss, learning rate and seconds of each epoch.

    Raises:
        BackdoorLabError: if the training collapses twice, or once where nothing watches it.
    """
    log, share, reached, length = FitLog(), 1.0, 0, len(batches)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in step.optimizers]

    def epochs_left() -> Iterator[int]:
        while len(log.loss) < epochs:
            yield len(log.loss)

    def shown(items: Iterable[B]) -> Iterable[B]:
        return context.track(items, label, length) if epochs == 1 else items

    numbers = epochs_left() if epochs == 1 else context.track(epochs_left(), label, epochs)
    with isolated_rng(derive_seed(context.seed, "steps") if noise is None else noise):
        for epoch in numbers:
            started, on_device, rate = time.perf_counter(), [], 0.0
            for number, batch in enumerate(shown(batches)):
                factor = schedule(epoch * length + number)
                for optimizer, rates in zip(step.optimizers, peaks, strict=True):
                    for group, peak in zip(optimizer.param_groups, rates, strict=True):
                        group["lr"] = share * peak * factor
                rate = share * peaks[0][0] * factor
                on_device.append(step(batch))
            losses = torch.stack(on_device).tolist()
            seconds = time.perf_counter() - started
            log.steps += length
            collapsed = _unwatched(losses) if watch is None else watch.judge(losses)
            if collapsed is not None:
                if log.collapses or watch is None:
                    again = ", for the second time and with half the learning rate" if log.collapses else ""
                    raise BackdoorLabError(
                        f"{label} diverged in epoch {epoch + 1} (loss {collapsed:g}){again}; "
                        f"a smaller learning rate than {peaks[0][0]:g} may help"
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
            log.loss.append(sum(losses) / length)
            log.lr.append(rate)
            log.seconds.append(seconds)
            if watch is not None:
                watch.keep(epoch + 1, length)
            if epoch + 1 > reached:
                reached = epoch + 1
                if on_epoch is not None and on_epoch(reached):
                    break
    return log


def _unwatched(losses: list[float]) -> float | None:
    return None if all(map(math.isfinite, losses)) else math.nan
