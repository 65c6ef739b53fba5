"""l-infinity pruning: zero the channels of the last maps whose peaks a reverse-engineered trigger raises most.

Cheng et al., "Defending against Backdoor Attack on Deep Neural Networks", arXiv 2002.12162. A backdoored network looks
at the trigger, a small part of the image, so what a trigger changes in a channel j of the last convolutional layer is
the largest activation of its map A_j(x) rather than the sum. With N_j(x) = || A_j(x) ||_inf over positions, after the
ReLU,

1. a trigger (mask m, pattern p) is reverse-engineered from clean samples for every class as in Neural Cleanse
   (:mod:`~backdoorlab.defenses.common.inversion`); the class with the smallest one is the suspected target;
2. channels are ranked by the bias b_j = E_x[ N_j((1 - m) x + m p) - N_j(x) ] over clean samples of other classes,
   with ``normalised`` divided by the standard deviation of N_j(x);
3. the channels of the largest bias are silenced.

The text of the paper was not at hand: beyond its abstract (norms of activations, reverse-engineered triggers, pruning
of the last convolutional layer) the steps are a reconstruction.

Choices and deviations
- The pruned fraction is chosen from clean samples alone. In steps of a hundredth up to ``largest``, it is the largest
  one that costs at most ``tolerance`` of the accuracy on clean samples (an absolute difference) and leaves the
  *recovered* trigger a success rate of at most ``works``; if there is none, the largest within the tolerance, with a
  warning. ``fraction`` fixes it. A recovered trigger is not the real one, and a network in which the first is dead may
  still obey the second.
- ``statistic`` takes l1 or l2 norms over positions instead of the largest value, for comparison. Triggers that cover
  the image may be seen better by these.
- ``trigger=none`` needs no inversion: channels are ranked by E[N_inf] / E[N_1] on clean samples, peaky ones first.
- A channel is silenced where all of its later uses are taken away: by zeros in the last linear layer if that keeps
  channels apart (behind a pooling or flattening), otherwise by zeros in the last convolution and its batch norm. For
  transformers, "maps" are the hidden units of the last feed-forward layer over the tokens.
- Triggers are recovered from, and channels ranked on, a part of the clean samples; all of them decide over the
  fraction, as the held-out ones alone may be a few dozen.

Limits: where the last layer sees no positions (one activation per channel) all norms are the same. Costs are those of
Neural Cleanse. A benign model is pruned too, within the tolerance.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backdoorlab.core.errors import InputError
from backdoorlab.core.method import param
from backdoorlab.data.split import Split
from backdoorlab.defenses.base import RepairDefense, defenses
from backdoorlab.defenses.common.inversion import TriggerInversion
from backdoorlab.defenses.common.maps import LastMaps, last_maps
from backdoorlab.defenses.common.pruning import hold_out
from backdoorlab.defenses.view import DefenderView
from backdoorlab.models.anatomy import evaluating
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.context import Context, autocast

ORDERS = {"linf": torch.inf, "l2": 2.0, "l1": 1.0}


def norms(maps: Tensor, statistic: str) -> Tensor:
    """Norm over positions of every map: [B, P, C] -> [B, C]; ``statistic`` is a key of :data:`ORDERS`."""
    return torch.linalg.vector_norm(maps, ORDERS[statistic], dim=1)


def bias(plain: Tensor, stamped: Tensor, normalised: bool) -> Tensor:
    """What a trigger adds to the norms of the same samples, on average: [N, C] and [N, C] -> [C]."""
    raised = (stamped - plain).mean(0)
    return raised / (plain.std(0) + 1e-6) if normalised else raised


def choose_fraction(accuracy: Tensor, success: Tensor, tolerance: float, works: float) -> tuple[int, bool]:
    """Which step of a sweep to take, and whether the trigger is dead there.

    Args:
        accuracy: float [S] on clean samples; the first entry is that of the whole network.
        success: float [S], rates of the recovered trigger.
        tolerance: largest drop of accuracy, absolute.
        works: largest success rate of a dead trigger.
    """
    tolerable = accuracy >= accuracy[0] - tolerance - 1e-9
    dead = tolerable & (success <= works)
    chosen = dead if bool(dead.any()) else tolerable
    return int(chosen.nonzero().max()), bool(dead.any())


@defenses.register
@dataclass(frozen=True, kw_only=True)
class PeakPruning(TriggerInversion, RepairDefense):
    """Zeroes channels of the last maps whose peaks a reverse-engineered trigger raises."""

    name: ClassVar[str] = "linf"
    paper: ClassVar[str] = "Cheng et al., Defending against Backdoor Attack on Deep Neural Networks, arXiv 2002.12162"
    year: ClassVar[int] = 2020
    modalities: ClassVar[tuple[str, ...]] = ("image", "audio", "video")

    statistic: str = param("linf", "norm of a map over positions", choices=tuple(ORDERS), source="paper")
    trigger: str = param(
        "synthetic",
        "rank by a reverse-engineered trigger, or without any",
        choices=("synthetic", "none"),
        source="paper",
    )
    target: int | None = param(
        None, "class that the backdoor leads to; none = the one with the smallest trigger", low=0, source="ours"
    )
    normalised: bool = param(False, "divide a channel's bias by its standard deviation", source="ours")
    fraction: float | None = param(
        None, "share of the channels that is pruned; none = chosen on the clean samples", low=0, high=1, source="ours"
    )
    largest: float = param(0.6, "largest share that is tried when choosing", above=0, high=1, source="ours")
    tolerance: float = param(
        0.05, "largest drop of clean accuracy when choosing, in points / 100", low=0, high=1, source="ours"
    )
    works: float = param(
        0.1, "success rate up to which the recovered trigger counts as dead", low=0, high=1, source="ours"
    )
    holdout: float = param(
        0.2, "share of the clean samples that make no trigger and no ranking", above=0, high=0.9, source="ours"
    )
    epochs: int = param(40, "of the inversion at most", low=1, source="ours")

    def run(self, view: DefenderView, ctx: Context) -> Classifier:
        """Recover a trigger, rank channels, silence those that it raises most in a copy."""
        clean = view.clean
        learn, _ = hold_out(clean, self.holdout, self.name, ctx)
        repaired = copy.deepcopy(view.model).eval()
        if self.target is not None and self.target >= repaired.num_classes:
            raise InputError(
                f"linf: target must be a class from 0 to {repaired.num_classes - 1} of this model, got {self.target}"
            )
        maps = last_maps(repaired)
        stamp = self.recover(repaired, learn, ctx) if self.trigger == "synthetic" else None
        ranking = self.rank(repaired, maps, learn, stamp).argsort(descending=True, stable=True)
        if self.fraction is not None:
            count = round(self.fraction * maps.count)
        else:
            count = self.choose(repaired, maps, ranking, clean, stamp, ctx)
        pruned = torch.zeros(maps.count, dtype=torch.bool, device=ranking.device)
        pruned[ranking[:count]] = True
        maps.silence(pruned)
        ctx.reporter.note(f"linf: pruned {count} of {maps.count} channels of {maps.name}")
        return repaired

    def recover(self, model: Classifier, clean: Split, ctx: Context) -> Stamp:
        """The trigger of the suspected target."""
        costs, found = self.invert(model, clean, ctx)
        target = int(costs.argmin()) if self.target is None else self.target
        return Stamp(found["mask"][target].to(model.device), found["pattern"][target].to(model.device), target)

    @torch.no_grad()
    def rank(self, model: Classifier, maps: LastMaps, clean: Split, stamp: Stamp | None) -> Tensor:
        """Suspicion of every channel: float32 [C] on the model's device."""
        data = (
            clean
            if stamp is None or bool((clean.labels == stamp.target).all())
            else clean[clean.labels != stamp.target]
        )
        table = model.modality.encode(data.inputs).to(model.device)
        plain, other = [], []
        with evaluating(model):
            for part in table.split(500):
                inputs = model.modality.prepare(part)
                seen = maps.of(model, inputs)
                if stamp is None:
                    plain.append(norms(seen, "linf"))
                    other.append(norms(seen, "l1"))
                else:
                    plain.append(norms(seen, self.statistic))
                    other.append(norms(maps.of(model, stamp(inputs)), self.statistic))
        first, second = torch.cat(plain), torch.cat(other)
        if stamp is None:
            return first.mean(0) / second.mean(0).clamp_min(1e-12)
        return bias(first, second, self.normalised)

    def choose(
        self, model: Classifier, maps: LastMaps, ranking: Tensor, clean: Split, stamp: Stamp | None, ctx: Context
    ) -> int:
        """Number of channels to silence, by clean samples and the recovered trigger."""
        steps = torch.linspace(0, self.largest, round(100 * self.largest) + 1)
        counts = (steps * maps.count).round().long().unique()
        accuracy, success = self.sweep(model, maps, ranking, counts, clean, stamp)
        chosen, dead = choose_fraction(accuracy, success, self.tolerance, self.works)
        if not dead:
            ctx.warn(
                f"linf: no fraction up to {self.largest:g} that costs at most {self.tolerance:g} of accuracy stops the "
                f"recovered trigger; {success[chosen]:.2f} of the clean samples still follow it"
            )
        return int(counts[chosen])

    @torch.no_grad()
    def sweep(
        self, model: Classifier, maps: LastMaps, ranking: Tensor, counts: Tensor, clean: Split, stamp: Stamp | None
    ) -> tuple[Tensor, Tensor]:
        """Accuracy and success rate of the recovered trigger (0 without one) for so many silent channels: float64 [S].

        Success is counted on samples of other classes than the target.
        """
        table, labels = model.modality.encode(clean.inputs).to(model.device), clean.labels.to(model.device)
        rank = torch.empty_like(ranking)
        rank[ranking] = torch.arange(len(ranking), device=ranking.device)
        hits, reached = torch.zeros(2, len(counts), dtype=torch.int64, device=model.device)
        away = labels != (-1 if stamp is None else stamp.target)
        with evaluating(model), autocast(model.device):
            for part, wanted, eligible in zip(table.split(500), labels.split(500), away.split(500), strict=True):
                inputs = model.modality.prepare(part)
                stamped = None if stamp is None else stamp(inputs)
                for row, count in enumerate(counts.tolist()):
                    with maps.scaled((rank >= count).float()):
                        hits[row] += (model(inputs).argmax(1) == wanted).sum()
                        if stamped is not None and stamp is not None:
                            reached[row] += ((model(stamped).argmax(1) == stamp.target) & eligible).sum()
        return hits.double().cpu() / len(labels), reached.double().cpu() / max(1, int(away.sum()))


@dataclass(frozen=True, eq=False)
class Stamp:
    """A recovered trigger; adds itself to prepared inputs.

    Attributes:
        mask: in [0, 1], broadcast over channels (images, videos).
        pattern: prepared input.
        target: class that it leads to.
    """

    mask: Tensor
    pattern: Tensor
    target: int

    def __call__(self, inputs: Tensor) -> Tensor:
        """Prepared inputs [B, ...] with the trigger."""
        return torch.lerp(inputs, self.pattern.expand_as(inputs), self.mask.expand_as(inputs))
