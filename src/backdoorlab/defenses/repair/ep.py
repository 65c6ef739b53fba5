"""EP: zero the units whose pre-activations have an unusually low entropy on the training set.

Zheng et al., "Pre-activation Distributions Expose Backdoor Neurons", NeurIPS 2022 (its first method; BackdoorBench also
calls it DDE). On a mixture of clean and triggered samples a unit that carries a backdoor has two modes, one of them far
out. Standardised, most of its values lie in a narrow peak, and its entropy is low. For unit k of a layer

    H_k = - sum_b p_b log p_b,      p the histogram of (x - mean_k) / std_k in bins of width 0.1,

over all samples, and the unit is pruned (weight and bias 0) if H_k < mean(H) - u std(H), statistics per
layer. The mixture is the suspicious training set itself, its labels are not used.

Units are the channels of batch norms, whose output goes into the nonlinearity; in networks without batch norms the
outputs of convolutions and of all linear layers but the head.

Choices and deviations
- 2,048 samples without augmentation, the same in every run of a seed; one augmented batch of 256 makes the outcome
  random.
- The bins cover [-5, 5] for every unit, values beyond count in the outermost ones. Bins between the smallest and the
  largest value of a layer depend on a single sample, and entropies over ranges of different length do not compare.
- Two passes over the samples, the first for means and standard deviations: nothing but the histograms is kept.
- Units that never change take no part in the statistics of their layer and are left as they are.
- By default u is not fixed but the smallest value that clean samples tolerate: units are ranked by (mean(H) - H_k) /
  std(H), and as many of them are pruned as lose at most ``tolerance`` of the accuracy on the clean samples. The paper
  needs no clean sample; it fixes u at 3, which ``u`` does here, but a layer of n units cannot exceed (n - 1) / sqrt(n)
  standard deviations, 3.75 for n = 16.
- A unit of a convolutional network gives one value per sample, the peak of its map: most positions of an image show
  background, and a small trigger changes few. ``values=all`` takes all positions, as BackdoorBench does.

Limits: the mixture needs enough triggered samples, 1 % is too few. What makes two modes by itself looks the same: a
unit of a late layer that answers to one class alone, or to an image's flat background. A trigger that covers the image
moves all values a little instead of a few by much.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backdoorlab.core.method import param
from backdoorlab.data.split import Inputs, take
from backdoorlab.defenses.base import RepairDefense, defenses
from backdoorlab.defenses.common.classes import need_samples
from backdoorlab.defenses.common.pruning import (
    Moments,
    cut_ranking,
    deviations_in_layer,
    prunable,
    silence,
    watch_units,
)
from backdoorlab.defenses.view import DefenderView
from backdoorlab.models.anatomy import Channels
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.context import Context

LIMIT, WIDTH = 5.0, 0.1
BINS = round(2 * LIMIT / WIDTH)
LEVELS = torch.arange(20, 0, -1) / 4
"""Values of u that are tried, 5 to 0.25; the step behind the smallest tolerable one is refined."""


def bin_counts(values: Tensor) -> Tensor:
    """Histograms of standardised values: [M, U] -> int64 [U, BINS]; what lies beyond the bins goes into the last."""
    units = values.shape[1]
    bins = ((values + LIMIT) / WIDTH).floor().clamp(0, BINS - 1).long()
    offsets = torch.arange(units, device=values.device) * BINS
    return torch.bincount((bins + offsets).flatten(), minlength=units * BINS).reshape(units, BINS)


def entropies(counts: Tensor) -> Tensor:
    """Entropy in nats of each row of a table of counts: float64 [U]."""
    shares = counts.double() / counts.sum(1, keepdim=True)
    return -torch.xlogy(shares, shares).sum(1)


@defenses.register
@dataclass(frozen=True, kw_only=True)
class EntropyPruning(RepairDefense):
    """Zeroes units whose pre-activations on the training set have a low entropy."""

    name: ClassVar[str] = "ep"
    paper: ClassVar[str] = "Zheng et al., Pre-activation Distributions Expose Backdoor Neurons, NeurIPS 2022"
    year: ClassVar[int] = 2022
    modalities: ClassVar[tuple[str, ...]] = ("image", "text", "audio", "video")
    aliases: ClassVar[tuple[str, ...]] = ("dde",)
    reads: ClassVar[tuple[str, ...]] = ("model", "clean", "suspicious")

    u: float | None = param(
        None,
        "standard deviations below the layer's mean at which a unit is pruned (paper: 3); none = chosen on the clean "
        "samples",
        low=0,
        source="ours",
    )
    samples: int = param(2048, "of the suspicious set that make the histograms", low=2, source="ours")
    values: str = param(
        "peak",
        "per sample and unit: the peak over all positions, or all of them",
        choices=("peak", "all"),
        source="ours",
    )
    tolerance: float = param(
        0.02, "largest relative drop of clean accuracy when choosing", low=0, high=1, source="ours"
    )

    def run(self, view: DefenderView, ctx: Context) -> Classifier:
        """Measure entropies, silence the units with the lowest ones in a copy."""
        suspicious, clean = view.suspicious, view.clean
        need_samples(self.name, "suspicious", suspicious, 2)
        if self.u is None:
            need_samples(self.name, "clean", clean)
        repaired = copy.deepcopy(view.model).eval()
        groups = prunable(repaired)
        rows = torch.randperm(len(suspicious), generator=ctx.generator("ep", "samples"))[: self.samples]
        measured = self.measure(repaired, groups, take(suspicious.inputs, rows))
        deviations = -torch.cat(deviations_in_layer(measured))
        if self.u is None:
            pruned = cut_ranking(repaired, groups, deviations, LEVELS, clean, self.tolerance)
        else:
            pruned = deviations > self.u
        count = silence(groups, pruned)
        ctx.reporter.note(f"ep: pruned {count} of {len(pruned)} units in {len(groups)} layers")
        return repaired

    def measure(self, model: Classifier, groups: Sequence[Channels], inputs: Inputs) -> list[Tensor]:
        """Entropy of every unit on raw samples: one float64 [U] per layer, NaN for units that never change."""
        moments = [Moments() for _ in groups]
        watch_units(model, groups, inputs, lambda number, values: moments[number].add(self.reduce(values)))
        centres = [seen.mean.float() for seen in moments]
        spreads = [seen.variance.sqrt().float() for seen in moments]
        counts: list[Tensor | int] = [0] * len(groups)

        def count(number: int, values: Tensor) -> None:
            scaled = (self.reduce(values) - centres[number]) / spreads[number].clamp_min(1e-12)
            counts[number] = counts[number] + bin_counts(scaled.flatten(0, -2))

        watch_units(model, groups, inputs, count)
        found = []
        for table, centre, spread in zip(counts, centres, spreads, strict=True):
            silent = spread <= 1e-6 * centre.abs().clamp_min(1e-6)
            found.append(entropies(torch.as_tensor(table)).masked_fill(silent, torch.nan))
        return found

    def reduce(self, values: Tensor) -> Tensor:
        """Values [B, P, U] as they are, or the peak of each sample [B, 1, U]."""
        return values.amax(1, keepdim=True) if self.values == "peak" else values
