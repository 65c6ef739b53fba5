"""What a training was like: one entry per epoch, and the breakdowns that were taken back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


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
        collapses: what was taken back; at most one per training.
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
