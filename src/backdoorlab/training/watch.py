"""Notices that a training breaks down, and keeps the states that it can be taken back to."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


@dataclass(frozen=True)
class _Kept:
    """A state to go back to, in CPU memory."""

    epoch: int
    modules: list[dict[str, Any]]
    optimizers: list[dict[str, Any]]


class Watch:
    """Judges the losses of each epoch of one training.

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

    def __init__(
        self,
        modules: Sequence[nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        chance: float = math.inf,
        plain: bool = False,
    ) -> None:
        """Watch a training.

        Args:
            modules: everything that is trained.
            optimizers: whatever trains it.
            chance: loss of a model that knows nothing; infinite if the loss may rise without limit.
            plain: whether the loss is the plain cross-entropy.
        """
        self.modules, self.optimizers, self.chance, self.plain = list(modules), list(optimizers), chance, plain
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
        for module, weights in zip(self.modules, state.modules, strict=True):
            module.load_state_dict(weights)
        for optimizer, moments in zip(self.optimizers, state.optimizers, strict=True):
            optimizer.load_state_dict(moments)
        self.recent, self.since = [], 0
        self.kept = [state]
        return state.epoch

    def _copy(self, epoch: int) -> _Kept:
        def copied(value: Any) -> Any:
            return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)

        return _Kept(
            epoch,
            [tree_map(copied, dict(module.state_dict())) for module in self.modules],
            [tree_map(copied, optimizer.state_dict()) for optimizer in self.optimizers],
        )

    def _finite(self) -> bool:
        tensors = (v for module in self.modules for v in module.state_dict().values() if isinstance(v, Tensor))
        values = [v for v in tensors if v.is_floating_point() and v.numel()]
        return bool(torch.stack(torch._foreach_norm(values, math.inf)).isfinite().all())
