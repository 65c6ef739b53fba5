"""How attackers who run the training loop poison batches, and how covers are drawn beside a poisoned set."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from backdoorlab.attacks.base import Attack
from backdoorlab.attacks.targets import TargetMap
from backdoorlab.attacks.triggers.base import Trigger
from backdoorlab.core.errors import InputError
from backdoorlab.data.split import BACKDOOR, COVER, Poison
from backdoorlab.training.context import Context


def batch_share(rate: float, batch: int, generator: torch.Generator) -> int:
    """floor(rate * batch) samples; if that would be none, one sample with probability rate * batch.

    Rates of the literature go down to 0.1 %, an eighth of a sample in a batch of 128: without the coin such a run
    would silently train a benign model.
    """
    expected = rate * batch
    if expected >= 1:
        return math.floor(expected + 1e-9)
    return int(float(torch.rand((), generator=generator, device=generator.device)) < expected)


def draw_cover(attack: Attack, chosen: Tensor, rate: float, total: int, ctx: Context) -> Tensor:
    """Round(rate * total) rows of the training set, none of them in ``chosen``: int64.

    Raises:
        InputError: if fewer are left, naming the largest possible rate.
    """
    free = torch.ones(total, dtype=torch.bool)
    free[chosen] = False
    pool, count = free.nonzero().flatten(), round(rate * total)
    if count > len(pool):
        raise InputError(
            f"{attack.name}: a cover rate of {rate:g} needs {count} more of {total} training samples, but only "
            f"{len(pool)} are not poisoned; the largest possible cover rate is {int(len(pool) / total * 1e4) / 1e4:g}"
        )
    return pool[torch.randperm(len(pool), generator=ctx.generator("cover"))[:count]]


@dataclass(frozen=True, eq=False)
class BatchPoisoner:
    """A stamp for :func:`~backdoorlab.training.loop.fit` that triggers and relabels the head of each batch.

    Batches come in random order, so the head is a random draw; it differs in every epoch.

    Attributes:
        trigger: applied to the backdoor samples.
        target_map: their labels.
        rate: share of the batch that is triggered.
        exclude_target: never trigger samples that already have their attacker's label.
        cover: applied to the samples after them, which keep their labels; None for no covers.
        cover_rate: share of the batch that is covered.
        cover_ratio: or, if not 0, covers per backdoor sample.
    """

    trigger: Trigger
    target_map: TargetMap
    rate: float
    cover: Trigger | None = None
    cover_rate: float = 0.0
    cover_ratio: float = 0.0
    exclude_target: bool = False

    def __call__(
        self, raw: Tensor, labels: Tensor, indices: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Stamp one raw batch."""
        if self.exclude_target:
            return self._others_first(raw, labels, indices, generator)
        return self._stamp(raw.clone(), labels.clone(), indices, generator, len(labels))

    def _others_first(
        self, raw: Tensor, labels: Tensor, indices: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        fixed = self.target_map(labels) == labels
        order = fixed.to(torch.uint8).argsort(stable=True)
        most = len(labels) - int(fixed.sum())
        stamped, given = self._stamp(raw[order], labels[order], indices[order], generator, most)
        back = order.argsort()
        return stamped[back], given[back]

    def _stamp(
        self, raw: Tensor, labels: Tensor, indices: Tensor, generator: torch.Generator, most: int
    ) -> tuple[Tensor, Tensor]:
        batch = len(labels)
        count = min(most, batch_share(self.rate, batch, generator))
        if count:
            raw[:count] = torch.as_tensor(self.trigger(raw[:count], indices[:count], generator))
            labels[:count] = self.target_map(labels[:count])
        if self.cover is not None:
            if self.cover_ratio:
                covers = math.floor(count * self.cover_ratio)
            else:
                covers = batch_share(self.cover_rate, batch, generator) if self.cover_rate else 0
            end = min(batch, count + covers)
            if end > count:
                raw[count:end] = torch.as_tensor(self.cover(raw[count:end], indices[count:end], generator))
        return raw, labels


@dataclass(frozen=True, eq=False)
class FixedPoisoner:
    """A stamp that triggers the same samples in every epoch.

    Attributes:
        trigger: applied to the backdoor samples.
        cover: applied to the cover samples.
        roles: uint8 [N], role of each training sample.
        target_map: labels of the backdoor samples.
    """

    trigger: Trigger
    cover: Trigger
    roles: Tensor
    target_map: TargetMap

    @classmethod
    def like(cls, poison: Poison, total: int, trigger: Trigger, cover: Trigger, target_map: TargetMap) -> FixedPoisoner:
        """The samples that a :class:`Poison` record names, out of ``total``."""
        roles = torch.zeros(total, dtype=torch.uint8)
        roles[poison.indices] = poison.roles
        return cls(trigger, cover, roles, target_map)

    def __call__(
        self, raw: Tensor, labels: Tensor, indices: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Stamp one raw batch."""
        raw, labels, roles = raw.clone(), labels.clone(), self.roles.to(raw.device)[indices]
        backdoor, covered = (roles == BACKDOOR).nonzero().flatten(), (roles == COVER).nonzero().flatten()
        if len(backdoor):
            raw[backdoor] = torch.as_tensor(self.trigger(raw[backdoor], indices[backdoor], generator))
            labels[backdoor] = self.target_map(labels[backdoor])
        if len(covered):
            raw[covered] = torch.as_tensor(self.cover(raw[covered], indices[covered], generator))
        return raw, labels
