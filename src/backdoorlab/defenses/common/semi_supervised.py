"""MixMatch: learn from samples whose labels are trusted, and from others without theirs.

Berthelot et al., "MixMatch: A Holistic Approach to Semi-Supervised Learning", NeurIPS 2019. The label of an unlabelled
sample is guessed: the mean of the predictions for two views, sharpened,

    q_k = p_k^(1/T) / sum_j p_j^(1/T)

Labelled and unlabelled views together are mixed with a permutation of themselves, l ~ Beta(a, a), l' = max(l, 1 - l),
x' = l' x_1 + (1 - l') x_2 and the same for labels; then

    CE on the mixed labelled ones + w(step) mean over classes and samples of (softmax - q)^2 on the others,

w growing linearly to its full value over the first part of the training.

Choice: labelled and unlabelled samples pass the network in one batch, so that batch norms see both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.core.errors import InputError
from backdoorlab.core.method import param
from backdoorlab.data.split import Split
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.batches import Batch, Shuffled
from backdoorlab.training.context import Context, autocast
from backdoorlab.training.log import FitLog
from backdoorlab.training.recipes import Recipe
from backdoorlab.training.steps import run_steps
from backdoorlab.training.watch import Watch

Choose = Callable[[Classifier, int], Tensor]
"""(model, epochs so far) -> bool [N], samples whose labels are trusted in the next epoch."""


def sharpen(probabilities: Tensor, temperature: float) -> Tensor:
    """p^(1/T), normalised over the last axis."""
    raised = probabilities.pow(1 / temperature)
    return raised / raised.sum(-1, keepdim=True)


def mix(inputs: Tensor, targets: Tensor, share: float, order: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and soft labels, ``share`` (at least 1/2) of themselves and the rest of those in ``order``."""
    return torch.lerp(inputs[order], inputs, share), torch.lerp(targets[order], targets, share)


def mixmatch_loss(logits: Tensor, targets: Tensor, labelled: int, weight: float) -> Tensor:
    """The loss above; the first ``labelled`` rows are the labelled ones."""
    supervised = -(targets[:labelled] * logits[:labelled].log_softmax(1)).sum(1).mean()
    guessed = (logits[labelled:].softmax(1) - targets[labelled:]).square().mean()
    return supervised + weight * guessed


class MixMatchStep:
    """One step of MixMatch.

    Attributes:
        modules: the model.
        optimizers: Adam.
    """

    def __init__(
        self,
        model: Classifier,
        *,
        lr: float,
        weight: float,
        ramp: int,
        temperature: float,
        alpha: float,
        generator: torch.Generator,
        precision: str = "auto",
    ) -> None:
        """Make the optimiser.

        Args:
            model: on its device.
            lr: Adam's.
            weight: w at its full value.
            ramp: steps over which it grows.
            temperature: T.
            alpha: a.
            generator: of permutations, on the model's device.
            precision: of autocast.
        """
        self.modules: Sequence[nn.Module] = (model.train(),)
        self.optimizers = [torch.optim.Adam(model.parameters(), lr)]
        self.weight, self.ramp, self.temperature, self.alpha = weight, ramp, temperature, alpha
        self.generator, self.precision, self.taken = generator, precision, 0

    def __call__(self, batch: tuple[Batch, Batch]) -> Tensor:
        """See :class:`~backdoorlab.training.steps.Step`: (labelled, unlabelled with two views)."""
        labelled, unlabelled = batch
        model = cast(Classifier, self.modules[0])
        with autocast(labelled.labels.device, self.precision):
            with torch.no_grad():
                guesses = model(torch.cat(unlabelled.views)).float().softmax(1).chunk(len(unlabelled.views))
                guess = sharpen(torch.stack(guesses).mean(0), self.temperature)
            known = F.one_hot(labelled.labels, model.num_classes).float()
            inputs = torch.cat([labelled.inputs, *unlabelled.views])
            targets = torch.cat([known, *(guess for _ in unlabelled.views)])
            order = torch.randperm(len(inputs), generator=self.generator, device=self.generator.device)
            share = float(torch.distributions.Beta(self.alpha, self.alpha).sample())  # torch's generator, isolated
            mixed, wanted = mix(inputs, targets, max(share, 1 - share), order)
            logits = model(mixed).float()
        weight = self.weight * min(1.0, self.taken / max(1, self.ramp))
        self.taken += 1
        loss = mixmatch_loss(logits, wanted, len(labelled), weight)
        self.optimizers[0].zero_grad(set_to_none=True)
        loss.backward()
        self.optimizers[0].step()
        return loss.detach()


