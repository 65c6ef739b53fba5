"""Training a model on a split: the ordinary step, and :func:`fit`, which runs it under a recipe.

Methods that train differently hand :func:`fit` an objective, a stamp or a step of their own, never a copy of the loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypedDict, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.core.errors import BackdoorLabError, InputError
from backdoorlab.core.seeding import spawn
from backdoorlab.data.split import Split
from backdoorlab.models.classifier import Classifier
from backdoorlab.models.persistence import StoredModel
from backdoorlab.training.batches import Batch, Shuffled, Stamp
from backdoorlab.training.context import Context, autocast
from backdoorlab.training.log import FitLog
from backdoorlab.training.recipes import Recipe
from backdoorlab.training.steps import run_steps
from backdoorlab.training.watch import Watch

M = TypeVar("M", bound=StoredModel)

Objective = Callable[[M, Tensor, Tensor, Tensor], Tensor]
"""(model, prepared batch, labels int64 [B], sample indices int64 [B]) -> scalar loss to be minimised."""

OnEpoch = Callable[[int, M], bool | None]
"""(epochs finished, model in training mode) -> True to end the training; may change learning state, must not train."""

_ENOUGH = 100
"""Steps after which a training must have learned something."""


def cross_entropy(model: nn.Module, inputs: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
    """Mean cross-entropy: the ordinary objective."""
    return F.cross_entropy(model(inputs), labels)


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser over all parameters that require a gradient, fused where the device allows."""
    params = [p for p in model.parameters() if p.requires_grad]
    fused = params[0].device.type in ("cuda", "cpu")
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            params, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=recipe.nesterov, fused=fused
        )
    return torch.optim.AdamW(params, recipe.lr, weight_decay=recipe.weight_decay, fused=fused)


class Descent(Generic[M]):
    """The ordinary step: one gradient step down an objective. Steps that do more derive from it.

    Attributes:
        model: in training mode.
        recipe: optimiser, precision, clipping.
        objective: the loss of a batch.
        compute: the objective, compiled if the recipe says so.
        optimizer: of the model.
        modules: see :class:`~backdoorlab.training.steps.Step`; a step that trains more appends to it.
        optimizers: likewise.
    """

    def __init__(self, model: M, recipe: Recipe, objective: Objective[M]) -> None:
        self.model: M = model.train()
        self.recipe = recipe
        self.objective = objective
        self.compute = torch.compile(objective, dynamic=False) if recipe.compile else objective
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(model, recipe)
        self.modules: list[nn.Module] = [model]
        self.optimizers = [self.optimizer]

    def __call__(self, batch: Batch) -> Tensor:
        """Go down the objective."""
        # Kept until the next one is there: memory that is freed between two steps may go back to the system.
        self.latest = loss = self.loss(batch)
        self.descend(loss)
        return loss.detach()

    def loss(self, batch: Batch) -> Tensor:
        """The objective's value, in the recipe's precision."""
        with autocast(batch.labels.device, self.recipe.precision):
            return self.compute(self.model, batch.inputs, batch.labels, batch.indices)

    def descend(self, loss: Tensor) -> None:
        """One step of the model's optimiser."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.clip()
        self.optimizer.step()

    def clip(self) -> None:
        """Bound the gradient as the recipe says."""
        if self.recipe.clip:
            torch.nn.utils.clip_grad_norm_(self.params, self.recipe.clip, foreach=True)


class MakeStep(Protocol[M]):
    """Makes the step of a training: :class:`Descent`, or a class derived from it."""

    def __call__(self, model: M, recipe: Recipe, objective: Objective[M]) -> Descent[M]:
        """For a model on its device and a recipe resolved for the data."""
        ...


class FitOptions(TypedDict, Generic[M], total=False):
    """What :func:`fit` takes besides model, data, recipe and context."""

    objective: Objective[M]
    step: MakeStep[M]
    stamp: Stamp | None
    on_epoch: Sequence[OnEpoch[M]]
    chance: float | None
    label: str


def fit(
    model: M,
    split: Split,
    recipe: Recipe,
    *,
    objective: Objective[M] = cross_entropy,
    step: MakeStep[M] = Descent,
    stamp: Stamp | None = None,
    on_epoch: Sequence[OnEpoch[M]] = (),
    chance: float | None = None,
    context: Context | None = None,
    label: str = "training",
) -> FitLog:
    """Train a model in place.

    Raw data lie on the device as one tensor; batches are gathered, stamped, augmented and prepared there. Losses stay
    on the device until the end of an epoch, so nothing waits for the host in between.

    A training that collapses (:class:`~backdoorlab.training.watch.Watch` says when) is noticed at the end of the epoch,
    reported, taken back to the last good epoch (all networks and optimisers of the step) and continued with half the
    learning rate. That happens once; a second collapse is an error. So is a training by plain cross-entropy that took
    at least 100 steps and ends no better than chance.

    Args:
        model: moved to the context's device, left in evaluation mode.
        split: training data as the trainer sees them.
        recipe: resolved here for the size of the split.
        objective: the loss of a batch; receives sample indices for per-sample methods.
        step: what a batch does, if it is more than one step down the objective.
        stamp: edits raw batches (training-control attacks).
        on_epoch: called after each epoch that is kept, once for each number; True ends the training.
        chance: loss of a model that knows nothing, by which a collapse is recognised; None = ln K of a classifier.
            ``math.inf`` declares that the loss may rise without limit (gradient ascent): only values that are not
            finite count.
        context: seed, device and progress display; all randomness derives from its seed.
        label: shown beside the progress bar.

    Returns:
        Loss, learning rate and seconds per epoch.

    Raises:
        BackdoorLabError: if the training collapses twice, or learned nothing.
        InputError: if the split is empty, or ``chance`` is None for a model that is no classifier.
    """
    context = context or Context()
    device, generator = context.device, context.generator("fit", device=context.device)
    if not len(split):
        raise InputError("cannot train on an empty set")
    recipe = recipe.resolve(len(split))
    descent = step(model.to(device), recipe, objective)
    batches = Shuffled(split, model.modality, recipe.batch_size, generator, augment=recipe.augment, stamp=stamp)
    plain = objective is cross_entropy
    if chance is None:
        if not isinstance(model, Classifier):
            raise InputError(f"chance must be given for a {model.kind}: only a classifier's follows from its classes")
        chance = math.log(max(2, model.num_classes))

    def ends(epoch: int) -> bool:
        answers = [call(epoch, model) for call in on_epoch]
        return any(answers)

    log = run_steps(
        descent,
        batches,
        recipe.epochs,
        schedule=lambda number: recipe.factor(number, len(batches)),
        watch=Watch(descent.modules, descent.optimizers, chance=chance, plain=plain),
        on_epoch=ends,
        context=context,
        label=label,
        noise=spawn(generator),
    )
    if plain and log.steps >= _ENOUGH and log.loss[-1] >= chance:
        raise BackdoorLabError(
            f"{label} learned nothing: its loss ends at {log.loss[-1]:.3g}, chance is {chance:.3g}; another "
            f"learning rate than {recipe.lr:g} may help"
        )
    model.eval()
    return log
