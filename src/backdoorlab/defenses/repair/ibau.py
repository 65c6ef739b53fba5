"""I-BAU: unlearn the universal perturbation that hurts most, with the hypergradient of the minimax problem.

Zeng, Chen, Park, Mao, Jin, Jia, "Adversarial Unlearning of Backdoors via Implicit Hypergradient", ICLR 2022 (arXiv
2110.03735). A trigger is a perturbation d that works on every sample. On the defender's samples

    min_w  H(d(w), w) = mean CE(f_w(x + d), y),      d(w) = argmax_d  mean CE(f_w(x + d), f_w(x)) - c |d|^2

and the gradient accounts for how d follows w:

    dH/dw = grad_w H + (dd/dw)^T grad_d H.

d is a fixed point of one ascent step, d = P(d, w), so that (dd/dw)^T u = (dP/dw)^T v with v = (dP/dd)^T v + u, whose
series u + (dP/dd)^T u + ... is summed for a few terms. A round looks for d by gradient ascent over the clean samples,
from 0, and then takes a step of Adam for every batch; a share of each batch carries d, the rest is clean.

Choices and deviations
- d lives in the space of prepared inputs, before normalisation, and x + d is clipped to the valid range.
- The ascent's steps have a fixed length: where a model is certain, the gradient at d = 0 is so small that a learning
  rate of 10, as published, never leaves it.
- The series ends where its terms no longer shrink. It converges where d is a strict maximum; in a network that is
  piecewise linear, the loss is rather convex in d, each term is larger than the one before, and the sum of five would
  drown the direct gradient.
- Steps of d's fixed-point map are taken on the batch at hand rather than on the first batch of the round.
- At least one sample of a batch carries d. The benchmark's code puts d on a hundredth of a batch, 2 of 256.
- Batch norms keep their statistics (evaluation mode), everything is computed in fp32, and attention and
  recurrent layers without fused kernels, which have no second derivative.

Limits: one perturbation for all samples suits patches and patterns; a trigger that depends on the sample is met only as
far as a universal one resembles it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from backdoorlab.core.method import param
from backdoorlab.defenses.base import RepairDefense, defenses
from backdoorlab.defenses.common.classes import need_samples
from backdoorlab.defenses.common.finetuning import batch_for
from backdoorlab.defenses.common.perturbation import scaled_norm, shifted, valid_range
from backdoorlab.defenses.view import DefenderView
from backdoorlab.models.anatomy import frozen
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.batches import Batch, Shuffled
from backdoorlab.training.context import Context
from backdoorlab.training.steps import run_steps
from backdoorlab.training.watch import Watch


def hypergradient(
    inner: Callable[[Tensor], Tensor],
    outer: Callable[[Tensor], Tensor],
    delta: Tensor,
    parameters: Sequence[Tensor],
    *,
    lr: float,
    iterations: int,
) -> list[Tensor]:
    """Gradient of ``outer(delta(w), w)`` by the parameters w, where delta(w) minimises ``inner``.

    Args:
        inner: delta -> scalar, twice differentiable; minimised by delta.
        outer: delta -> scalar.
        delta: where the inner problem ended.
        parameters: w, of which both functions depend.
        lr: step of the map delta -> delta - lr grad inner(delta), whose fixed point delta is.
        iterations: terms of the series, fewer if they do not shrink; with 1, delta counts as the outcome of one step.

    Returns:
        One tensor per parameter.
    """
    delta = delta.detach().requires_grad_()
    (slope,) = torch.autograd.grad(inner(delta), delta, create_graph=True)
    stepped = delta - lr * slope
    wanted, *direct = torch.autograd.grad(outer(delta), [delta, *parameters], allow_unused=True)
    v, term, shrinks = wanted, wanted, torch.ones((), device=delta.device)
    for _ in range(iterations - 1):
        (following,) = torch.autograd.grad(stepped, delta, term, retain_graph=True)
        shrinks = shrinks * (following.norm() < term.norm())
        v, term = v + shrinks * following, following
    implied = torch.autograd.grad(stepped, parameters, v, allow_unused=True)
    return [
        sum((part for part in parts if part is not None), torch.zeros_like(weight))
        for weight, *parts in zip(parameters, direct, implied, strict=True)
    ]


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Inside the block, no kernel is used that has no second derivative: fused attention, fused recurrent layers."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            libraries: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
            for library in libraries:
                stack.callback(setattr, library, "enabled", library.enabled)
                library.enabled = False
        yield


class Universal:
    """One perturbation for all samples, raised by steps of a fixed length along its gradient.

    Attributes:
        delta: of a sample's shape.
    """

    modules: tuple[nn.Module, ...] = ()

    def __init__(self, method: ImplicitUnlearning, model: Classifier, sample: Tensor) -> None:
        """``sample``: prepared, [1, ...]."""
        self.method, self.model, self.limits = method, model, valid_range(method.name, model)
        self.delta = torch.zeros_like(sample).requires_grad_()
        self.optimizers = [torch.optim.SGD([self.delta], scaled_norm(method.ascent, sample))]

    def loss(self, delta: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        """What delta minimises: minus the loss that it causes, plus its weighted square."""
        logits = self.model(shifted(inputs, delta, self.limits))
        return self.method.penalty * delta.square().sum() - F.cross_entropy(logits, labels)

    def __call__(self, batch: Batch) -> Tensor:
        """See :class:`~backdoorlab.training.steps.Step`."""
        with frozen(self.model):
            with torch.no_grad():
                predicted = self.model(batch.inputs).argmax(1)
            loss = self.loss(self.delta, batch.inputs, predicted)
            (slope,) = torch.autograd.grad(loss, self.delta)
        self.delta.grad = slope / slope.norm().clamp_min(1e-12)
        self.optimizers[0].step()
        return loss.detach()


class Unlearning:
    """A step of Adam along the hypergradient.

    Attributes:
        delta: the perturbation of the present round.
    """

    delta: Tensor

    def __init__(self, method: ImplicitUnlearning, model: Classifier, generator: torch.Generator) -> None:
        """``generator`` draws which samples of a batch carry the perturbation."""
        self.method, self.model, self.generator = method, model, generator
        self.modules = [model]
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizers = [torch.optim.Adam(self.parameters, method.lr)]

    def __call__(self, batch: Batch) -> Tensor:
        """See :class:`~backdoorlab.training.steps.Step`; the loss is the outer one."""
        method, model = self.method, self.model
        universal = Universal(method, model, batch.inputs[:1])
        count = max(1, round(method.share * len(batch)))
        order = torch.randperm(len(batch), generator=self.generator, device=batch.labels.device)
        carries = (order < count).reshape(-1, *(1,) * (batch.inputs.dim() - 1))
        losses: list[Tensor] = []

        def outer(delta: Tensor) -> Tensor:
            mixed = torch.where(carries, shifted(batch.inputs, delta, universal.limits), batch.inputs)
            losses.append(F.cross_entropy(model(mixed), batch.labels))
            return losses[-1]

        with torch.no_grad():
            predicted = model(batch.inputs).argmax(1)
        with twice_differentiable(model):
            slopes = hypergradient(
                lambda delta: universal.loss(delta, batch.inputs, predicted),
                outer,
                self.delta,
                self.parameters,
                lr=method.inner_lr,
                iterations=method.iterations,
            )
        for parameter, slope in zip(self.parameters, slopes, strict=True):
            parameter.grad = slope
        self.optimizers[0].step()
        return losses[0].detach()


@defenses.register
@dataclass(frozen=True, kw_only=True)
class ImplicitUnlearning(RepairDefense):
    """Unlearns the worst universal perturbation."""

    name: ClassVar[str] = "ibau"
    paper: ClassVar[str] = "Zeng et al., Adversarial Unlearning via Implicit Hypergradient, ICLR 2022, arXiv 2110.03735"
    year: ClassVar[int] = 2022
    modalities: ClassVar[tuple[str, ...]] = ("image", "audio", "video")
    aliases: ClassVar[tuple[str, ...]] = ("i-bau",)

    rounds: int = param(
        20, "searches for a perturbation, each followed by unlearning it", low=1, source="ours (BackdoorBench: 5)"
    )
    passes: int = param(1, "over the clean samples, per search", low=1, source="BackdoorBench")
    unlearn_passes: int = param(1, "over the clean samples, per round of unlearning", low=1, source="BackdoorBench")
    ascent: float = param(
        1.0,
        "length of a step of the search, for 3x32x32 values; scaled with the root of their number",
        above=0,
        source="ours",
    )
    penalty: float = param(0.001, "weight of the perturbation's square", low=0, source="BackdoorBench")
    iterations: int = param(5, "terms of the hypergradient's series, at most", low=1, source="BackdoorBench")
    inner_lr: float = param(0.1, "step of the fixed-point map", above=0, source="BackdoorBench")
    share: float = param(
        0.2, "of a batch that carries the perturbation", above=0, high=1, source="ours (BackdoorBench: 0.01)"
    )
    lr: float = param(5e-4, "learning rate of Adam", above=0, source="ours (BackdoorBench: 1e-4)")
    batch_size: int = param(
        256, "samples per step; at most an eighth of the samples, or 16", low=1, source="BackdoorBench"
    )

    def run(self, view: DefenderView, ctx: Context) -> Classifier:
        """Search and unlearn in turn, in a copy."""
        clean = view.clean
        need_samples(self.name, "clean", clean)
        repaired = copy.deepcopy(view.model).eval()
        valid_range(self.name, repaired)
        generator = ctx.generator("ibau", device=repaired.device)
        size = min(len(clean), batch_for(self.batch_size, len(clean)))
        batches = Shuffled(clean, repaired.modality, size, generator, augment=False)
        sample = repaired.modality.prepare(batches.table[:1])
        unlearning = Unlearning(self, repaired, generator)
        for _ in ctx.track(range(self.rounds), "ibau: rounds", self.rounds):
            universal = Universal(self, repaired, sample)
            run_steps(universal, batches, self.passes, context=ctx, label="ibau: searching")
            unlearning.delta = universal.delta.detach()
            run_steps(
                unlearning,
                batches,
                self.unlearn_passes,
                watch=Watch(unlearning.modules, unlearning.optimizers),
                context=ctx,
                label="ibau: unlearning",
            )
        return repaired
