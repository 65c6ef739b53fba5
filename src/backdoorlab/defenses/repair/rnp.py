"""RNP: unlearn the clean task, see which units must go to recover it, and prune these in the original model.

Li et al., "Reconstructive Neuron Pruning for Backdoor Defense", ICML 2023. With a few clean samples,

1. unlearn: the weights of a copy climb the cross-entropy until the accuracy on these samples is close to chance; what
   the backdoor computes stays, as no clean sample speaks of it;
2. recover: with all weights of the unlearned copy frozen, masks m in [0, 1] on its units (1 at first) go down

       min_m  alpha CE(f(x; m * w'), y),

   SGD with momentum, clipped to [0, 1] after every step. Units that stand in the way of the clean task get a small m;
3. prune: units of the original model whose mask fell to the threshold or below are silenced.

Units are the channels of batch norms; in networks without batch norms the outputs of convolutions and of all linear
layers but the head.

Choices and deviations
- The gradient is clipped to norm 20 after the backward pass of its own step; ascent without it explodes.
- Unlearning ends with the first batch whose accuracy is at most ``stop`` times that of the given model. Looking only
  once an epoch of several batches lets the loss rise far beyond, and masks then rank units by noise. The published
  bound of 0.2 belongs to ten classes.
- Masks move at a tenth of the published rate. At that rate many of them soon lie at exactly 0, without any order that a
  cut could follow. ``recover_lr=0.2`` is the published one.
- Both stages count steps, on batches drawn with replacement: a few dozen samples give as many as the published 500.
- Batch norms see batch statistics in both stages; the original's running statistics never change. A mask scales gain
  and bias of its channel, which is what pruning sets to zero.
- Units are cut where clean samples tolerate it: ``tolerance`` of accuracy (relative), thresholds 0, 0.05, ..., 0.95,
  and between the largest tolerable one and the next by numbers of units. All clean samples count, a part of which
  neither stage saw: the held-out ones alone may be a few dozen. ``threshold`` fixes it instead (BackdoorBench: 0.7);
  never does a triggered sample.
- Everything runs in fp32: what decides over a unit is the sum of many small steps.

Limits: with a rate too low nothing is unlearned, all masks stay at 1 and nothing is pruned (the method warns). Units
that serve clean samples and the trigger alike are pruned late or never; if the unit with the smallest mask serves one
class alone, nothing is pruned at all. Triggers that cover the image may survive.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from backdoorlab.core.method import param
from backdoorlab.data.split import Split
from backdoorlab.defenses.base import RepairDefense, defenses
from backdoorlab.defenses.common.pruning import cut_ranking, hold_out, prunable, silence
from backdoorlab.defenses.view import DefenderView
from backdoorlab.models.anatomy import Channels, masked, unit_count
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.batches import Batch, Drawn
from backdoorlab.training.context import Context
from backdoorlab.training.evaluate import predict
from backdoorlab.training.steps import run_steps
from backdoorlab.training.watch import Watch

THRESHOLDS = torch.arange(20) / 20


class Ascent:
    """One step up the cross-entropy of a batch, with the gradient clipped; counts hits for the stop rule."""

    def __init__(self, model: Classifier, lr: float, momentum: float, weight_decay: float, clip: float) -> None:
        self.model, self.clip = model, clip
        self.optimizers = [torch.optim.SGD(model.parameters(), lr, momentum, weight_decay=weight_decay)]
        self.modules = [model]
        self.hits, self.seen = torch.zeros((), device=model.device), 0

    def __call__(self, batch: Batch) -> Tensor:
        """See :class:`~backdoorlab.training.steps.Step`; the loss is the negative cross-entropy."""
        logits = self.model(batch.inputs)
        loss = -F.cross_entropy(logits, batch.labels)
        self.optimizers[0].zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizers[0].step()
        self.hits += (logits.argmax(1) == batch.labels).sum()
        self.seen += len(batch)
        return loss.detach()

    def accuracy(self) -> float:
        """Share of hits since the last call, of each batch before its step."""
        share = float(self.hits) / max(1, self.seen)
        self.hits, self.seen = torch.zeros_like(self.hits), 0
        return share


class MaskDescent:
    """One step of masks down ``alpha`` times the cross-entropy of a batch, then back into [0, 1]."""

    def __init__(self, model: Classifier, groups: Sequence[Channels], lr: float, momentum: float, alpha: float) -> None:
        """Masks of 1 on all units of a model whose parameters are frozen."""
        self.model, self.groups, self.alpha = model, groups, alpha
        self.mask = nn.Parameter(torch.ones(unit_count(groups), device=model.device))
        self.optimizers = [torch.optim.SGD([self.mask], lr, momentum)]
        self.modules = [nn.ParameterList([self.mask])]

    def __call__(self, batch: Batch) -> Tensor:
        """See :class:`~backdoorlab.training.steps.Step`."""
        with masked(self.groups, self.mask):
            loss = self.alpha * F.cross_entropy(self.model(batch.inputs), batch.labels)
        (self.mask.grad,) = torch.autograd.grad(loss, self.mask)
        self.optimizers[0].step()
        with torch.no_grad():
            self.mask.clamp_(0, 1)
        return loss.detach()


def batch_statistics(model: Classifier) -> None:
    """Batch norms see the statistics of their batch, everything else is in evaluation mode."""
    model.eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.train()


@defenses.register
@dataclass(frozen=True, kw_only=True)
class ReconstructiveNeuronPruning(RepairDefense):
    """Prunes the units that the clean task must lose to come back after it was unlearned."""

    name: ClassVar[str] = "rnp"
    paper: ClassVar[str] = "Li et al., Reconstructive Neuron Pruning, ICML 2023"
    year: ClassVar[int] = 2023
    modalities: ClassVar[tuple[str, ...]] = ("image", "text", "audio", "video")

    unlearn_steps: int = param(
        80, "steps of unlearning at most", low=1, source="BackdoorBench: 20 epochs of 500 samples"
    )
    unlearn_lr: float = param(
        0.01, "learning rate of unlearning, a tenth after half of its steps", above=0, source="BackdoorBench"
    )
    weight_decay: float = param(5e-4, "L2 penalty of unlearning", low=0, source="BackdoorBench")
    clip: float = param(20.0, "largest norm of the gradient in unlearning", above=0, source="BackdoorBench")
    stop: float = param(
        0.2, "share of the model's accuracy at which unlearning ends", above=0, high=1, source="BackdoorBench"
    )
    recover_steps: int = param(80, "steps of recovering", low=1, source="BackdoorBench: 20 epochs of 500 samples")
    recover_lr: float = param(0.02, "learning rate of the masks (BackdoorBench: 0.2)", above=0, source="ours")
    alpha: float = param(0.2, "factor of the loss in recovering", above=0, source="BackdoorBench")
    momentum: float = param(0.9, "of SGD in both stages", low=0, high=0.999, source="BackdoorBench")
    batch_size: int = param(128, "samples per batch, drawn with replacement", low=1, source="BackdoorBench")
    threshold: float | None = param(
        None, "prune units with a mask at or below it; none = chosen on the clean samples", low=0, high=1, source="ours"
    )
    tolerance: float = param(
        0.05, "largest relative drop of clean accuracy when choosing", low=0, high=1, source="ours"
    )
    holdout: float = param(0.2, "share of the clean samples that neither stage sees", above=0, high=0.9, source="ours")

    def run(self, view: DefenderView, ctx: Context) -> Classifier:
        """Unlearn, recover, choose the threshold, silence the units below it in a copy."""
        learn, _ = hold_out(view.clean, self.holdout, self.name, ctx)
        mask = self.recover(self.unlearn(view.model, learn, ctx), learn, ctx)
        repaired = copy.deepcopy(view.model).eval()
        groups = prunable(repaired)
        if self.threshold is not None:
            pruned = mask <= self.threshold
        else:
            pruned = cut_ranking(repaired, groups, -mask, -THRESHOLDS - 1e-6, view.clean, self.tolerance)
        count = silence(groups, pruned)
        ctx.reporter.note(f"rnp: pruned {count} of {len(pruned)} units")
        return repaired

    def unlearn(self, model: Classifier, clean: Split, ctx: Context) -> Classifier:
        """A copy that has lost the clean task, with its parameters frozen."""
        work = copy.deepcopy(model)
        prunable(work)
        before = float((predict(work, clean.inputs).argmax(1) == clean.labels.cpu()).double().mean())
        batch_statistics(work)
        step = Ascent(work, self.unlearn_lr, self.momentum, self.weight_decay, self.clip)
        batches = self.batches(clean, work, "unlearn", 1, ctx)
        reached = [before]

        def enough(epoch: int) -> bool:
            reached.append(step.accuracy())
            return reached[-1] <= self.stop * before

        run_steps(
            step,
            batches,
            self.unlearn_steps,
            schedule=lambda number: 1.0 if 2 * number < self.unlearn_steps else 0.1,
            watch=Watch([work], step.optimizers),
            on_epoch=enough,
            context=ctx.child("unlearn"),
            label="rnp: unlearning",
        )
        if reached[-1] > (1 + self.stop) / 2 * before:
            ctx.warn(
                f"rnp: unlearning left an accuracy of {reached[-1]:.2f} of {before:.2f}, so that masks say little; "
                f"a larger unlearn_lr than {self.unlearn_lr:g} may help"
            )
        for parameter in work.parameters():
            parameter.requires_grad_(False)
        return work

    def recover(self, unlearned: Classifier, clean: Split, ctx: Context) -> Tensor:
        """Masks of all units of an unlearned model with frozen parameters: float32 [U] on its device."""
        batch_statistics(unlearned)
        step = MaskDescent(unlearned, prunable(unlearned), self.recover_lr, self.momentum, self.alpha)
        run_steps(
            step,
            self.batches(clean, unlearned, "recover", self.recover_steps, ctx),
            1,
            context=ctx.child("recover"),
            label="rnp: recovering",
        )
        return step.mask.detach()

    def batches(self, clean: Split, model: Classifier, stage: str, steps: int, ctx: Context) -> Drawn:
        """Batches of one stage, so many an epoch, without augmentation."""
        generator = ctx.generator("rnp", stage, device=model.device)
        return Drawn(clean, model.modality, self.batch_size, generator, steps)
