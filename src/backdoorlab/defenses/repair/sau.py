"""SAU: unlearn adversarial examples that the model shares with its backdoored self.

Wei, Zhang, Zha, Wu, "Shared Adversarial Unlearning: Backdoor Mitigation by Unlearning Shared Adversarial Examples",
NeurIPS 2023 (arXiv 2307.10562). Let g be the suspicious model, frozen, and f the model under repair, at first the same.
A perturbed sample is a shared adversarial example if both misclassify it alike; a triggered sample is one. For every
batch they are looked for by sign-gradient steps inside a box, from its upper corner:

    min_d  - b1 [L_adv(f) + L_adv(g)] / 2 + b2 JS(softmax f(x + d), softmax g(x + d))

with L_adv the cross-entropy of the samples that the model still classifies right, and JS (Jensen-Shannon) of those that
are not shared yet. Then f goes down

    l1 CE(f(x), y) + l2 CE(f(x + d), y) + l3 mean -log(1 - p_f(k_g | x + d))

the last term over samples where g is wrong about x + d and says another class k_g than about x: f learns not to say
what the backdoor says.

Choices and deviations
- x + d is clipped to the valid range; in published code the limits are computed and not used.
- Batch norms keep their statistics (evaluation mode), as in published code.
- Adam's rate is annealed over all epochs; published code makes such a schedule and never steps it.
- No augmentation: g's answers to x and x + d are compared.
- The mean over the batch divides by its size, so a batch with few such samples weighs less.

Limits: about ten times the cost of fine-tuning. Adversarial examples of a small network are not all of the backdoor's
kind; unlearning them costs clean accuracy.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorlab.core.method import param
from backdoorlab.defenses.base import RepairDefense, defenses
from backdoorlab.defenses.common.classes import need_samples
from backdoorlab.defenses.common.finetuning import batch_for
from backdoorlab.defenses.common.perturbation import shifted, valid_range
from backdoorlab.defenses.view import DefenderView
from backdoorlab.models.anatomy import frozen
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.batches import Batch
from backdoorlab.training.context import Context, autocast
from backdoorlab.training.loop import Descent, Objective, fit
from backdoorlab.training.recipes import Recipe


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """Divergence of the distributions of two sets of logits [B, K], in nats: [B] in [0, ln 2]."""
    p, q = first.softmax(1), second.softmax(1)
    middle = (p + q) / 2
    return (torch.special.xlogy(p, p / middle) + torch.special.xlogy(q, q / middle)).sum(1) / 2


def mean_where(values: Tensor, rows: Tensor) -> Tensor:
    """Mean of [B] over the rows where bool [B] holds, 0 if there are none."""
    return (values * rows).sum() / rows.sum().clamp_min(1)


def search_loss(mine: Tensor, theirs: Tensor, labels: Tensor, adversarial: float, divergence: float) -> Tensor:
    """What the perturbation of a batch minimises: a scalar.

    Args:
        mine: logits [B, K] of the model under repair, of perturbed samples.
        theirs: those of the suspicious model.
        labels: int64 [B].
        adversarial: b1.
        divergence: b2.
    """
    says, said = mine.argmax(1), theirs.argmax(1)
    wrong = [
        mean_where(F.cross_entropy(logits, labels, reduction="none"), answer == labels)
        for logits, answer in ((mine, says), (theirs, said))
    ]
    shared = (says != labels) & (says == said)
    return divergence * mean_where(jensen_shannon(mine, theirs), ~shared) - adversarial * sum(wrong) / 2


def sharing_loss(mine: Tensor, theirs: Tensor, clean: Tensor, labels: Tensor) -> Tensor:
    """Mean over the batch of -log(1 - p_f(k_g)), 0 for samples where the suspicious model is right or unmoved.

    Args:
        mine: logits [B, K] of the model under repair, of perturbed samples.
        theirs: those of the suspicious model, which says k_g.
        clean: those of the suspicious model, of clean samples.
        labels: int64 [B].
    """
    said = theirs.argmax(1)
    misled = (said != labels) & (said != clean.argmax(1))
    chance = mine.softmax(1).gather(1, said[:, None])[:, 0]
    return (-torch.log1p(1e-6 - chance) * misled).mean()


class SharedStep(Descent[Classifier]):
    """Look for shared adversarial examples of the batch, then a step that makes them less shared."""

    def __init__(
        self, model: Classifier, recipe: Recipe, objective: Objective[Classifier], *, method: SharedUnlearning
    ) -> None:
        """The suspicious model is a copy of ``model`` as it is now."""
        super().__init__(model, recipe, objective)
        self.method, self.limits = method, valid_range(method.name, model)
        self.suspicious = copy.deepcopy(model).eval()
        self.model.eval()

    def perturbed(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Prepared inputs, changed by at most ``bound`` per value."""
        method = self.method
        found = shifted(inputs, torch.full_like(inputs, method.bound), self.limits)
        with frozen(self.model), frozen(self.suspicious):
            for _ in range(method.steps):
                found.requires_grad_()
                logits = self.model(found), self.suspicious(found)
                loss = search_loss(*logits, labels, method.adversarial, method.divergence)
                (slope,) = torch.autograd.grad(loss, found)
                moved = found.detach() - method.step * slope.sign()
                found = shifted(inputs, (moved - inputs).clamp(-method.bound, method.bound), self.limits)
        return found

    def loss(self, batch: Batch) -> Tensor:
        """The outer loss."""
        method, labels = self.method, batch.labels
        found = self.perturbed(batch.inputs, labels)
        both = torch.cat([batch.inputs, found])
        with autocast(labels.device, self.recipe.precision):
            clean, mine = self.model(both).float().chunk(2)
            with torch.no_grad():
                known, theirs = self.suspicious(both).float().chunk(2)
        loss = method.clean_weight * F.cross_entropy(clean, labels)
        if method.adversarial_weight:
            loss = loss + method.adversarial_weight * F.cross_entropy(mine, labels)
        return loss + method.sharing_weight * sharing_loss(mine, theirs, known, labels)


