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

``mode="joint"`` minimises L2 as it stands. ``mode="sequential"``, the practice of the authors' code and of
BackdoorBench, first trains on D_c alone and then only ascends on D_b, for a few steps at a tiny learning rate.

Choices:
- Lengths are shares of the task's recipe (paper: turning epoch 20 of 100; BackdoorBench: 20 + 60 + 20 epochs), so that
  the method scales with short recipes. The isolation phase has a constant learning rate: annealing would let the losses
  of clean samples fall too.
- The equation's sign is per sample; published code applies it to the batch mean (``lga_mode="batch_mean"``). Flooding,
  |L - gamma| + gamma, is the published code's default and the option ``local_loss="flooding"``.
- Joint: every step adds a batch of D_b of the size ``ascent_batch`` times the batch, in the same forward pass.
- Guards, since unbounded ascent destroys a network: the loss that is ascended is capped at ``cap`` ln K (ln K is that
  of a uniform guess), gradients are clipped (per parameter tensor), and sequential ascent stops as soon as accuracy on
  D_b is below 1/K.

Limits, seen on digits (recipe "smoke", BadNets at 10 %, 14 samples isolated). ``isolation_lr`` was chosen on seeds 0
and 1 among 36 settings of the isolation phase; the numbers are those of seeds 2 to 7, which had no part in it. **The
method does not reach its published effect here:**
- isolation precision 1.00 0.64 1.00 0.79 1.00 0.50. In the search, local ascent at gamma 0.5 isolated worse than plain
  training (mean precision 0.67 against 0.84 over the same settings);
- joint: ASR 0.68 0.79 0.86 0.62 0.25 0.78 at ACC 0.88 to 0.98 (undefended about 0.98). D_b is learned as an exception;
- sequential: ASR 0.00 0.18 0.00 0.08 0.00 0.46 at ACC 0.79 to 0.86. Re-estimating the normalisation statistics on D_c
  afterwards (seeds 5 to 7) brings ASR back to 0.94 and more: batches of D_b alone shift the statistics, the weights
  keep the backdoor. With frozen statistics nothing happens, as the losses of D_b, and so the gradients, are about 0;
- benign data: ACC 0.87 to 0.94 joint, 0.73 to 0.92 sequential, since clean samples are ascended on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.core.errors import InputError
from backdoorlab.core.method import param
from backdoorlab.data.split import Split
from backdoorlab.defenses.base import TrainingDefense, TrainingReport, defenses
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.context import Context
from backdoorlab.training.evaluate import predict
from backdoorlab.training.loop import Objective, fit
from backdoorlab.training.recipes import Recipe
from backdoorlab.training.task import Task


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


def sample_losses(model: Classifier, data: Split) -> Tensor:
    """Cross-entropy of each sample in evaluation mode: float32 [N] on the CPU."""
    return F.cross_entropy(predict(model, data.inputs), data.labels.cpu(), reduction="none")


