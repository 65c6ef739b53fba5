"""NC: find the trigger by Neural Cleanse, then unlearn it.

Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks", IEEE S&P 2019, section
VI.C; protocol of Wu et al., "BackdoorBench", NeurIPS 2022.

The triggers of all classes are inverted (:mod:`backdoorlab.defenses.common.inversion`). If some class is suspected, the
model is fine-tuned on the clean samples, of which a share of ``stamped`` carries a suspected class's trigger under its
*true* label. If none is suspected the model is returned as it was, and the reporter is told so: whoever compares
defenses must know that nothing was done.

Choices and deviations
- In every batch the last ``stamped`` share is stamped, each sample with one of the suspected triggers in turn. Batches
  are drawn anew in each epoch, so that every clean sample is met with and without trigger; published code stamps the
  same fifth of the samples for ever.
- Masks and patterns stay floating-point numbers; published code stores them as 8-bit images in between.
- ``tune_epochs`` and ``tune_lr`` are those of the benchmark; the paper unlearns for one epoch on a tenth of its data.
- Models that are trained by AdamW (text, audio, video) are fine-tuned by AdamW at ``lr`` / 10, as for ``ft``.
- Texts are stamped with the suspected prompts, in the space of word embeddings.

Limits: those of the scan. A trigger that covers the whole picture is not found, and nothing is repaired.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorlab.core.method import param
from backdoorlab.defenses.base import RepairDefense, defenses
from backdoorlab.defenses.common.inversion import SoftPrompts, TriggerInversion, verdict
from backdoorlab.defenses.view import DefenderView
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.context import Context
from backdoorlab.training.loop import Objective, fit
from backdoorlab.training.recipes import Recipe


def unlearning(model: Classifier, recovered: dict[str, Tensor], targets: tuple[int, ...], share: float) -> Objective:
    """Cross-entropy on batches whose last ``share`` is stamped with the triggers of suspected classes.

    Args:
        model: that is trained.
        recovered: triggers of all classes, as the inversion returned them.
        targets: suspected classes; stamped samples take their triggers in turn.
        share: of a batch, rounded, at least one sample.
    """
    kept = {name: value.to(model.device) for name, value in recovered.items()}
    classes = torch.tensor(targets, device=model.device)
    prompts = None
    if "prompt" in kept:
        prompts = SoftPrompts(model, kept["prompt"].shape[1], torch.Generator().manual_seed(0))

    def objective(model: Classifier, inputs: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        count = min(len(labels), max(1, round(share * len(labels))))
        plain, chosen = inputs[: len(labels) - count], inputs[len(labels) - count :]
        turn = classes[torch.arange(count, device=labels.device) % len(classes)]
        if prompts is None:
            stamped = torch.lerp(chosen, kept["pattern"][turn], kept["mask"][turn])
            return F.cross_entropy(model(torch.cat([plain, stamped])), labels)
        joined, ids = prompts.insert(chosen, kept["prompt"][turn].unsqueeze(0))
        embedded = torch.cat([prompts.embed(plain), joined[0]])
        return F.cross_entropy(prompts.forward_embedded(embedded, torch.cat([plain, ids])), labels)

    return objective


@defenses.register
@dataclass(frozen=True, kw_only=True)
class NeuralCleanseRepair(TriggerInversion, RepairDefense):
    """Unlearns the triggers that Neural Cleanse finds."""

    name: ClassVar[str] = "nc"
    paper: ClassVar[str] = "Wang et al., Neural Cleanse, IEEE S&P 2019"
    year: ClassVar[int] = 2019
    modalities: ClassVar[tuple[str, ...]] = ("image", "text", "audio", "video")

    anomaly_threshold: float = param(2.0, "anomaly index above which a class is suspected", low=0, source="paper")
    stamped: float = param(0.2, "share of a batch that carries a trigger", above=0, high=1, source="paper")
    tune_epochs: int = param(100, "passes over the clean samples", low=1, source="BackdoorBench")
    tune_lr: float = param(0.01, "peak learning rate of SGD (AdamW: a tenth)", above=0, source="BackdoorBench")
    tune_batch: int = param(256, "samples per step", low=1, source="BackdoorBench")
    weight_decay: float = param(5e-4, "L2 penalty", low=0, source="BackdoorBench")

    def run(self, view: DefenderView, ctx: Context) -> Classifier:
        """Scan, then unlearn in a copy what was found."""
        costs, recovered = self.invert(view.model, view.clean, ctx)
        score, targets = verdict(costs, self.anomaly_threshold)
        repaired = copy.deepcopy(view.model).eval()
        if not targets:
            ctx.warn(f"nc: no class is suspected (score {score:.3g}), so the model is returned as it was")
            return repaired
        ctx.reporter.note(f"nc: unlearning the trigger of class {', '.join(map(str, targets))} (score {score:.3g})")
        adam = repaired.modality.name != "image"
        recipe = Recipe(
            epochs=self.tune_epochs,
            batch_size=self.tune_batch,
            optimizer="adamw" if adam else "sgd",
            lr=self.tune_lr / 10 if adam else self.tune_lr,
            weight_decay=self.weight_decay,
        )
        objective = unlearning(repaired, recovered, targets, self.stamped)
        fit(repaired, view.clean, recipe, objective=objective, context=ctx, label="nc: unlearning")
        return repaired