@defenses.register
@dataclass(frozen=True, kw_only=True)
class SharedUnlearning(RepairDefense):
    """Unlearns adversarial examples shared with the suspicious model."""

    name: ClassVar[str] = "sau"
    paper: ClassVar[str] = "Wei et al., Shared Adversarial Unlearning, NeurIPS 2023, arXiv 2307.10562"
    year: ClassVar[int] = 2023
    modalities: ClassVar[tuple[str, ...]] = ("image", "audio", "video")

    epochs: int = param(100, "passes over the clean samples", low=1, source="BackdoorBench")
    lr: float = param(1e-3, "peak learning rate of Adam", above=0, source="ours (BackdoorBench: 1e-4)")
    batch_size: int = param(
        256, "samples per step; at most an eighth of the samples, or 16", low=1, source="BackdoorBench"
    )
    bound: float = param(
        0.2, "largest change of a value of the input, of a range of 1", above=0, source="BackdoorBench"
    )
    steps: int = param(5, "of the search per batch", low=1, source="BackdoorBench")
    step: float = param(0.2, "length of a step of the search per value", above=0, source="BackdoorBench")
    adversarial: float = param(0.01, "b1, weight of misleading both models", low=0, source="BackdoorBench")
    divergence: float = param(1.0, "b2, weight of their agreement", low=0, source="BackdoorBench")
    clean_weight: float = param(1.0, "l1, weight of clean samples", low=0, source="BackdoorBench")
    adversarial_weight: float = param(
        0.0, "l2, weight of perturbed samples with true labels", low=0, source="BackdoorBench"
    )
    sharing_weight: float = param(1.0, "l3, weight of not sharing", low=0, source="BackdoorBench")

    def run(self, view: DefenderView, ctx: Context) -> Classifier:
        """Search and unlearn batch by batch, in a copy."""
        need_samples(self.name, "clean", view.clean)
        repaired = copy.deepcopy(view.model)
        valid_range(self.name, repaired)
        recipe = Recipe(
            epochs=self.epochs,
            batch_size=batch_for(self.batch_size, len(view.clean)),
            optimizer="adamw",
            lr=self.lr,
            weight_decay=0.0,
            schedule="cosine",
            augment=False,
        )
        fit(
            repaired,
            view.clean,
            recipe,
            step=partial(SharedStep, method=self),
            chance=float("inf"),
            context=ctx,
            label="sau: unlearning",
        )
        return repaired
