"""ABL, anti-backdoor learning: isolate what is learned too fast, then unlearn it.

Li, Lyu, Koren, Lyu, Li, Ma, "Anti-Backdoor Learning: Training Clean Models on Poisoned Data", NeurIPS 2021
(arXiv 2110.11571).

Two weaknesses of backdoors are used: poisoned samples are learned within the first epochs, and they are tied to one
class. With l the cross-entropy of a sample, training on all data first minimises (LGA, local gradient ascent)

    L1 = E_D [ sign(l - gamma) l ]

so that a sample whose loss falls below gamma is pushed back up; only poisoned samples get far below it. At the
turning epoch the share ``isolation`` of lowest losses, measured in evaluation mode without ascent, is set aside as D_b,
the rest is D_c. Then (GGA, global gradient ascent)

    L2 = E_Dc [ l ] - E_Db [ l ]

Before that a recovery phase trains on D_c alone by the task's recipe, as the authors' code and BackdoorBench do.
``mode="joint"`` then minimises L2 as it stands, every batch of D_b beside one of D_c; ``mode="sequential"``, the
practice of that code, only ascends on D_b. Both stop as soon as D_b is forgotten (accuracy below 1/K).

Choices:
- Lengths are shares of the task's recipe (paper: turning epoch 20 of 100; BackdoorBench: 20 + 60 + 20 epochs), so that
  the method scales with short recipes. The isolation phase has a constant learning rate: annealing would let the losses
  of clean samples fall too.
- A sample's loss is the mean over the ends of the later half of the isolation phase's epochs (at least the last): a
  single one depends on which samples the last few steps happened to raise.
- The equation's sign is per sample, published code applies it to the mean of a batch. The default follows the code:
  per sample, poison is held at gamma as soon as it is learned, so that it no longer has the lowest losses.
- Flooding, |L - gamma| + gamma, is the published code's default and the option ``local_loss="flooding"``.
- Guards, since unbounded ascent destroys a network: the loss that is ascended is capped at ``cap`` ln K (ln K is that
  of a uniform guess) and gradients are clipped (per parameter tensor).
- ``ascent_loss="unlikelihood"`` minimises -log(1 - p) of the (poisoned) label instead of -CE: the same direction, but
  its gradient does not vanish where D_b is fitted perfectly, as it is by small networks on easy data.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorlab.core.errors import InputError
from backdoorlab.core.method import param
from backdoorlab.data.split import Split
from backdoorlab.defenses.base import TrainingDefense, TrainingReport, defenses
from backdoorlab.defenses.view import DefenderView
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.blueprint import Blueprint
from backdoorlab.training.context import Context
from backdoorlab.training.evaluate import predict
from backdoorlab.training.loop import Descent, Objective, fit
from backdoorlab.training.recipes import Recipe


def lga_loss(losses: Tensor, gamma: float, mode: str = "per_sample") -> Tensor:
    """Mean of sign(l - gamma) l over float [B] losses, or sign(L - gamma) L of their mean L ("batch_mean")."""
    losses = losses.mean(0, keepdim=True) if mode == "batch_mean" else losses
    return ((losses.detach() - gamma).sign() * losses).mean()


def flooding_loss(losses: Tensor, level: float, mode: str = "batch_mean") -> Tensor:
    """|L - level| + level of the mean L of float [B] losses, or the mean over samples ("per_sample")."""
    losses = losses.mean(0, keepdim=True) if mode == "batch_mean" else losses
    return ((losses - level).abs() + level).mean()


def capped_ascent(losses: Tensor, cap: float) -> Tensor:
    """Minus the mean of float [B] losses, without gradient where a loss exceeds the cap."""
    return -losses.clamp(max=cap).mean()


def unlikelihood(losses: Tensor) -> Tensor:
    """Mean of -log(1 - p) of float [B] losses l = -log p; its gradient is largest where the sample is certain."""
    return -torch.log1p(-(-losses).exp().clamp(max=1 - 1e-6)).mean()


def sample_losses(model: Classifier, data: Split) -> Tensor:
    """Cross-entropy of each sample in evaluation mode: float32 [N] on the CPU."""
    return F.cross_entropy(predict(model, data.inputs), data.labels.cpu(), reduction="none")


class AscentStep(Descent[Classifier]):
    """The ordinary step, with a bound on the norm of each parameter tensor's gradient."""

    def __init__(self, model: Classifier, recipe: Recipe, objective: Objective[Classifier], *, bound: float) -> None:
        """``bound`` is the largest norm."""
        super().__init__(model, recipe, objective)
        self.bound = bound

    def clip(self) -> None:
        """Bound each gradient by itself, then all of them together as the recipe says."""
        for parameter in self.params:
            if parameter.grad is not None:
                parameter.grad.mul_(self.bound / parameter.grad.norm().clamp(min=self.bound))
        super().clip()


