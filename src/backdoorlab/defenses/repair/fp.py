"""FP: prune what clean samples leave dormant, then fine-tune.

Liu et al., "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks", RAID 2018. Units that a
backdoor uses may sleep while a model sees clean samples. With the penultimate features h and the defender's samples,

    a_j = mean_i |h_j(x_i)|,

units are pruned in ascending order of a_j, a hundredth of them at a time, until the accuracy on held-out clean samples
has fallen by more than ``tolerance`` (relative); the step before that is kept. Then the whole model is fine-tuned on
all clean samples, with the pruned units still silent.

Penultimate units are what the last linear layer receives, and a unit is silenced by a zero column in that layer. Behind
a global pooling that is the same as pruning channels of the last convolutional layer, as in the paper.

Choices and deviations
- |h| instead of h: features without a ReLU in front of the pooling have a sign, and a unit far below 0 is not dormant.
  For features behind a ReLU nothing changes.
- The stopping rule uses the held-out part of the clean samples, never test data, and the step that goes too far is
  undone. Accuracies of all steps come from one pass over the held-out samples: only the last layer changes.
- During fine-tuning the gradients of the pruned columns are zero; a weight decay leaves zeros as they are. The stored
  weights are those that were measured.
- Fine-tuning as in :mod:`~backdoorlab.defenses.repair.ft`, normalisation layers included, which is a large part of the
  effect. ``epochs=0`` prunes alone.

Limits: pruning alone hardly touches a backdoor whose units are also used by clean samples (narrow networks, triggers
that cover the image), as the paper's "pruning-aware" attacker shows; fine-tuning then does the work, and its learning
rate decides. Published numbers differ widely between implementations.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from backdoorlab.core.method import param
from backdoorlab.defenses.base import RepairDefense, defenses
from backdoorlab.defenses.common.finetuning import finetuning_recipe
from backdoorlab.defenses.common.pruning import hold_out
from backdoorlab.defenses.view import DefenderView
from backdoorlab.models.anatomy import head
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.context import Context
from backdoorlab.training.evaluate import predict_features
from backdoorlab.training.loop import fit


def dormancy(features: Tensor) -> Tensor:
    """Units from the most dormant to the most active, by their mean absolute value: [N, D] -> int64 [D]."""
    return features.abs().mean(0).argsort(stable=True)


def accuracy_by_step(features: Tensor, labels: Tensor, layer: nn.Linear, order: Tensor, step: int) -> Tensor:
    """Accuracy of a linear layer when 0, ``step``, 2 ``step``, ... of its inputs are zero, all but one at most.

    Args:
        features: float32 [N, D], inputs of the layer.
        labels: int64 [N].
        layer: D inputs.
        order: int64 [D], in which inputs are zeroed.
        step: how many at a time.

    Returns:
        float64 [1 + (D - 1) // step].
    """
    weight = layer.weight.detach().float().cpu()
    logits = features @ weight.T
    if layer.bias is not None:
        logits = logits + layer.bias.detach().float().cpu()
    found = [(logits.argmax(1) == labels).double().mean()]
    for columns in order[: (len(order) - 1) // step * step].split(step):
        logits = logits - features[:, columns] @ weight[:, columns].T
        found.append((logits.argmax(1) == labels).double().mean())
    return torch.stack(found)


def steps_before_the_drop(accuracy: Tensor, tolerance: float) -> int:
    """How many steps come before the first one with a relative drop of more than ``tolerance`` (all, if none has)."""
    fallen = (accuracy[1:] < accuracy[0] * (1 - tolerance) - 1e-9).nonzero()
    return int(fallen[0]) if len(fallen) else len(accuracy) - 1


@contextmanager
def kept_at_zero(layer: nn.Linear, columns: Tensor) -> Iterator[None]:
    """Inside the block, gradients of some columns of a layer's weight (int64) are zero."""
    keep = torch.ones_like(layer.weight)
    keep[:, columns.to(keep.device)] = 0
    handle = layer.weight.register_hook(lambda grad: grad * keep)
    try:
        yield
    finally:
        handle.remove()


@defenses.register
@dataclass(frozen=True, kw_only=True)
class FinePruning(RepairDefense):
    """Prunes dormant units of the last layer, then fine-tunes."""

    name: ClassVar[str] = "fp"
    paper: ClassVar[str] = "Liu et al., Fine-Pruning, RAID 2018"
    year: ClassVar[int] = 2018
    modalities: ClassVar[tuple[str, ...]] = ("image", "text", "audio", "video")
    aliases: ClassVar[tuple[str, ...]] = ("fine_pruning",)
    may_read: ClassVar[tuple[str, ...]] = ("blueprint",)

    step: float = param(0.01, "share of the units pruned at a time", above=0, high=1, source="BackdoorBench")
    tolerance: float = param(
        0.1, "largest relative drop of held-out accuracy, at which pruning stops", low=0, high=1, source="BackdoorBench"
    )
    holdout: float = param(
        0.2, "share of the clean samples on which accuracy is watched", above=0, high=0.9, source="ours"
    )
    epochs: int = param(100, "of fine-tuning, 0 for none", low=0, source="BackdoorBench")
    lr: float | None = param(
        None,
        "peak learning rate of SGD (AdamW: a tenth); none = that of the model's training, 0.01 where it is not known",
        above=0,
        source="BackdoorBench: 0.01 for both",
    )
    batch_size: int = param(256, "samples per step of fine-tuning", low=1, source="BackdoorBench")
    weight_decay: float = param(5e-4, "L2 penalty of fine-tuning", low=0, source="BackdoorBench")

    def run(self, view: DefenderView, ctx: Context) -> Classifier:
        """Rank, prune, fine-tune a copy."""
        clean = view.clean
        ranking, held = hold_out(clean, self.holdout, self.name, ctx)
        repaired = copy.deepcopy(view.model).eval()
        last = head(repaired)
        order = dormancy(predict_features(repaired, ranking.inputs))
        step = math.ceil(self.step * len(order))
        watched = predict_features(repaired, held.inputs)
        accuracy = accuracy_by_step(watched, held.labels.cpu(), last, order, step)
        pruned = order[: step * steps_before_the_drop(accuracy, self.tolerance)]
        with torch.no_grad():
            last.weight[:, pruned.to(last.weight.device)] = 0
        ctx.reporter.note(f"fp: pruned {len(pruned)} of {len(order)} units")
        if self.epochs:
            recipe = finetuning_recipe(
                view,
                epochs=self.epochs,
                lr=self.lr,
                batch_size=self.batch_size,
                weight_decay=self.weight_decay,
            )
            with kept_at_zero(last, pruned):
                fit(repaired, clean, recipe, context=ctx, label="fp: fine-tuning")
        return repaired
