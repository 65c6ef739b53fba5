"""FT-SAM: fine-tune on clean samples with sharpness-aware minimisation.

Zhu, Wei, Shen, Fan, Wu, "Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization", ICCV 2023
(arXiv 2304.11823). Units that carry a backdoor have large weights, and plain fine-tuning hardly changes them. With
T = |w| elementwise, every step looks for the worst weights around the present ones and descends from there:

    min_w max_{|T^-1 e|_2 <= rho} L(w + e),      e = rho T^2 g / |T g|_2,   g = grad L(w)

so that large weights are perturbed, and therefore moved, most (adaptive SAM, Kwon et al., ICML 2021). L is the
cross-entropy on the defender's clean samples, with label smoothing.

Choices and deviations
- Two passes per step: the first gives e and updates the running statistics of batch norms, the second, at w + e, uses
  batch statistics without keeping them. The weights are put back before the optimiser steps with the second gradient.
- The rate is annealed once over all epochs. The published code steps its schedule per batch, so that the rate rises
  and falls many times.
- The base optimiser and its rate are those of fine-tuning here (:mod:`~backdoorlab.defenses.common.finetuning`).
- Clean samples are taken as they are, not balanced by class: users hold what they hold.
- ``adaptive=false`` is plain SAM (T = 1), for which rho must be far smaller (0.05).

Limits: twice the cost of fine-tuning; a rho that is too large keeps a small network from fitting the clean samples.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from backdoorlab.core.method import param
from backdoorlab.defenses.base import defenses
from backdoorlab.defenses.common.finetuning import FineTunes
from backdoorlab.defenses.view import DefenderView
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.batches import Batch
from backdoorlab.training.context import Context
from backdoorlab.training.loop import Descent, Objective, fit
from backdoorlab.training.recipes import Recipe


@torch.no_grad()
def ascent(weights: Sequence[Tensor], slopes: Sequence[Tensor], rho: float, adaptive: bool = True) -> list[Tensor]:
    """The step from the weights to the worst ones around them: rho T^2 g / |T g|_2, norm over all tensors together.

    Args:
        weights: w, any shapes.
        slopes: g, of the same shapes.
        rho: size of the neighbourhood.
        adaptive: T = |w| elementwise, else 1.

    Returns:
        e, one tensor per weight; zeros where all slopes are zero.
    """
    scales = [w.abs() if adaptive else torch.ones_like(w) for w in weights]
    norm = torch.stack([(t * g).norm() for t, g in zip(scales, slopes, strict=True)]).norm()
    factor = rho / norm.clamp_min(1e-12)
    return [factor * t * t * g for t, g in zip(scales, slopes, strict=True)]


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """Inside the block, batch norms in training mode use batch statistics and leave their running ones alone."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


class SharpnessAwareStep(Descent[Classifier]):
    """A step from the present weights along the gradient at the worst ones around them."""

    def __init__(
        self, model: Classifier, recipe: Recipe, objective: Objective[Classifier], *, rho: float, adaptive: bool
    ) -> None:
        """See :func:`ascent`."""
        super().__init__(model, recipe, objective)
        self.rho, self.adaptive = rho, adaptive

    def __call__(self, batch: Batch) -> Tensor:
        """Two passes; returns the loss at the present weights."""
        first = self.loss(batch)
        slopes = torch.autograd.grad(first, self.params, allow_unused=True)
        moved = [(p, g) for p, g in zip(self.params, slopes, strict=True) if g is not None]
        before = [p.detach().clone() for p, _ in moved]
        shift = ascent(before, [g for _, g in moved], self.rho, self.adaptive)
        self._put([p for p, _ in moved], [w + e for w, e in zip(before, shift, strict=True)])
        with statistics_kept(self.model):
            second = self.loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        second.backward()
        self._put([p for p, _ in moved], before)
        self.clip()
        self.optimizer.step()
        return first.detach()

    @staticmethod
    @torch.no_grad()
    def _put(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


@defenses.register
@dataclass(frozen=True, kw_only=True)
class SharpnessAwareFineTuning(FineTunes):
    """Fine-tuning on clean samples with adaptive sharpness-aware minimisation."""

    name: ClassVar[str] = "ft_sam"
    paper: ClassVar[str] = "Zhu et al., Fine-Tuning with Sharpness-Aware Minimization, ICCV 2023, arXiv 2304.11823"
    year: ClassVar[int] = 2023
    modalities: ClassVar[tuple[str, ...]] = ("image", "text", "audio", "video")
    aliases: ClassVar[tuple[str, ...]] = ("ftsam",)

    rho: float = param(2.0, "size of the neighbourhood of the weights", above=0, source="BackdoorBench, CIFAR-10")
    adaptive: bool = param(True, "measure the neighbourhood relative to each weight", source="BackdoorBench")
    smoothing: float = param(0.1, "label smoothing", low=0, high=0.9, source="BackdoorBench, CIFAR-10")

    def run(self, view: DefenderView, ctx: Context) -> Classifier:
        """Fine-tune a copy."""
        repaired = copy.deepcopy(view.model)

        def smoothed(model: Classifier, inputs: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
            return F.cross_entropy(model(inputs), labels, label_smoothing=self.smoothing)

        fit(
            repaired,
            view.clean,
            self.recipe(view),
            objective=smoothed,
            step=partial(SharpnessAwareStep, rho=self.rho, adaptive=self.adaptive),
            context=ctx,
            label="ft_sam: fine-tuning",
        )
        return repaired
