"""NAB for single inputs: what the defensive stamp changes was triggered.

Liu, Sangiovanni-Vincentelli, Yue, "Beating Backdoor Attack at Its Own Game", ICCV 2023 (arXiv 2307.15539); how the
model with its stamp is trained is described in :mod:`~backdoorlab.defenses.training.nab`. That model still obeys the
trigger where the stamp is missing. An input is rejected if its prediction without the stamp is not the prediction with
it. With c the class predicted without, the score is

    max_{k != c} p_k(stamped) - p_c(stamped)

which is above 0, the threshold, exactly if the prediction changes; no clean samples are needed.

The suspicious model is not looked at: the detector belongs to the training set.

Limits: those of the training. Costs a whole training of NAB, then two passes an input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backdoorlab.data.split import Inputs
from backdoorlab.defenses.base import InputDefense, InputDetector, defenses
from backdoorlab.defenses.training.nab import NonAdversarialBackdoor, StampedClassifier
from backdoorlab.defenses.view import DefenderView
from backdoorlab.training.context import Context, autocast


def disagreement(plain: Tensor, stamped: Tensor) -> Tensor:
    """How much likelier another class than the one predicted without the stamp is with it: float32 [B] in [-1, 1].

    Args:
        plain: logits [B, K] without the stamp.
        stamped: logits [B, K] with it.
    """
    said = plain.argmax(1, keepdim=True)
    sure = stamped.float().softmax(1)
    return sure.scatter(1, said, -1.0).amax(1) - sure.gather(1, said).squeeze(1)


@dataclass(frozen=True, eq=False)
class StampDetector(InputDetector):
    """Scores inputs by what the stamp does to their prediction."""

    model: StampedClassifier
    batch_size: int = 500
    threshold: float = 0.0

    def score(self, inputs: Inputs) -> Tensor:
        """Disagreement of raw inputs: float32 [N] on the CPU."""
        model, parts = self.model, []
        with torch.inference_mode(), autocast(model.device):
            for start in range(0, len(inputs), self.batch_size):
                raw = model.modality.encode(inputs[start : start + self.batch_size]).to(model.device)
                x = model.modality.prepare(raw)
                parts.append(disagreement(model.without_stamp(x), model(x)).float().cpu())
        return torch.cat(parts).clone() if parts else torch.zeros(0)


@defenses.register
@dataclass(frozen=True, kw_only=True)
class NonAdversarialBackdoorInput(NonAdversarialBackdoor, InputDefense):
    """Rejects inputs whose prediction changes with the stamp."""

    name: ClassVar[str] = "nab_input"
    paper: ClassVar[str] = "Liu et al., Beating Backdoor Attack at Its Own Game, ICCV 2023, arXiv 2307.15539"
    year: ClassVar[int] = 2023
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    reads: ClassVar[tuple[str, ...]] = ("suspicious", "blueprint")
    needs_clean_fraction: ClassVar[float] = 0.0

    def run(self, view: DefenderView, ctx: Context) -> StampDetector:
        """Train the model with its stamp."""
        model, _, _, _ = self.train_stamped(view.suspicious, view.blueprint, ctx, self.name)
        return StampDetector(model)
