"""ASD: a pool of trusted labels that starts from a few clean samples and is split anew before every epoch.

Gao, Bai, Gu, Yang, Xia, "Backdoor Defense via Adaptively Splitting Poisoned Dataset", CVPR 2023 (arXiv 2303.12993).
The model is trained by MixMatch throughout: samples in the trusted pool with their labels, all others without. The pool
is chosen by the symmetric cross-entropy l of every sample (0.1 CE + RCE):

1. class by class, first half of the training: the defender's clean samples, and of each class the ``grow`` lowest l,
   as many more at regular intervals;
2. of all samples, third quarter: the share ``credible`` of lowest l;
3. meta-split, last quarter: a copy of the model is trained for one epoch on the whole set with its labels, which
   poison follows at once and hard clean samples do not; the share ``credible`` of lowest l(model) - l(copy) is trusted.

Stages, lengths, rates and the pool's growth are those of the authors' code.

Choices and deviations
- The clean samples are the defender's own, ``seeds`` of each class, added to the training set and trusted throughout.
  (In the authors' code they are known rows of the training set, and trusted in the first stage.)
- Lengths are shares of the recipe; ``semi`` is 1.2 (120 epochs beside 100). An epoch of MixMatch draws as many
  labelled samples as the set has (CIFAR-10: 782 steps; the authors' code: 1,024 for any set).
- The pool grows eleven times in the first stage, as published, by 10 samples of each class, which is 0.2 % of a class
  of CIFAR-10. On small sets that would soon be the whole class: it ends at ``most`` of it.
- In stages 2 and 3 each class keeps at least a tenth in the pool, so that none vanishes.
- The copy trains the later half of its parameter tensors; the authors' code names the last two stages and the head of a
  ResNet-18, which is the same there.
- The model at the end is the result. Scores are l in the end; nothing is isolated.

Cost: with the defaults as many samples pass the network, forward and backward, as in 3.6 trainings of the recipe, 1.2
more forward, and 0.3 of the copies: some 5 trainings.

Limits: needs clean samples. Poison that is as hard to learn as hard clean samples passes the meta-split; on small sets
an epoch of the copy is few steps.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backdoorlab.core.method import param
from backdoorlab.data.split import Split, join
from backdoorlab.defenses.base import TrainingDefense, TrainingReport, defenses
from backdoorlab.defenses.common.classes import need_samples, rows_per_class
from backdoorlab.defenses.common.semi_supervised import MixMatch
from backdoorlab.defenses.common.trust import lowest_of_each, symmetric_cross_entropy, trusted_half
from backdoorlab.defenses.view import DefenderView
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.context import Context, Silent
from backdoorlab.training.evaluate import predict
from backdoorlab.training.loop import fit
from backdoorlab.training.recipes import Recipe

INCREMENTS = 12
"""The pool of the first stage grows at each twelfth of it but the first."""


def stage_of(epoch: int, epochs: int) -> int:
    """1 in the first half of a training, 2 in its third quarter, 3 in the last."""
    return 1 if 2 * epoch < epochs else 2 if 4 * epoch < 3 * epochs else 3


def pool_size(epoch: int, epochs: int, grow: int) -> int:
    """Samples of each class that the first stage trusts in an epoch, beside the clean ones."""
    return grow * (2 * INCREMENTS * epoch // epochs)


def class_aware(losses: Tensor, labels: Tensor, count: int, most: float) -> Tensor:
    """The ``count`` lowest losses of each class, at most a share ``most`` of it: bool [N].

    Args:
        losses: float [N].
        labels: int64 [N].
        count: may be 0.
        most: share of a class.
    """
    chosen = torch.zeros(len(losses), dtype=torch.bool)
    if count:
        chosen = lowest_of_each(losses, labels, count=count) & lowest_of_each(losses, labels, share=most)
    return chosen


def later_half(model: Classifier) -> None:
    """Freeze the first half of the parameter tensors."""
    parameters = list(model.parameters())
    for number, parameter in enumerate(parameters):
        parameter.requires_grad_(2 * number >= len(parameters))


@defenses.register
@dataclass(frozen=True, kw_only=True)
class AdaptiveSplitting(MixMatch, TrainingDefense):
    """MixMatch on a pool of trusted labels that is split adaptively."""

    name: ClassVar[str] = "asd"
    paper: ClassVar[str] = "Gao et al., Backdoor Defense via Adaptively Splitting Poisoned Dataset, CVPR 2023"
    year: ClassVar[int] = 2023
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    reads: ClassVar[tuple[str, ...]] = ("suspicious", "blueprint", "clean")
    needs_clean_fraction: ClassVar[float] = 0.05

    semi: float = param(
        1.2, "length of the training / recipe", above=0, high=10, source="authors' code: 120 epochs, recipe of 100"
    )
    seeds: int = param(10, "clean samples of each class that are used", low=1, source="authors' code")
    grow: int = param(10, "samples of each class by which the pool grows", low=1, source="authors' code")
    most: float = param(0.2, "share of a class that the first stage trusts at most", above=0, high=0.9, source="ours")
    credible: float = param(
        0.5, "share of the samples that is trusted afterwards", above=0, high=0.95, source="authors' code"
    )
    virtual_lr: float = param(0.015, "learning rate of the copy's Adam", above=0, source="authors' code")
    virtual_batch: int = param(128, "samples per step of the copy", low=1, source="authors' code")

    def run(self, view: DefenderView, ctx: Context) -> TrainingReport:
        """Train from scratch, with a new split before every epoch.

        Raises:
            InputError: without suspicious or without clean samples.
        """
        data, blueprint = view.suspicious, view.blueprint
        need_samples(self.name, "suspicious", data, 2)
        need_samples(self.name, "clean", view.clean)
        rows = rows_per_class(view.clean.labels, view.clean.num_classes)
        seeds = view.clean[torch.cat([part[: self.seeds] for part in rows])]
        both = Split(
            join([data.inputs, seeds.inputs]), torch.cat([data.labels.cpu(), seeds.labels.cpu()]), data.classes
        )
        recipe = blueprint.recipe.resolve(len(data))
        model, epochs = blueprint.build_model(ctx), self.semi_epochs(recipe)
        sizes: list[int] = []

        def choose(model: Classifier, epoch: int) -> Tensor:
            pool = self.pool(model, data, min(epoch, epochs - 1), epochs, ctx)
            sizes.append(int(pool.sum()))
            return torch.cat([pool, torch.ones(len(seeds), dtype=torch.bool)])

        self.mixmatch(model, both, choose, recipe, ctx.child("semi"), "asd: semi-supervised training")
        return TrainingReport(model, self.losses(model, data), notes={"seeds": len(seeds), "pool": sizes})

    def losses(self, model: Classifier, data: Split) -> Tensor:
        """The loss l of each sample in evaluation mode: float32 [N] on the CPU."""
        return symmetric_cross_entropy(predict(model, data.inputs), data.labels.cpu())

    def pool(self, model: Classifier, data: Split, epoch: int, epochs: int, ctx: Context) -> Tensor:
        """Samples of the suspicious set whose labels are trusted in an epoch: bool [N]."""
        losses, labels, stage = self.losses(model, data), data.labels.cpu(), stage_of(epoch, epochs)
        if stage == 1:
            return class_aware(losses, labels, pool_size(epoch, epochs, self.grow), self.most)
        if stage == 3:
            losses = losses - self.losses(self.virtual(model, data, ctx.child("virtual", epoch)), data)
        return trusted_half(losses, labels, self.credible)

    def virtual(self, model: Classifier, data: Split, ctx: Context) -> Classifier:
        """A copy of the model after an epoch on all samples with their labels."""
        after = copy.deepcopy(model)
        later_half(after)
        recipe = Recipe(
            epochs=1,
            batch_size=self.virtual_batch,
            optimizer="adamw",
            lr=self.virtual_lr,
            weight_decay=0,
            schedule="constant",
        )
        quiet = dataclasses.replace(ctx, reporter=Silent())
        fit(after, data, recipe, chance=math.inf, context=quiet, label="asd: virtual training")
        return after
