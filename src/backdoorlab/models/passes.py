"""Counts how many samples go through classifiers, forward and backward: the cost of a method, whatever the machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor


@dataclass
class Passes:
    """Samples that went through classifiers while it was counted.

    Attributes:
        forward: samples in calls of classifiers.
        backward: samples in whose logits a gradient arrived; those of losses on inner features alone are not counted.
    """

    forward: int = 0
    backward: int = 0


_open: list[Passes] = []


@contextmanager
def counted() -> Iterator[Passes]:
    """Count inside the block; blocks may be nested, and each one counts everything inside it."""
    passes = Passes()
    _open.append(passes)
    try:
        yield passes
    finally:
        _open.pop()


def count(logits: Tensor) -> None:
    """Count a call of a classifier that gave these logits [B, K], and any backward pass through them."""
    if not _open:
        return
    samples = len(logits)
    for passes in _open:
        passes.forward += samples
    if logits.requires_grad:

        def arrived(_: Tensor) -> None:
            for passes in _open:
                passes.backward += samples

        logits.register_hook(arrived)