@contextmanager
def clipped_gradients(model: nn.Module, bound: float) -> Iterator[None]:
    """Bound the norm of every parameter tensor's gradient inside the block."""
    handles = [p.register_hook(lambda g: g * (bound / g.norm().clamp(min=bound))) for p in model.parameters()
               if p.requires_grad]  # fmt: skip
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
    lga_mode: str = param("per_sample", "what the local loss is applied to", choices=("per_sample", "batch_mean"),
                          source="paper")  # fmt: skip
    gamma: float = param(0.5, "loss below which the isolation phase ascends", low=0, source="paper")
    isolation: float = param(0.01, "share of the training set that is isolated", above=0, high=0.5, source="paper")
    turning: float = param(0.2, "length of the isolation phase / recipe", above=0, high=1, source="paper")
    recovery: float = param(0.6, "length of the training on D_c / recipe (sequential)", low=0, high=10,
                            source="BackdoorBench")  # fmt: skip
    isolation_lr: float = param(0.3, "learning rate of the isolation phase / the recipe's peak", above=0, source="ours")
    isolation_augment: bool = param(False, "augment in the isolation phase (weakens triggers)", source="paper")
    ascent: float = param(0.2, "length of the ascent on D_b / recipe (sequential)", low=0, high=10,
                          source="BackdoorBench")  # fmt: skip
    ascent_steps: int = param(20, "at least so many steps of ascent (sequential)", low=0, source="authors' code")
    ascent_lr: float = param(5e-4, "learning rate of the ascent (sequential)", above=0, source="authors' code")
    ascent_batch: float = param(0.25, "samples of D_b per step / batch size (joint)", above=0, high=1, source="ours")
    cap: float = param(2.0, "samples with a loss above cap * ln K are not ascended further", above=0, source="ours")
    clip: float = param(5.0, "largest norm of a parameter's gradient while ascending", above=0, source="ours")

    def train(self, data: Split, task: Task, ctx: Context) -> TrainingReport:
        """Isolate, recover, unlearn.

        Raises:
            InputError: if the isolated share of the data is less than one sample.
        """
        count = int(self.isolation * len(data))
        if count == 0:
            raise InputError(
                f"abl: an isolation of {self.isolation:g} of {len(data)} samples isolates none; "
                f"the smallest useful value is {1 / len(data):.2g}"
            )
        recipe, epochs = task.recipe.resolve(len(data)), self.isolation_epochs(task.recipe.resolve(len(data)))
        model, losses = self.isolate(data, task, ctx)
        isolated = torch.zeros(len(data), dtype=torch.bool)
        isolated[losses.topk(count, largest=False).indices] = True
        kept, suspects = data[~isolated], data[isolated]
        notes = {
            "isolated": count,
            "isolation_epochs": epochs,
            "isolated_loss": float(losses[isolated].mean()),
            "kept_loss": float(losses[~isolated].mean()),
        }
        if self.mode == "joint":
            second = dataclasses.replace(recipe, epochs=max(1, recipe.epochs - epochs))
            with clipped_gradients(model, self.clip):
                fit(model, kept, second, objective=self.joint_objective(model, suspects, second, ctx),
                    context=ctx.child("joint"), label="abl: unlearning while training")  # fmt: skip
        else:
            second = dataclasses.replace(recipe, epochs=round(self.recovery * recipe.epochs))
            fit(model, kept, second, context=ctx.child("recovery"), label="abl: training on the rest")
            notes["ascent_epochs"] = self.unlearn(model, suspects, recipe, ctx)
        notes["isolated_loss_after"] = float(sample_losses(model, suspects).mean())
        return TrainingReport(model, -losses, isolated, notes)

    def isolation_epochs(self, recipe: Recipe) -> int:
        """Length of the isolation phase under a resolved recipe."""
        return max(1, round(self.turning * recipe.epochs))

    def isolate(self, data: Split, task: Task, ctx: Context) -> tuple[Classifier, Tensor]:
        """The model at the turning epoch and the loss of every sample, float32 [N]; low losses are suspicious."""
        recipe = task.recipe.resolve(len(data))
        recipe = dataclasses.replace(recipe, epochs=self.isolation_epochs(recipe), schedule="constant",
                                     lr=self.isolation_lr * recipe.lr, augment=self.isolation_augment)  # fmt: skip
        model, _ = task.fit(data, ctx, recipe=recipe, objective=self.isolation_objective, label="abl: isolating")
        return model, sample_losses(model, data)

    def isolation_objective(self, model: Classifier, inputs: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """L1 of a batch."""
        losses = F.cross_entropy(model(inputs), labels, reduction="none")
        local = lga_loss if self.local_loss == "lga" else flooding_loss
        return local(losses, self.gamma, self.lga_mode)

    def joint_objective(self, model: Classifier, suspects: Split, recipe: Recipe, ctx: Context) -> Objective:
        """L2 of a batch of D_c, with a batch of D_b drawn beside it."""
        rows = min(len(suspects), max(1, round(self.ascent_batch * recipe.batch_size)))
        table, wanted = model.modality.encode(suspects.inputs).to(ctx.device), suspects.labels.to(ctx.device)
        generator, cap = ctx.generator("suspects", device=ctx.device), self.cap * math.log(model.num_classes)

        def objective(model: Classifier, inputs: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
            drawn = torch.randperm(len(table), generator=generator, device=table.device)[:rows]
            logits = model(torch.cat([inputs, model.modality.prepare(table[drawn])]))
            kept, ascended = logits.split([len(inputs), rows])
            return F.cross_entropy(kept, labels) + capped_ascent(
                F.cross_entropy(ascended, wanted[drawn], reduction="none"), cap
            )

        return objective

    def unlearn(self, model: Classifier, suspects: Split, recipe: Recipe, ctx: Context) -> int:
        """Ascend on D_b until it is forgotten (accuracy below 1/K) or the budget is spent; returns the epochs."""
        cap = self.cap * math.log(model.num_classes)
        batch = min(recipe.batch_size, len(suspects))
        once = dataclasses.replace(recipe, epochs=1, batch_size=batch, lr=self.ascent_lr, schedule="constant",
                                   weight_decay=0.0, augment=False)  # fmt: skip

        def objective(model: Classifier, inputs: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
            return capped_ascent(F.cross_entropy(model(inputs), labels, reduction="none"), cap)

        steps = len(suspects) // batch
        budget = max(round(self.ascent * recipe.epochs), math.ceil(self.ascent_steps / steps))
        for epoch in range(budget):
            predicted = predict(model, suspects.inputs).argmax(1)
            if float((predicted == suspects.labels.cpu()).float().mean()) < 1 / model.num_classes:
                return epoch
            with clipped_gradients(model, self.clip):
                fit(model, suspects, once, objective=objective, context=ctx.child("ascent", epoch),
                    label="abl: unlearning")  # fmt: skip
        return budget
