"""TABOR: Neural Cleanse's inversion under regularisers that rule out triggers which are no triggers.

Guo, Wang, Xing, Du, Song, "TABOR: A Highly Accurate Approach to Inspecting and Restoring Trojan Backdoors in AI
Systems", arXiv 1908.01763 (2019; ICDM 2020).

Small adversarial patterns, scattered or overlaid on the object itself, are mistaken for triggers by Neural Cleanse. For
each class k, mask m and pattern p, these terms are added to its loss (E(v) = |v|_1 + |v|_2^2, TV the sum of squared
differences of neighbours):

    R1  size         E(m) and E((1 - m) p): a small mask, and nothing outside of it
    R2  smoothness   TV(m) and TV((1 - m) p): no scattered pixels
    R3  blocking     CE(f((1 - m) x), y): with the trigger's place blanked the image is what it was
    R4  overlaying   CE(f(m p), k): the trigger alone, on black, is enough

All classes are optimised at once, as in :mod:`backdoorlab.defenses.common.inversion`; the schedule of Neural Cleanse's
own |m|_1 stays in force.

Verdict. The paper compares the *quality* of the restored triggers instead of their size alone. Here

    q_k = log(|m|_1 / d) - log a_k - log b_k - log o_k

with d entries of the mask, a_k the share of clean samples that the trigger brings to k, b_k the share of clean samples
that keep their predicted class when the place is blanked, o_k the probability of k for the trigger alone. Classes
whose q is far below the median (anomaly index above ``anomaly_threshold``) and below it by at least log(``margin``)
are suspected. ``metric="size"`` compares |m|_1 as Neural Cleanse does.

Choices and deviations
- The weights of the terms are those of TrojanZoo where they were found to do anything; the paper anneals them. Sums
  are over pixels, so they suit pictures of some hundred to thousand pixels.
- The roughness of the mask, which the paper's metric counts too, is left to R2.
- ``margin`` guards against the median of few numbers: among ten similar values one is often two deviations off.
  ``margin=1`` is the plain rule.
- Sounds: one mask over time, and neighbours in time. No texts, whose prompts have neither mask nor neighbours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorlab.core.errors import NotApplicable
from backdoorlab.core.method import param
from backdoorlab.data.split import Split
from backdoorlab.defenses.base import ModelDefense, ScanReport, defenses
from backdoorlab.defenses.common.inversion import (
    FEW_CLASSES,
    Candidates,
    MaskedPatterns,
    TriggerInversion,
    anomaly_index,
    verdict,
)
from backdoorlab.defenses.view import DefenderView
from backdoorlab.models.anatomy import frozen
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.context import Context, autocast


def elastic(values: Tensor) -> Tensor:
    """|v|_1 + |v|_2^2 of each row: float [A, ...] -> [A]."""
    flat = values.flatten(1)
    return flat.abs().sum(1) + flat.square().sum(1)


def total_variation(values: Tensor) -> Tensor:
    """Sum of squared differences of neighbours: pictures [A, ..., H, W] or sounds [A, L] -> [A]."""
    total = values.new_zeros(len(values))
    for axis in range(max(1, values.dim() - 2), values.dim()):
        total = total + values.diff(dim=axis).square().flatten(1).sum(1)
    return total


def qualities(size: Tensor, attack: Tensor, blocked: Tensor, alone: Tensor, largest: float) -> Tensor:
    """The q_k of the module's docstring, smaller = more of a trigger: float64 [K].

    Args:
        size: |m|_1, float [K].
        attack: share of samples that reach the class, float [K].
        blocked: share of samples that keep their class when the place is blanked, float [K].
        alone: probability of the class for the trigger alone, float [K].
        largest: entries of a mask.
    """
    tiny = 1e-3
    parts = [part.double().clamp_min(tiny).log() for part in (size / largest, attack, blocked, alone)]
    return parts[0] - parts[1] - parts[2] - parts[3]


def quality_verdict(quality: Tensor, threshold: float, margin: float) -> tuple[float, tuple[int, ...]]:
    """Score of the model and its suspected targets, most suspicious first, from q [K].

    Below five classes no deviation from the median means anything; the smallest q then counts if it is at least
    log 2 below the next (and log ``margin`` below the median).
    """
    quality = quality.double()
    middle = quality.quantile(0.5)
    if len(quality) < FEW_CLASSES:
        score, found = verdict((quality - quality.min()).exp())
        return score, found if float(middle - quality.min()) >= math.log(margin) else ()
    deviant = quality <= middle - max(math.log(margin), 1e-9)
    index = torch.where(quality < middle, anomaly_index(quality), 0.0)
    order = index.argsort(descending=True, stable=True)
    return float(index.max()), tuple(int(k) for k in order if index[k] > threshold and deviant[k])


@defenses.register
@dataclass(frozen=True, kw_only=True)
class Tabor(TriggerInversion, ModelDefense):
    """Compares the quality of restored triggers of all classes."""

    name: ClassVar[str] = "tabor"
    paper: ClassVar[str] = "Guo et al., TABOR, arXiv 1908.01763 (2019)"
    year: ClassVar[int] = 2019
    modalities: ClassVar[tuple[str, ...]] = ("image", "audio", "video")

    mask_size: float = param(1e-6, "R1: weight of E(m)", low=0, source="TrojanZoo")
    outside_size: float = param(1e-5, "R1: weight of E((1 - m) p)", low=0, source="TrojanZoo")
    mask_rough: float = param(1e-7, "R2: weight of TV(m)", low=0, source="TrojanZoo")
    outside_rough: float = param(1e-8, "R2: weight of TV((1 - m) p)", low=0, source="TrojanZoo")
    blocking: float = param(0.0, "R3: weight of the loss of blanked samples", low=0, source="TrojanZoo")
    overlaying: float = param(1e-2, "R4: weight of the loss of the trigger alone", low=0, source="TrojanZoo")
    metric: str = param("quality", "what is compared between classes", choices=("quality", "size"))
    anomaly_threshold: float = param(2.0, "anomaly index above which a class is suspected", low=0, source="paper")
    margin: float = param(2.0, "factor by which a suspect must beat the median class; 1 = none", low=1, source="ours")

    def penalty(self, candidates: Candidates, inputs: Tensor, labels: Tensor, classes: Tensor) -> Tensor | None:
        """R1 to R4 of each class: [A]."""
        if not isinstance(candidates, MaskedPatterns):
            raise NotApplicable("tabor needs masks over pictures, sounds or videos; texts have none")
        mask, pattern, model = candidates.mask(classes), candidates.pattern(classes), candidates.model
        outside = (1 - mask) * pattern
        total = self.mask_size * elastic(mask) + self.outside_size * elastic(outside)
        total = total + self.mask_rough * total_variation(mask) + self.outside_rough * total_variation(outside)
        if self.blocking:
            blanked = inputs.unsqueeze(0) * (1 - mask).unsqueeze(1)
            with autocast(inputs.device):
                logits = model(blanked.flatten(0, 1)).float()
            loss = F.cross_entropy(logits, labels.repeat(len(classes)), reduction="none")
            total = total + self.blocking * loss.unflatten(0, (len(classes), len(inputs))).mean(1)
        if self.overlaying:
            with autocast(inputs.device):
                logits = model((mask * pattern).expand(-1, *inputs.shape[1:])).float()
            total = total + self.overlaying * F.cross_entropy(logits, classes, reduction="none")
        return total

    def run(self, view: DefenderView, ctx: Context) -> ScanReport:
        """Restore a trigger for every class and compare them.

        Raises:
            NotApplicable: for texts.
        """
        model, clean = view.model, view.clean
        if not model.modality.continuous:
            raise NotApplicable("tabor needs masks over pictures, sounds or videos; texts have none")
        costs, recovered = self.invert(model, clean, ctx)
        if self.metric == "size":
            score, targets = quality_verdict(costs.clamp_min(1e-3).log(), self.anomaly_threshold, self.margin)
            return ScanReport(score, bool(targets), targets, tuple(costs.tolist()), recovered)
        largest = float(recovered["mask"][0].numel())
        quality = qualities(costs, *self.inspect(model, clean, recovered), largest)
        score, targets = quality_verdict(quality, self.anomaly_threshold, self.margin)
        return ScanReport(score, bool(targets), targets, tuple(quality.tolist()), recovered)

    def inspect(self, model: Classifier, clean: Split, recovered: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(a, b, o) of restored triggers, float32 [K] each, on all clean samples."""
        mask, pattern = recovered["mask"].to(model.device), recovered["pattern"].to(model.device)
        count = len(mask)
        attack, blocked = torch.zeros(2, count)
        with frozen(model), torch.no_grad():
            table = model.modality.encode(clean.inputs).to(model.device)
            every = torch.arange(count, device=model.device)
            for rows in table.split(max(1, self.max_rows // count)):
                x = model.modality.prepare(rows)
                given = model(x).argmax(1)
                for keep, wanted, found in (
                    (pattern.unsqueeze(1), every[:, None], attack),
                    (torch.zeros_like(pattern).unsqueeze(1), given, blocked),
                ):
                    changed = torch.lerp(x.unsqueeze(0), keep, mask.unsqueeze(1))
                    predicted = model(changed.flatten(0, 1)).argmax(1).unflatten(0, (count, len(x)))
                    found += (predicted == wanted).float().sum(1).cpu() / len(table)
            alone = model((mask * pattern).expand(-1, *x.shape[1:])).float().softmax(1)[every, every].cpu()
        return attack, blocked, alone
