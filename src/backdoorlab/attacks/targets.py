"""Which class a triggered sample should be taken for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TargetMap:
    """What a triggered sample should be classified as.

    Attributes:
        mode: "all-to-one" (class ``target``) or "all-to-all" (true label + 1 mod K).
        target: the class of "all-to-one".
        num_classes: K.
        sources: true classes whose triggered samples count, for attacks defined for some classes only; empty = all.
    """

    mode: str
    target: int
    num_classes: int
    sources: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """A stored record has a list."""
        object.__setattr__(self, "sources", tuple(self.sources))

    def __call__(self, labels: Tensor) -> Tensor:
        """Attacker's labels for true labels, int64 [N]."""
        if self.mode == "all-to-all":
            return (labels + 1) % self.num_classes
        return torch.full_like(labels, self.target)

    def eligible(self, labels: Tensor) -> Tensor:
        """Samples whose triggered version counts for ASR, bool [N]; in "all-to-one" not those of the target class."""
        counts = torch.ones_like(labels, dtype=torch.bool) if self.mode == "all-to-all" else labels != self.target
        return counts & torch.isin(labels, labels.new_tensor(self.sources)) if self.sources else counts