@defenses.register
@dataclass(frozen=True, kw_only=True)
class AntiBackdoorLearning(TrainingDefense):
    """Isolation by local, unlearning by global gradient ascent."""

    name: ClassVar[str] = "abl"
    paper: ClassVar[str] = "Li et al., Anti-Backdoor Learning, NeurIPS 2021, arXiv 2110.11571"
    year: ClassVar[int] = 2021
    modalities: ClassVar[tuple[str, ...]] = ("image", "text", "audio", "video")

    mode: str = param("joint", "how D_b is unlearned", choices=("joint", "sequential"), source="paper")
    local_loss: str = param("lga", "loss of the isolation phase", choices=("lga", "flooding"), source="paper")
    lga_mode: str = param(
        "batch_mean",
        "what the local loss is applied to",
        choices=("per_sample", "batch_mean"),
        source="authors' code (paper: per sample)",
    )
    gamma: float = param(0.5, "loss below which the isolation phase ascends", low=0, source="paper")
    isolation: float = param(0.01, "share of the training set that is isolated", above=0, high=0.5, source="paper")
    turning: float = param(0.2, "length of the isolation phase / recipe", above=0, high=1, source="paper")
    recovery: float = param(0.6, "length of the training on D_c / recipe", low=0, high=10, source="BackdoorBench")
    isolation_lr: float = param(0.3, "learning rate of the isolation phase / the recipe's peak", above=0, source="ours")
    isolation_augment: bool = param(False, "augment in the isolation phase (weakens triggers)", source="paper")
    ascent_loss: str = param(
        "cross-entropy", "what is ascended on D_b", choices=("cross-entropy", "unlikelihood"), source="paper"
    )
    ascent_steps: int = param(60, "steps of unlearning at most", low=0, source="ours (authors' code: 20)")
    ascent_lr: float = param(5e-4, "learning rate of the unlearning", above=0, source="authors' code")
    ascent_batch: int = param(128, "samples of D_b per step", low=1, source="authors' code")
    cap: float = param(2.0, "samples with a loss above cap * ln K are not ascended further", above=0, source="ours")
    clip: float = param(5.0, "largest norm of a parameter's gradient while ascending", above=0, source="ours")

    def run(self, view: DefenderView, ctx: Context) -> TrainingReport:
        """Isolate, recover, unlearn.

        Raises:
            InputError: if the isolated share of the data is less than one sample.
        """
        data, blueprint = view.suspicious, view.blueprint
        count = int(self.isolation * len(data))
        if count == 0:
            raise InputError(
                f"abl: an isolation of {self.isolation:g} of {len(data)} samples isolates none; "
                f"the smallest useful value is {1 / len(data):.2g}"
            )
        recipe = blueprint.recipe.resolve(len(data))
        model, losses = self.isolate(data, blueprint, ctx)
        isolated = torch.zeros(len(data), dtype=torch.bool)
        isolated[losses.topk(count, largest=False).indices] = True
        kept, suspects = data[~isolated], data[isolated]
        second = dataclasses.replace(recipe, epochs=round(self.recovery * recipe.epochs))
        fit(model, kept, second, context=ctx.child("recovery"), label="abl: training on the rest")
        notes = {
            "isolated": count,
            "isolation_epochs": self.isolation_epochs(recipe),
            "isolated_loss": float(losses[isolated].mean()),
            "kept_loss": float(losses[~isolated].mean()),
            "unlearning_steps": self.unlearn(model, suspects, kept, recipe, ctx),
            "isolated_loss_after": float(sample_losses(model, suspects).mean()),
        }
        return TrainingReport(model, -losses, isolated, notes)

    def isolation_epochs(self, recipe: Recipe) -> int:
        """Length of the isolation phase under a resolved recipe."""
        return max(1, round(self.turning * recipe.epochs))

    def isolate(self, data: Split, blueprint: Blueprint, ctx: Context) -> tuple[Classifier, Tensor]:
        """The model at the turning epoch and the mean loss of every sample, float32 [N]; low ones are suspicious."""
        recipe = blueprint.recipe.resolve(len(data))
        recipe = dataclasses.replace(
            recipe,
            epochs=self.isolation_epochs(recipe),
            schedule="constant",
            lr=self.isolation_lr * recipe.lr,
            augment=self.isolation_augment,
        )
        later = recipe.epochs - math.ceil(recipe.epochs / 2)
        ends: list[Tensor] = []

        def look(epoch: int, model: Classifier) -> None:
            if epoch > later:
                ends.append(sample_losses(model, data))

        model, _ = blueprint.fit(
            data, ctx, recipe=recipe, objective=self.isolation_objective, on_epoch=[look], label="abl: isolating"
        )
        return model, torch.stack(ends).mean(0)

    def isolation_objective(self, model: Classifier, inputs: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """L1 of a batch."""
        losses = F.cross_entropy(model(inputs), labels, reduction="none")
        local = lga_loss if self.local_loss == "lga" else flooding_loss
        return local(losses, self.gamma, self.lga_mode)

    def unlearning_objective(self, model: Classifier, kept: Split, batch: int, ctx: Context) -> Objective[Classifier]:
        """L2 of a batch of D_b, in mode "joint" with ``batch`` samples of D_c drawn beside it."""
        table, wanted = model.modality.encode(kept.inputs).to(ctx.device), kept.labels.to(ctx.device)
        generator, cap = ctx.generator("kept", device=ctx.device), self.cap * math.log(model.num_classes)

        def objective(model: Classifier, inputs: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
            count = batch if self.mode == "joint" else 0
            drawn = torch.randint(len(table), (count,), generator=generator, device=table.device)
            beside = model.modality.prepare(table[drawn], train=True, generator=generator)
            ascended, descended = model(torch.cat([inputs, beside])).split([len(inputs), count])
            losses = F.cross_entropy(ascended, labels, reduction="none")
            loss = unlikelihood(losses) if self.ascent_loss == "unlikelihood" else capped_ascent(losses, cap)
            return loss + F.cross_entropy(descended, wanted[drawn]) if count else loss

        return objective

    def unlearn(self, model: Classifier, suspects: Split, kept: Split, recipe: Recipe, ctx: Context) -> int:
        """Minimise L2 until D_b is forgotten (accuracy below 1/K) or the budget is spent; returns the steps."""
        batch = min(self.ascent_batch, len(suspects))
        steps = len(suspects) // batch
        ascent = dataclasses.replace(
            recipe,
            epochs=math.ceil(self.ascent_steps / steps),
            batch_size=batch,
            lr=self.ascent_lr,
            schedule="constant",
            weight_decay=0.0,
            augment=False,
        )

        def forgotten(epoch: int, model: Classifier) -> bool:
            predicted = predict(model, suspects.inputs).argmax(1)
            return float((predicted == suspects.labels.cpu()).float().mean()) < 1 / model.num_classes

        if not ascent.epochs or forgotten(0, model):
            return 0
        log = fit(
            model,
            suspects,
            ascent,
            objective=self.unlearning_objective(model, kept, recipe.batch_size, ctx),
            step=partial(AscentStep, bound=self.clip),
            on_epoch=[forgotten],
            chance=math.inf,
            context=ctx.child("ascent"),
            label="abl: unlearning",
        )
        return log.steps
