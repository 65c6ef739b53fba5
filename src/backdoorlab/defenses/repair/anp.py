"""ANP: prune the neurons that react most to adversarial noise on their weights.

Wu and Wang, "Adversarial Neuron Pruning Purifies Backdoored Deep Models", NeurIPS 2021. Every unit gets a mask m in
[0, 1] and, for the adversary, relative noise (d, x) in [-eps, eps] on weight and bias. With batch norms the units are
their channels, weight g and bias b:

    min_m  alpha L(m g, b) + (1 - alpha) max_{d, x} L((m + d) g, (1 + x) b)

on clean samples. The inner maximum starts at random and takes ``steps`` sign-gradient steps of eps / steps; the outer
step is SGD with momentum on m alone, clipped to [0, 1]. Units whose mask fell to the threshold or below are pruned.

Choices and deviations
- Only masks leave the optimisation: it runs on a copy whose batch norms see batch statistics (as in the paper), the
  pruned units are then silenced, weight *and* bias, in the untouched original. Running statistics never drift.
- The noise is projected back into [-eps, eps] after every step; a random start plus one step of eps would reach 2
  eps.
- No weight decay on masks.
- Models without batch norm carry masks and noise on the outputs of convolutions and linear layers (all but the head).
- Masks are optimised in fp32: what decides over a unit is the sum of many small steps.
- Units are pruned in the order of their masks, as many as lose at most ``tolerance`` of the accuracy on the clean
  samples (relative); triggered data are never looked at. Thresholds 0, 0.05, ..., 0.95 are tried, every one, as
  accuracy is no monotone function of them (a unit that does harm alone may be harmless once others are gone); between
  the largest tolerable one and the next the cut is refined by numbers of units: where masks crowd, one step of 0.05
  may be the difference between a live backdoor and a broken network. ``threshold`` fixes it instead
  (paper: 0.2). All clean samples count, a part of which was held out from the optimisation of the masks: the held-out
  ones alone may be a few dozen, of which a handful decides.

Limits: pruning needs channels to spare. In a narrow network the backdoor shares its channels with the clean task, and
even those that a trigger moves most cannot be silenced without loss. A trigger that covers the image may be carried by
many channels.
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

from backdoorlab.core.errors import InputError
from backdoorlab.core.method import param
from backdoorlab.data.split import Split
from backdoorlab.defenses.base import RepairDefense, defenses
from backdoorlab.defenses.common.pruning import cut_ranking, prunable, silence
from backdoorlab.defenses.view import DefenderView
from backdoorlab.models.anatomy import Channels, masked, unit_count
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.batches import Batch, Drawn
from backdoorlab.training.context import Context
from backdoorlab.training.steps import run_steps

THRESHOLDS = torch.arange(20) / 20


def adversarial_noise(
    model: Classifier,
    groups: Sequence[Channels],
    mask: Tensor,
    inputs: Tensor,
    labels: Tensor,
    start: Tensor,
    eps: float,
    steps: int,
) -> Tensor:
    """Noise that raises the loss most, by sign-gradient ascent inside the box.

    Args:
        model: fed with prepared ``inputs``.
        groups: its units, U in all.
        mask: [U], held fixed.
        inputs: prepared batch.
        labels: int64 [B].
        start: [2, U], noise on weights and biases to start from.
        eps: half the side of the box.
        steps: each of eps / steps.

    Returns:
        [2, U] in [-eps, eps].
    """
    noise = start
    for _ in range(steps):
        noise = noise.detach().requires_grad_()
        with masked(groups, mask.detach() + noise[0], 1 + noise[1]):
            loss = F.cross_entropy(model(inputs), labels)
        (slope,) = torch.autograd.grad(loss, noise)
        noise = (noise + eps / steps * slope.sign()).clamp(-eps, eps)
    return noise.detach()


class MaskStep:
    """Noise that does most harm, then a step of the masks against it.

    Attributes:
        mask: [U], of all prunable units.
        modules: none; the network does not change.
        optimizers: SGD on the mask.
    """

    modules: tuple[nn.Module, ...] = ()

    def __init__(self, method: AdversarialNeuronPruning, model: Classifier, generator: torch.Generator) -> None:
        """For a model whose parameters need no gradient; ``generator`` draws where the noise starts."""
        self.method, self.model, self.generator, self.groups = method, model, generator, prunable(model)
        self.mask = torch.ones(unit_count(self.groups), device=model.device, requires_grad=True)
        self.optimizers = [torch.optim.SGD([self.mask], method.lr, method.momentum)]

    def __call__(self, batch: Batch) -> Tensor:
        """See :class:`~backdoorlab.training.steps.Step`."""
        method, model, groups, mask = self.method, self.model, self.groups, self.mask
        inputs, labels = batch.inputs, batch.labels
        start = torch.rand(2, len(mask), generator=self.generator, device=mask.device)
        start = start.mul_(2).sub_(1).mul_(method.eps)
        noise = adversarial_noise(model, groups, mask, inputs, labels, start, method.eps, method.steps)
        with masked(groups, mask, torch.ones_like(mask)):
            natural = F.cross_entropy(model(inputs), labels)
        with masked(groups, mask + noise[0], 1 + noise[1]):
            robust = F.cross_entropy(model(inputs), labels)
        loss = method.alpha * natural + (1 - method.alpha) * robust
        (mask.grad,) = torch.autograd.grad(loss, mask)
        self.optimizers[0].step()
        with torch.no_grad():
            mask.clamp_(0, 1)
        return loss.detach()


@defenses.register
@dataclass(frozen=True, kw_only=True)
class AdversarialNeuronPruning(RepairDefense):
    """Prunes neurons that are sensitive to adversarial weight noise."""

    name: ClassVar[str] = "anp"
    paper: ClassVar[str] = "Wu and Wang, Adversarial Neuron Pruning, NeurIPS 2021, arXiv 2110.14430"
    year: ClassVar[int] = 2021
    modalities: ClassVar[tuple[str, ...]] = ("image", "text", "audio", "video")

    eps: float = param(0.4, "bound of the relative noise on weights and biases", low=0, source="paper")
    steps: int = param(1, "ascent steps of the noise per iteration", low=1, source="paper")
    alpha: float = param(0.2, "share of the loss without noise", low=0, high=1, source="paper")
    lr: float = param(0.2, "learning rate of the masks", above=0, source="paper")
    momentum: float = param(0.9, "of SGD on the masks", low=0, high=0.999, source="paper")
    iterations: int = param(2000, "batches", low=1, source="paper")
    batch_size: int = param(256, "samples per batch, drawn with replacement", low=1, source="BackdoorBench")
    threshold: float | None = param(
        None, "prune units with a mask at or below it; none = chosen on the clean samples", low=0, high=1
    )
    tolerance: float = param(0.05, "largest relative drop of clean accuracy when choosing", low=0, high=1)
    holdout: float = param(0.2, "share of the clean samples that masks are not optimised on", above=0, high=0.9)

    def run(self, view: DefenderView, ctx: Context) -> Classifier:
        """Optimise masks, choose the threshold, silence the units below it in a copy."""
        model, clean = view.model, view.clean
        order = torch.randperm(len(clean), generator=ctx.generator("anp", "holdout"))
        held = 0 if self.threshold is not None else max(1, round(self.holdout * len(clean)))
        if len(clean) - held < 1:
            raise InputError(f"anp needs at least 2 clean samples (one held out), got {len(clean)}")
        mask = self.optimise_masks(model, clean[order[held:]], ctx)
        repaired = copy.deepcopy(model).eval()
        groups = prunable(repaired)
        if self.threshold is not None:
            pruned = mask <= self.threshold
        else:
            pruned = cut_ranking(repaired, groups, -mask, -THRESHOLDS - 1e-6, clean, self.tolerance)
        count = silence(groups, pruned)
        ctx.reporter.note(f"anp: pruned {count} of {len(pruned)} units")
        return repaired

    def optimise_masks(self, model: Classifier, clean: Split, ctx: Context) -> Tensor:
        """Masks of all prunable units: float32 [U] on the model's device."""
        work = copy.deepcopy(model).eval()
        for module in work.modules():
            if isinstance(module, _BatchNorm):
                module.train()
        for parameter in work.parameters():
            parameter.requires_grad_(False)
        generator = ctx.generator("anp", device=work.device)
        step = MaskStep(self, work, generator)
        batches = Drawn(clean, work.modality, self.batch_size, generator, self.iterations)
        run_steps(step, batches, 1, context=ctx, label="anp: optimising masks")
        return step.mask.detach()
