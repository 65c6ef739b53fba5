"""MCR: a model from the middle of a path of good models that begins at the suspicious one.

Zhao, Chen, Das, Ramamurthy, Lin, "Bridging Mode Connectivity in Loss Landscapes and Adversarial Robustness", ICLR 2020
(arXiv 2005.00060). Two models with a small loss are joined by a curve of weights along which the loss on the defender's
clean samples stays small (Garipov et al., NeurIPS 2018), with one trained bend w:

    Bezier:   phi(t) = (1 - t)^2 w1 + 2 t (1 - t) w + t^2 w2
    polygon:  phi(t) = straight from w1 to w, then straight from w to w2

    min_w  E_t~U(0,1)  CE(f_phi(t)(x), y).

Clean samples say nothing of the backdoor, so it is lost on the way. w1 is the suspicious model, w2 a fine-tuned copy of
it; w begins half way between them.

Choices and deviations
- The model is taken at the t that is furthest from the suspicious end among those that lose at most ``tolerance`` of
  the best accuracy on held-out clean samples, or one of these samples; ``t`` fixes it instead. The benchmark's 0.1 lies
  next to the backdoor.
- Running statistics of batch norms mean nothing between two models: they are estimated anew on the clean samples,
  for every t that is tried.
- Gradients are cleared in every step (in the benchmark's code they add up), so the bend is trained at an ordinary rate:
  fine-tuning of w2 and training of w follow one rule (:mod:`~backdoorlab.defenses.common.finetuning`).
- The paper joins two suspicious models; a user has one, so w2 is made by fine-tuning, as in the benchmark.

Limits: what fine-tuning leaves of the backdoor, w2 and the end of the curve still have.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from backdoorlab.core.method import param
from backdoorlab.data.split import Split
from backdoorlab.defenses.base import defenses
from backdoorlab.defenses.common.finetuning import FineTunes
from backdoorlab.defenses.common.pruning import hold_out
from backdoorlab.defenses.view import DefenderView
from backdoorlab.models.anatomy import reestimate_batchnorm
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.context import Context
from backdoorlab.training.evaluate import predict
from backdoorlab.training.loop import fit

Weights = Mapping[str, Tensor]
TRIED = tuple(step / 10 for step in range(1, 10))
"""Values of t among which one is chosen."""


def shares(t: Tensor | float, curve: str) -> tuple[Tensor | float, Tensor | float, Tensor | float]:
    """How much of w1, w and w2 there is in phi(t); the three add up to 1.

    Args:
        t: position in [0, 1], float [] or number.
        curve: "bezier" or "polygon".
    """
    if curve == "bezier":
        return (1 - t) ** 2, 2 * t * (1 - t), t**2
    t = torch.as_tensor(t)
    first, last = (1 - 2 * t).clamp_min(0), (2 * t - 1).clamp_min(0)
    return first, 1 - first - last, last


def along(start: Weights, bend: Weights, end: Weights, t: Tensor | float, curve: str) -> dict[str, Tensor]:
    """Weights phi(t) by name; differentiable in the bend."""
    a, b, c = shares(t, curve)
    return {name: a * start[name] + b * bend[name] + c * end[name] for name in bend}


def weights_of(model: Classifier) -> dict[str, Tensor]:
    """Copies of all parameters by name."""
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@defenses.register
@dataclass(frozen=True, kw_only=True)
class ModeConnectivityRepair(FineTunes):
    """A model from a path between the suspicious one and a fine-tuned copy."""

    name: ClassVar[str] = "mcr"
    paper: ClassVar[str] = "Zhao et al., Bridging Mode Connectivity in Loss Landscapes, ICLR 2020, arXiv 2005.00060"
    year: ClassVar[int] = 2020
    modalities: ClassVar[tuple[str, ...]] = ("image", "text", "audio", "video")

    curve: str = param("bezier", "form of the path", choices=("bezier", "polygon"), source="paper")
    curve_epochs: int = param(100, "passes over the clean samples that train the bend", low=1, source="BackdoorBench")
    t: float | None = param(
        None, "where the model is taken; none = chosen on held-out clean samples", low=0, high=1, source="ours"
    )
    tolerance: float = param(
        0.02, "largest relative drop of held-out accuracy when choosing", low=0, high=1, source="ours"
    )
    holdout: float = param(0.2, "share of the clean samples that choose t", above=0, high=0.9, source="ours")

    def run(self, view: DefenderView, ctx: Context) -> Classifier:
        """Fine-tune the other end, train the bend, choose a point."""
        learn, held = hold_out(view.clean, self.holdout, self.name, ctx)
        end = copy.deepcopy(view.model)
        fit(end, learn, self.recipe(view), context=ctx.child("end"), label="mcr: fine-tuning the other end")
        start, last = weights_of(view.model), weights_of(end)
        bend = self.train_bend(view, start, last, learn, ctx.child("bend"))
        t = self.choose(view.model, start, bend, last, learn, held) if self.t is None else self.t
        ctx.reporter.note(f"mcr: the model at t = {t:g}")
        return self.at(view.model, start, bend, last, t, learn)

    def train_bend(
        self, view: DefenderView, start: Weights, end: Weights, clean: Split, ctx: Context
    ) -> dict[str, Tensor]:
        """The weights w between two ends."""
        work = copy.deepcopy(view.model)
        with torch.no_grad():
            for name, value in work.named_parameters():
                value.copy_((start[name] + end[name]) / 2)
        generator = ctx.generator("mcr", "t")

        def on_the_path(model: Classifier, inputs: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
            t = torch.rand((), generator=generator).to(labels.device, non_blocking=True)
            weights = along(start, dict(model.named_parameters()), end, t, self.curve)
            return F.cross_entropy(functional_call(model, weights, (inputs,)), labels)

        recipe = dataclasses.replace(self.recipe(view), epochs=self.curve_epochs)
        fit(work, clean, recipe, objective=on_the_path, context=ctx, label="mcr: training the bend")
        return weights_of(work)

    def at(self, model: Classifier, start: Weights, bend: Weights, end: Weights, t: float, clean: Split) -> Classifier:
        """The model phi(t), with batch norms estimated anew."""
        found = copy.deepcopy(model).eval()
        with torch.no_grad():
            for name, value in along(start, bend, end, t, self.curve).items():
                found.get_parameter(name).copy_(value)
        reestimate_batchnorm(found, clean.inputs)
        return found

    def choose(
        self, model: Classifier, start: Weights, bend: Weights, end: Weights, learn: Split, held: Split
    ) -> float:
        """The largest t that loses no more of the best accuracy on held-out samples than is tolerated."""
        right = {}
        for t in TRIED:
            answers = predict(self.at(model, start, bend, end, t, learn), held.inputs).argmax(1)
            right[t] = int((answers == held.labels.cpu()).sum())
        best = max(right.values())
        return max(t for t in TRIED if right[t] >= best - max(1, int(self.tolerance * best)))
