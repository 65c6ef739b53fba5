"""D-BR: unlearn the samples whose features a turn changes, relearn those that it does not change.

Chen, Wu, Wang, "Effective Backdoor Defense by Exploiting Sensitivity of Poisoned Samples", NeurIPS 2022.
:mod:`~backdoorlab.defenses.common.sensitivity` divides the training set into trusted, suspected and uncertain samples.
The suspicious model then alternates: an epoch up the cross-entropy of the suspected ones, an epoch down that of the
trusted ones, ``rounds`` times. Needs the training set, but no clean samples.

Choices and deviations
- Ascent has no bound of its own and ruins a model whose suspected samples are partly clean. A sample's loss is ascended
  up to ``cap`` ln K only: at 1 that is where the model would do as well by guessing.
- Batch norms use their running statistics in ascent, so that batches of nothing but suspects do not move them.
- The published learning rate, 1e-4, belongs to models trained at 0.01; ``lr`` is stated as a share of the recipe's. On
  small sets a batch is at most an eighth of the trusted samples (or 16), so that a round has several steps.

Cost: 0.12 trainings of the recipe for distinguishing, and ``rounds`` passes over a quarter of the set.

Limits: those of sample distinguishing; clean samples among the suspected are unlearned as well, at the price of clean
accuracy. Where training sets are small, so that rounds are few steps, the published rate changes little: raise ``lr``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorlab.core.method import param
from backdoorlab.data.split import Split
from backdoorlab.defenses.base import RepairDefense, defenses
from backdoorlab.defenses.common.classes import need_classes, need_samples
from backdoorlab.defenses.common.finetuning import batch_for
from backdoorlab.defenses.common.sensitivity import Distinguishing
from backdoorlab.defenses.training.abl import capped_ascent
from backdoorlab.defenses.view import DefenderView
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.batches import Batch, Shuffled
from backdoorlab.training.context import Context
from backdoorlab.training.loop import make_optimizer
from backdoorlab.training.recipes import Recipe
from backdoorlab.training.steps import run_steps
from backdoorlab.training.watch import Watch


class Alternating:
    """Epochs of (ascend?, batch): all suspected samples, then all trusted ones."""

    def __init__(self, suspected: Shuffled, trusted: Shuffled) -> None:
        """Neither of them empty."""
        self.suspected, self.trusted = suspected, trusted

    def __len__(self) -> int:
        return len(self.suspected) + len(self.trusted)

    def __iter__(self) -> Iterator[tuple[bool, Batch]]:
        for batch in self.suspected:
            yield True, batch
        for batch in self.trusted:
            yield False, batch


class UnlearnStep:
    """A step up (to a cap) or down the cross-entropy of a batch."""

    def __init__(self, model: Classifier, recipe: Recipe, cap: float) -> None:
        """``cap`` is the largest loss of a sample that is ascended."""
        self.model, self.cap, self.clip = model, cap, recipe.clip
        self.modules, self.optimizers = (model,), [make_optimizer(model, recipe)]

    def __call__(self, batch: tuple[bool, Batch]) -> Tensor:
        """See :class:`~backdoorlab.training.steps.Step`."""
        ascend, samples = batch
        self.model.train(not ascend)
        losses = F.cross_entropy(self.model(samples.inputs), samples.labels, reduction="none")
        loss = capped_ascent(losses, self.cap) if ascend else losses.mean()
        self.optimizers[0].zero_grad(set_to_none=True)
        loss.backward()
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizers[0].step()
        return loss.detach()


@defenses.register
@dataclass(frozen=True, kw_only=True)
class BackdoorRemoval(Distinguishing, RepairDefense):
    """Unlearning of sensitive, relearning of insensitive training samples."""

    name: ClassVar[str] = "d_br"
    paper: ClassVar[str] = "Chen et al., Effective Backdoor Defense by Exploiting Sensitivity, NeurIPS 2022"
    year: ClassVar[int] = 2022
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    aliases: ClassVar[tuple[str, ...]] = ("d-br", "dbr")
    reads: ClassVar[tuple[str, ...]] = ("model", "suspicious", "blueprint")
    needs_clean_fraction: ClassVar[float] = 0.0

    rounds: int = param(20, "of unlearning and relearning", low=1, source="paper, BackdoorBench")
    lr: float = param(
        0.01, "learning rate / the recipe's peak", above=0, source="paper, BackdoorBench: 1e-4 for models of 0.01"
    )
    batch_size: int = param(128, "samples per step; fewer on small sets", low=1, source="paper, BackdoorBench")
    weight_decay: float = param(5e-4, "L2 penalty", low=0, source="paper, BackdoorBench")
    cap: float = param(1.0, "samples with a loss above cap * ln K are not ascended", above=0, source="ours")

    def run(self, view: DefenderView, ctx: Context) -> Classifier:
        """Distinguish samples, then unlearn and relearn in a copy."""
        data, blueprint = view.suspicious, view.blueprint
        need_samples(self.name, "suspicious", data, 2)
        need_classes(self.name, view.model, data)
        scores = self.distinguish(data, blueprint, ctx.child("sd"), self.name)
        trusted, suspected = self.divided(scores, data.labels)
        repaired = copy.deepcopy(view.model)
        if bool(suspected.any()):
            self.unlearn(repaired, data[suspected], data[trusted], blueprint.recipe, ctx.child("unlearn"))
        else:
            ctx.warn(f"d_br: all {len(data)} samples are trusted, so that nothing is unlearned")
        return repaired.eval()

    def unlearn(self, model: Classifier, suspected: Split, trusted: Split, known: Recipe, ctx: Context) -> None:
        """Alternate in place."""
        batch = batch_for(self.batch_size, len(trusted))
        recipe = Recipe(
            optimizer=known.optimizer,
            lr=self.lr * known.lr,
            momentum=known.momentum,
            weight_decay=self.weight_decay,
            clip=known.clip,
        )
        generator = ctx.generator("d_br", device=ctx.device)
        sides = [
            Shuffled(part, model.modality, min(batch, len(part)), generator, augment=known.augment)
            for part in (suspected, trusted)
        ]
        step = UnlearnStep(model, recipe, self.cap * math.log(model.num_classes))
        run_steps(
            step,
            Alternating(*sides),
            self.rounds,
            watch=Watch(step.modules, step.optimizers),
            context=ctx,
            label="d_br: unlearning and relearning",
        )
