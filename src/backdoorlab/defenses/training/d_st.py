"""D-ST: find the samples whose features a turn changes, and use their labels less.

Chen, Wu, Wang, "Effective Backdoor Defense by Exploiting Sensitivity of Poisoned Samples", NeurIPS 2022.
:mod:`~backdoorlab.defenses.common.sensitivity` divides the training set into trusted, suspected and uncertain samples.
Then a fresh network is trained:

1. its features by contrastive learning, where trusted samples are pulled to all trusted samples of their label (SupCon)
   and all others to their own other view only;
2. its linear head, on fixed features, by

       CE(trusted) - weight CE(suspected),     weight = 0.001

   Uncertain samples have no part in this.

Choices and deviations
- Lengths are shares of the recipe; ``contrastive`` is 2 (200 epochs beside 100), as published.
- The head is trained on stored features by Adam, a number of steps. The published learning rate of 5 for SGD fits the
  scale of one network's features; Adam on scaled features needs no such number.
- The cross-entropy of a suspected sample is ascended up to ``cap`` ln K only, since it has no upper bound.
- Views as for SimCLR, but without blur, as published.
- The suspected samples are what is reported as isolated; scores are their sensitivity.

Cost: as many samples pass the network as in 0.12 + 4 trainings of the recipe.

Limits: those of sample distinguishing. A class of which only few samples are trusted has a poor head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorlab.core.method import param
from backdoorlab.data.split import Split
from backdoorlab.defenses.base import TrainingDefense, TrainingReport, defenses
from backdoorlab.defenses.common.classes import need_samples
from backdoorlab.defenses.common.contrastive import fit_head, learn_features
from backdoorlab.defenses.common.sensitivity import Distinguishing
from backdoorlab.defenses.view import DefenderView
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.context import Context


def secure_loss(logits: Tensor, labels: Tensor, trusted: int, weight: float, cap: float) -> Tensor:
    """CE of the first ``trusted`` rows less ``weight`` times that of the others, each of these counted up to ``cap``.

    Args:
        logits: float [B, K].
        labels: int64 [B].
        trusted: rows, at least one.
        weight: of the others; there may be none.
        cap: largest cross-entropy that is ascended.
    """
    losses = F.cross_entropy(logits, labels, reduction="none")
    descended, ascended = losses[:trusted].mean(), losses[trusted:].clamp(max=cap)
    return descended - weight * ascended.mean() if len(ascended) else descended


@defenses.register
@dataclass(frozen=True, kw_only=True)
class SecureTraining(Distinguishing, TrainingDefense):
    """Contrastive training that trusts the labels of insensitive samples only."""

    name: ClassVar[str] = "d_st"
    paper: ClassVar[str] = "Chen et al., Effective Backdoor Defense by Exploiting Sensitivity, NeurIPS 2022"
    year: ClassVar[int] = 2022
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    aliases: ClassVar[tuple[str, ...]] = ("d-st", "dst")

    contrastive: float = param(
        2.0, "length of the contrastive training / recipe", above=0, high=20, source="paper, BackdoorBench"
    )
    contrastive_batch: int = param(
        128, "samples per step of it; fewer on small sets", low=2, source="paper, BackdoorBench"
    )
    contrastive_lr: float = param(0.5, "its peak learning rate", above=0, source="paper, BackdoorBench")
    temperature: float = param(0.1, "of the contrastive loss", above=0, source="paper, BackdoorBench")
    weight_decay: float = param(1e-4, "L2 penalty of the contrastive training", low=0, source="paper, BackdoorBench")
    head_steps: int = param(
        1000, "steps of 128 samples by which the head is trained", low=1, source="ours (BackdoorBench: 10 epochs)"
    )
    head_lr: float = param(0.002, "learning rate of the head's Adam", above=0, source="ours")
    weight: float = param(0.001, "weight of the suspected samples' loss", low=0, source="paper, BackdoorBench")
    cap: float = param(2.0, "suspected samples with a loss above cap * ln K are not ascended", above=0, source="ours")

    def run(self, view: DefenderView, ctx: Context) -> TrainingReport:
        """Distinguish samples, learn features, learn a head."""
        data, blueprint = view.suspicious, view.blueprint
        need_samples(self.name, "suspicious", data, 2)
        scores = self.distinguish(data, blueprint, ctx.child("sd"), self.name)
        trusted, suspected = self.divided(scores, data.labels)
        recipe = blueprint.recipe.resolve(len(data))
        model = blueprint.build_model(ctx)
        learn_features(
            model,
            data,
            ctx.child("features"),
            epochs=max(1, round(self.contrastive * recipe.epochs)),
            batch_size=self.contrastive_batch,
            lr=self.contrastive_lr,
            weight_decay=self.weight_decay,
            temperature=self.temperature,
            groups=torch.where(trusted, data.labels.cpu(), -1),
            blur=False,
            precision=recipe.precision,
            label="d_st: learning features",
        )
        self.learn_head(model, data, trusted, suspected, ctx)
        notes = {"trusted": int(trusted.sum()), "suspected": int(suspected.sum())}
        return TrainingReport(model, scores, suspected, notes)

    def learn_head(self, model: Classifier, data: Split, trusted: Tensor, suspected: Tensor, ctx: Context) -> None:
        """Train the head on fixed features of trusted and suspected samples, bool [N] each."""
        labels, cap = data.labels.to(ctx.device), self.cap * math.log(model.num_classes)
        parts = [part.nonzero().flatten().to(ctx.device) for part in (trusted, suspected)]
        size = min(128, len(parts[0]))

        def draw(generator: torch.Generator) -> Tensor:
            drawn = [
                part[torch.randint(len(part), (size,), generator=generator, device=generator.device)]
                for part in parts
                if len(part)
            ]
            return torch.cat(drawn)

        fit_head(
            model,
            data,
            draw,
            lambda logits, rows: secure_loss(logits, labels[rows], size, self.weight, cap),
            ctx.child("head"),
            steps=self.head_steps,
            lr=self.head_lr,
            label="d_st: training the head",
        )
