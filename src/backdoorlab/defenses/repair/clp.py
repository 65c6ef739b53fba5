"""CLP: zero the channels whose Lipschitz bound is an outlier in its layer; no data at all.

Zheng et al., "Data-free Backdoor Removal Based on Channel Lipschitzness", ECCV 2022. A backdoor must turn a small
pattern into a large change of the features, so the channels that carry it are unusually sensitive. In evaluation mode
a convolution W with its batch norm (gain g, running variance v) is one linear map; channel k of it is bounded by

    L_k = sigma_max( reshape(W_k, [C_in, kernel]) ) |g_k| / sqrt(v_k + eps)

and is pruned (g_k = b_k = 0) when L_k > mean(L) + u std(L), statistics per layer.

Which norm belongs to which convolution is traced by data flow (:func:`~backdoorlab.models.anatomy.conv_norm_pairs`),
not taken from the order in which modules are declared: in pre-activation blocks conv1 -> bn2 is a pair, and the norm
after a sum has none. The standard deviation is the unbiased one (as in the paper's code).

Deviation: with ``transformer=True`` models without such pairs are pruned by the analogue for feed-forward neurons,
linear layers that follow a layer norm (gain g) and feed an activation: L_j = || W_j * g ||_2. The layer norm's own
division by the token's standard deviation depends on the input and is left out, so this ranks neurons but bounds
nothing; expect less.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from backdoorlab.core.errors import NotApplicable
from backdoorlab.core.method import param
from backdoorlab.defenses.base import RepairDefense, defenses
from backdoorlab.defenses.view import DefenderView
from backdoorlab.models.anatomy import Call, channels, conv_norm_pairs, trace
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.context import Context


def channel_lipschitz(conv: _ConvNd, norm: _BatchNorm) -> Tensor:
    """Upper bound of the Lipschitz constant of each channel of ``norm`` after ``conv``: float32 [C_out]."""
    weight = conv.weight.detach().float()
    if isinstance(conv, _ConvTransposeNd):
        weight = weight.transpose(0, 1)
    largest = torch.linalg.matrix_norm(weight.flatten(2), ord=2)
    variance = cast(Tensor, norm.running_var).float()
    gain = torch.ones_like(variance) if norm.weight is None else norm.weight.detach().float().abs()
    return largest * gain / (variance + norm.eps).sqrt()


def outliers(bounds: Tensor, u: float) -> Tensor:
    """Bool [C]: bounds more than ``u`` standard deviations above the mean of their layer."""
    return bounds > bounds.mean() + u * bounds.std()


def neuron_bounds(calls: list[Call]) -> list[tuple[nn.Linear, Tensor]]:
    """Feed-forward layers of transformers with the norms of their neurons, each weighted by the gain of the layer norm.

    Args:
        calls: of one forward pass. A layer counts if it receives exactly the output of a layer norm and feeds an
            activation (a module without parameters), as the first half of a feed-forward block does.
    """
    norms = {id(c.output): c for c in calls if isinstance(c.module, nn.LayerNorm)}
    activated = [
        c for c in calls if not isinstance(c.module, (nn.Dropout, nn.Identity)) and not list(c.module.parameters())
    ]
    found: dict[int, tuple[nn.Linear, Tensor]] = {}
    for call in calls:
        norm = norms.get(id(call.input))
        if not isinstance(call.module, nn.Linear) or norm is None or not norm.feeds(call):
            continue
        if any(call.feeds(later) for later in activated):
            gain = cast(nn.LayerNorm, norm.module).weight
            weight = call.module.weight.detach().float()
            weight = weight if gain is None else weight * gain.detach().float()
            found[id(call.module)] = (call.module, torch.linalg.vector_norm(weight, dim=1))
    return list(found.values())


@defenses.register
@dataclass(frozen=True, kw_only=True)
class ChannelLipschitzPruning(RepairDefense):
    """Zeroes channels with outlying Lipschitz bounds."""

    name: ClassVar[str] = "clp"
    paper: ClassVar[str] = "Zheng et al., Channel Lipschitzness-based Pruning, ECCV 2022, arXiv 2208.03111"
    year: ClassVar[int] = 2022
    modalities: ClassVar[tuple[str, ...]] = ("image", "text", "audio", "video")
    reads: ClassVar[tuple[str, ...]] = ("model",)
    needs_clean_fraction: ClassVar[float] = 0.0

    u: float = param(
        3.0, "standard deviations above the layer's mean at which a channel is pruned", low=0, source="paper"
    )
    transformer: bool = param(False, "without conv-norm pairs: prune feed-forward neurons of transformers instead")

    def run(self, view: DefenderView, ctx: Context) -> Classifier:
        """Silence the outlying channels in a copy."""
        repaired = copy.deepcopy(view.model).eval()
        pairs = conv_norm_pairs(repaired)
        bounds: list[tuple[nn.Module, Tensor]]
        bounds = [(norm, channel_lipschitz(conv, norm)) for conv, norm in pairs if norm.running_var is not None]
        if not bounds and self.transformer:
            bounds = list(neuron_bounds(trace(repaired)))
        if not bounds:
            what = (
                "neither a convolution followed by batch norm nor" if self.transformer else "no convolution followed by"
            )
            rest = " a feed-forward layer behind a layer norm" if self.transformer else " batch norm"
            hint = "" if self.transformer else "; transformers can be pruned with transformer=true"
            raise NotApplicable(f"clp: {repaired.arch} has {what}{rest}{hint}")
        units = {id(group.module): group for group in channels(repaired)}
        total = 0
        for layer, bound in bounds:
            pruned = outliers(bound, self.u)
            if id(layer) not in units:
                continue  # a norm without gain has nothing to zero
            units[id(layer)].zero(pruned)
            total += int(pruned.sum())
        ctx.reporter.note(f"clp: pruned {total} of {sum(len(b) for _, b in bounds)} channels in {len(bounds)} layers")
        return repaired
