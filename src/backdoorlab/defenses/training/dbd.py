"""DBD: learn features without labels, then a head, then keep only the labels that the model believes.

Huang, Li, Wu, Qin, Ren, "Backdoor Defense via Decoupling the Training Process", ICLR 2022 (arXiv 2202.03423). Poisoned
samples lie close to the target class because they carry its label; without labels they stay near what they show.

1. The backbone learns from all samples without labels (SimCLR, NT-Xent).
2. On fixed features a linear head is trained with the symmetric cross-entropy SCE = 0.1 CE + RCE, which gives in to
   wrong labels less than CE does.
3. The whole network is trained by MixMatch. Before every epoch the share ``credible`` of samples with the lowest SCE
   keeps its labels, the others are learned from without theirs.

Choices and deviations
- Lengths are shares of the recipe: ``contrastive`` and ``semi`` are 1, as in BackdoorBench (100 of 100 epochs each; the
  paper has 1,000 and 190). An epoch of MixMatch draws as many labelled samples as the set has (CIFAR-10: 782 steps; the
  paper: 1,024 for any set).
- The head is trained on stored features of the samples as they are, a number of steps rather than of epochs: it costs
  next to nothing, and a share of a short recipe would be a handful of steps.
- In each class at least a tenth is credible, so that none vanishes on small or unbalanced sets.
- The model at the end is the result; published code keeps that with the best test accuracy.
- Scores are the SCE of every sample in the end. Half of the samples lose their labels, which accuses none of them:
  nothing is isolated.

Cost: with the defaults as many samples pass the network, forward and backward, as in 2 + 3 trainings of the recipe, and
1 more forward: some 6 trainings.

Limits: where features learned without labels see the trigger (blended images), poisoned samples lie together, a linear
head fits their label, and they are credible. On few samples a short training without labels gives poor features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backdoorlab.core.method import param
from backdoorlab.data.split import Split
from backdoorlab.defenses.base import TrainingDefense, TrainingReport, defenses
from backdoorlab.defenses.common.classes import need_samples
from backdoorlab.defenses.common.contrastive import fit_head, learn_features
from backdoorlab.defenses.common.semi_supervised import MixMatch
from backdoorlab.defenses.common.trust import symmetric_cross_entropy, trusted_half
from backdoorlab.defenses.view import DefenderView
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.context import Context
from backdoorlab.training.evaluate import predict


def believed(model: Classifier, data: Split) -> Tensor:
    """SCE of each sample in evaluation mode: float32 [N] on the CPU, low = the model believes the label."""
    return symmetric_cross_entropy(predict(model, data.inputs), data.labels.cpu())


@defenses.register
@dataclass(frozen=True, kw_only=True)
class DecouplingBackdoorDefense(MixMatch, TrainingDefense):
    """Self-supervised features, a robust head, semi-supervised fine-tuning."""

    name: ClassVar[str] = "dbd"
    paper: ClassVar[str] = "Huang et al., Backdoor Defense via Decoupling the Training Process, ICLR 2022"
    year: ClassVar[int] = 2022
    modalities: ClassVar[tuple[str, ...]] = ("image",)

    contrastive: float = param(
        1.0, "length of the training without labels / recipe", above=0, high=20, source="BackdoorBench (paper: 10)"
    )
    contrastive_batch: int = param(
        512, "samples per step without labels; fewer on small sets", low=2, source="BackdoorBench"
    )
    contrastive_lr: float = param(0.4, "peak learning rate without labels", above=0, source="BackdoorBench")
    temperature: float = param(0.5, "of NT-Xent", above=0, source="BackdoorBench")
    weight_decay: float = param(1e-4, "L2 penalty without labels", low=0, source="BackdoorBench")
    head_steps: int = param(
        1000, "steps of 128 samples by which the head is trained", low=1, source="ours (BackdoorBench: 10 epochs)"
    )
    head_lr: float = param(0.002, "learning rate of the head's Adam", above=0, source="BackdoorBench")
    credible: float = param(0.5, "share of the samples that keep their labels", above=0, high=0.95, source="paper")

    def run(self, view: DefenderView, ctx: Context) -> TrainingReport:
        """Learn features, a head, then the whole."""
        data, blueprint = view.suspicious, view.blueprint
        need_samples(self.name, "suspicious", data, 2)
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
            precision=recipe.precision,
            label="dbd: learning features",
        )
        self.learn_head(model, data, ctx)
        first = believed(model, data)

        def choose(model: Classifier, epoch: int) -> Tensor:
            return trusted_half(believed(model, data), data.labels.cpu(), self.credible)

        self.mixmatch(model, data, choose, recipe, ctx.child("semi"), "dbd: semi-supervised training")
        losses = believed(model, data)
        notes = {"head_loss": float(first.mean()), "final_loss": float(losses.mean())}
        return TrainingReport(model, losses, notes=notes)

    def learn_head(self, model: Classifier, data: Split, ctx: Context) -> None:
        """Train the head on fixed features, by SCE."""
        labels, size = data.labels.to(ctx.device), min(128, len(data))
        fit_head(
            model,
            data,
            lambda generator: torch.randint(len(data), (size,), generator=generator, device=generator.device),
            lambda logits, rows: symmetric_cross_entropy(logits, labels[rows]).mean(),
            ctx.child("head"),
            steps=self.head_steps,
            lr=self.head_lr,
            label="dbd: training the head",
        )
