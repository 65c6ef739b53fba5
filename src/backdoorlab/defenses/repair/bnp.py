"""BNP: zero the channels whose batch statistics differ most between training and clean data.

Zheng et al., "Pre-activation Distributions Expose Backdoor Neurons", NeurIPS 2022 (its second method, with a few clean
samples; BackdoorBench calls it MBNS). The running statistics of a batch norm were estimated while the model was trained
on poisoned data, so they contain the pre-activations of triggered samples. For channel k let (m1, v1) be mean and
variance of what the norm receives from clean samples, in evaluation mode, and (m2, v2) its running statistics. With
Gaussians in their place,

    KL_k = 1/2 [ log(v2 / v1) + (v1 + (m1 - m2)^2) / v2 - 1 ],

and the channel is pruned (gain and bias 0) if KL_k > mean(KL) + u std(KL), statistics per layer.

Choices and deviations
- All clean samples make (m1, v1), in one pass, and no other sample does. (A second, poisoned pass that overwrites the
  clean statistics is a known defect of public code and leaves the method without effect, as is a missing 1/2.)
- By default u is not fixed but the smallest value that clean samples tolerate: channels are ranked by their deviation
  from their layer, (KL_k - mean) / std, and as many of them are pruned as lose at most ``tolerance`` of the accuracy
  on the clean samples. Statistics of a layer of n channels cannot exceed (n - 1) / sqrt(n) standard deviations, so a
  fixed u of 3 can hardly prune anything in layers of 16. ``u`` fixes it (paper: 3).
- The labels of the clean samples decide over the cut only; the statistics do not depend on them, so nothing is held
  out.
- A channel that clean samples leave constant has v1 = 0 and an infinite divergence. Variances have the norm's own eps
  added, with which the norm divides.

Limits: the statistics must still be those of the poisoned training. A model that was fine-tuned on clean data or whose
statistics were re-estimated shows nothing, nor does a poison rate so low that triggered samples hardly count. Classes
that are missing from the clean samples shift the statistics too. Where the poison is a large part of the target class,
class frequencies differ as well. Without batch norms that keep running statistics it does not apply.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from backdoorlab.core.errors import NotApplicable
from backdoorlab.core.method import param
from backdoorlab.data.split import Inputs
from backdoorlab.defenses.base import RepairDefense, defenses
from backdoorlab.defenses.common.classes import need_samples
from backdoorlab.defenses.common.pruning import Moments, cut_ranking, deviations_in_layer, silence, watch_units
from backdoorlab.defenses.view import DefenderView
from backdoorlab.models.anatomy import Channels, channels
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.context import Context

LEVELS = torch.arange(20, 0, -1) / 4
"""Values of u that are tried, 5 to 0.25; the step behind the smallest tolerable one is refined."""


def divergence(mean: Tensor, variance: Tensor, stored_mean: Tensor, stored_variance: Tensor) -> Tensor:
    """KL divergence of N(mean, variance) from N(stored_mean, stored_variance), element by element."""
    apart = (variance + (mean - stored_mean).square()) / stored_variance
    return 0.5 * ((stored_variance / variance).log() + apart - 1)


@defenses.register
@dataclass(frozen=True, kw_only=True)
class BatchNormPruning(RepairDefense):
    """Zeroes channels whose batch statistics on clean data differ from the stored ones."""

    name: ClassVar[str] = "bnp"
    paper: ClassVar[str] = "Zheng et al., Pre-activation Distributions Expose Backdoor Neurons, NeurIPS 2022"
    year: ClassVar[int] = 2022
    modalities: ClassVar[tuple[str, ...]] = ("image", "text", "audio", "video")
    aliases: ClassVar[tuple[str, ...]] = ("mbns",)
    needs_norm: ClassVar[bool] = True

    u: float | None = param(
        None,
        "standard deviations above the layer's mean at which a channel is pruned (paper: 3); none = chosen on the "
        "clean samples",
        low=0,
        source="ours",
    )
    tolerance: float = param(
        0.05, "largest relative drop of clean accuracy when choosing", low=0, high=1, source="ours"
    )

    def run(self, view: DefenderView, ctx: Context) -> Classifier:
        """Compare statistics, silence the outlying channels in a copy."""
        clean = view.clean
        need_samples(self.name, "clean", clean, 2)
        repaired = copy.deepcopy(view.model).eval()
        groups = [g for g in channels(repaired, kinds=("batchnorm",)) if g.module.running_var is not None]
        if not groups:
            raise NotApplicable(f"bnp: {repaired.arch} has no batch norm that keeps statistics of its training")
        deviations = torch.cat(deviations_in_layer(divergences(repaired, groups, clean.inputs)))
        if self.u is None:
            pruned = cut_ranking(repaired, groups, deviations, LEVELS, clean, self.tolerance)
        else:
            pruned = deviations > self.u
        count = silence(groups, pruned)
        ctx.reporter.note(f"bnp: pruned {count} of {len(pruned)} channels in {len(groups)} layers")
        return repaired


def divergences(model: Classifier, groups: list[Channels], inputs: Inputs) -> list[Tensor]:
    """Divergence of every channel of some batch norms, from clean raw samples: one float64 [U] per layer."""
    moments = [Moments() for _ in groups]
    watch_units(model, groups, inputs, lambda number, values: moments[number].add(values), received=True)
    found = []
    for group, seen in zip(groups, moments, strict=True):
        norm = group.module
        assert isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None
        stored = norm.running_mean.double(), norm.running_var.double() + norm.eps
        found.append(divergence(seen.mean, seen.variance + norm.eps, *stored))
    return found