class Resplit:
    """Epochs of labelled and unlabelled batches side by side, drawn with replacement, split anew before each epoch."""

    def __init__(
        self,
        model: Classifier,
        data: Split,
        choose: Choose,
        batch_size: int,
        steps: int,
        generator: torch.Generator,
    ) -> None:
        """``steps`` batches of ``batch_size`` of either kind an epoch; ``choose`` says which labels are trusted."""
        self.model, self.choose, self.batch_size, self.steps = model, choose, batch_size, steps
        self.generator, self.epochs = generator, 0
        # Both sides share one table on the device.
        self.labelled = Shuffled(data, model.modality, 1, generator, augment=True)
        self.unlabelled = copy.copy(self.labelled)
        self.unlabelled.views = 2

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Batch, Batch]]:
        trusted = self.choose(self.model, self.epochs)
        if bool(trusted.all()) or not bool(trusted.any()):
            raise InputError(
                f"learning from samples with and without labels needs both, got {int(trusted.sum())} and "
                f"{int((~trusted).sum())}"
            )
        self.epochs += 1
        rows = [part.nonzero().flatten().to(self.generator.device) for part in (trusted, ~trusted)]
        for _ in range(self.steps):
            yield self.labelled.at(self._draw(rows[0])), self.unlabelled.at(self._draw(rows[1]))

    def _draw(self, rows: Tensor) -> Tensor:
        device = self.generator.device
        return rows[torch.randint(len(rows), (self.batch_size,), generator=self.generator, device=device)]


def fit_semi_supervised(
    model: Classifier,
    data: Split,
    choose: Choose,
    ctx: Context,
    *,
    epochs: int,
    steps: int,
    batch_size: int,
    lr: float,
    weight: float,
    ramp: float,
    temperature: float,
    alpha: float,
    precision: str = "auto",
    label: str,
) -> FitLog:
    """Train a model in place by MixMatch.

    Args:
        model: moved to the context's device, left in evaluation mode.
        data: raw samples and (given) labels.
        choose: asked before each epoch; must trust at least one sample and leave at least one.
        ctx: seed, device, progress.
        epochs: of ``steps`` steps.
        steps: of an epoch.
        batch_size: labelled samples of a step, and unlabelled ones.
        lr: Adam's.
        weight: w at its full value.
        ramp: share of all steps over which w grows.
        temperature: T.
        alpha: a.
        precision: of autocast.
        label: shown beside the progress bar.

    Raises:
        BackdoorLabError: if the training diverges twice.
        InputError: if a split trusts all samples, or none.
    """
    model.to(ctx.device)
    generator = ctx.generator("mixmatch", device=ctx.device)
    step = MixMatchStep(
        model,
        lr=lr,
        weight=weight,
        ramp=round(ramp * epochs * steps),
        temperature=temperature,
        alpha=alpha,
        generator=generator,
        precision=precision,
    )
    batches = Resplit(model, data, choose, batch_size, steps, generator)
    watch = Watch(step.modules, step.optimizers)
    log = run_steps(step, batches, epochs, watch=watch, context=ctx, label=label)
    model.eval()
    return log


@dataclass(frozen=True, kw_only=True)
class MixMatch:
    """The hyper-parameters of MixMatch, for methods that end with it; an epoch draws as many labelled samples as the
    whole set has."""

    semi: float = param(
        1.0, "length of MixMatch / recipe", above=0, high=10, source="BackdoorBench: 100 of 100 epochs (paper: 190)"
    )
    semi_batch: int = param(64, "labelled samples per step, and unlabelled ones (in two views)", low=1, source="paper")
    semi_lr: float = param(0.002, "learning rate of Adam in MixMatch", above=0, source="paper")
    unlabelled: float = param(15.0, "weight of the unlabelled samples in the end", low=0, source="paper")
    ramp: float = param(1.0, "share of MixMatch over which that weight grows", low=0, high=1, source="paper")
    sharpening: float = param(0.5, "temperature by which guessed labels are sharpened", above=0, source="paper")
    mixing: float = param(0.75, "parameter of the Beta distribution of mixtures", above=0, source="paper")

    def semi_epochs(self, recipe: Recipe) -> int:
        """Length of MixMatch under a resolved recipe."""
        return max(1, round(self.semi * recipe.epochs))

    def mixmatch(
        self, model: Classifier, data: Split, choose: Choose, recipe: Recipe, ctx: Context, label: str
    ) -> FitLog:
        """Train a model in place; see :func:`fit_semi_supervised`."""
        return fit_semi_supervised(
            model,
            data,
            choose,
            ctx,
            epochs=self.semi_epochs(recipe),
            steps=max(1, len(data) // self.semi_batch),
            batch_size=min(self.semi_batch, len(data)),
            lr=self.semi_lr,
            weight=self.unlabelled,
            ramp=self.ramp,
            temperature=self.sharpening,
            alpha=self.mixing,
            precision=recipe.precision,
            label=label,
        )
