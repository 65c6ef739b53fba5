"""What methods share that silence units: which units there are, how a ranking is cut, what a cut costs.

A ranking is cut where the defender's clean samples still allow it, never where a trigger stops to work: no defense
sees one. Every accuracy of a sweep comes from one pass over the samples, encoded and prepared once, in which each batch
meets all masks; the network is traced once, when its units are listed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from backdoorlab.core.errors import InputError, NotApplicable
from backdoorlab.data.split import Inputs, Split
from backdoorlab.models.anatomy import Channels, channels, evaluating, masked, split_units
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.context import Context, autocast


def prunable(model: Classifier) -> list[Channels]:
    """Channels of batch norms if there are any, else outputs of convolutions and linear layers without the head.

    Raises:
        NotApplicable: if there are no such layers.
    """
    groups = channels(model, kinds=("batchnorm",)) or channels(model, kinds=("conv", "linear"))
    if not groups:
        raise NotApplicable(
            f"{model.arch}: no batch norm, convolution or hidden linear layer whose units could be pruned"
        )
    return groups


def hold_out(clean: Split, share: float, name: str, ctx: Context) -> tuple[Split, Split]:
    """Clean samples in two random parts: (to learn from, held out).

    Args:
        clean: the defender's samples.
        share: of the samples that are held out, in (0, 1); at least one is, and one is left.
        name: of the defense, for the message and the draw.
        ctx: its seed draws the parts.

    Raises:
        InputError: if there are fewer than 2 samples.
    """
    if len(clean) < 2:
        raise InputError(f"{name} needs at least 2 clean samples (one held out), got {len(clean)}")
    held = min(len(clean) - 1, max(1, round(share * len(clean))))
    order = torch.randperm(len(clean), generator=ctx.generator(name, "holdout"))
    return clean[order[held:]], clean[order[:held]]


def deviations_in_layer(scores: Sequence[Tensor]) -> list[Tensor]:
    """(s - mean) / std of the scores of each layer, with the unbiased standard deviation.

    Args:
        scores: one vector per layer; NaN marks units that are not judged (silent ones), which get 0.

    Returns:
        float32 vectors of the same lengths; zeros for layers with fewer than two judged units or equal scores.
    """
    found = []
    for layer in scores:
        values, judged = layer.double(), ~layer.isnan()
        if int(judged.sum()) < 2:
            found.append(torch.zeros_like(layer, dtype=torch.float32))
            continue
        spread = values[judged].std()
        apart = (values - values[judged].mean()) / (spread if spread > 0 else torch.inf)
        found.append(apart.nan_to_num(0.0).float())
    return found


@torch.no_grad()
def accuracies(
    model: Classifier, groups: Sequence[Channels], keep: Tensor, split: Split, batch_size: int = 1000
) -> Tensor:
    """Accuracy of a model under each of several masks over its units.

    Args:
        model: evaluated in evaluation mode, left as it is.
        groups: its units, U in all.
        keep: [S, U], factors of the units' weights and biases (0 silences).
        split: labelled samples, at least one.
        batch_size: samples per forward pass.

    Returns:
        float64 [S] on the CPU.
    """
    table, labels = model.modality.encode(split.inputs).to(model.device), split.labels.to(model.device)
    keep = keep.to(model.device, torch.float32)
    hits = torch.zeros(len(keep), dtype=torch.int64, device=model.device)
    with evaluating(model), autocast(model.device):
        for part, wanted in zip(table.split(batch_size), labels.split(batch_size), strict=True):
            inputs = model.modality.prepare(part)
            for row, mask in enumerate(keep):
                with masked(groups, mask):
                    hits[row] += (model(inputs).argmax(1) == wanted).sum()
    return hits.double().cpu() / len(labels)


def deepest_cut(
    accuracy: Callable[[Tensor], Tensor], coarse: Tensor, tolerance: float, fine: int = 8, rounds: int = 4
) -> int:
    """The largest number of units whose loss clean samples tolerate.

    Accuracy is no monotone function of that number (a unit that does harm alone may be harmless once others are gone),
    so every coarse step is tried. What lies between the largest tolerable number and the next one is then refined, and
    refined again.

    Args:
        accuracy: counts int64 [S] -> accuracies float [S] with the so many most suspicious units silenced.
        coarse: int64, counts to try; 0 is added.
        tolerance: largest relative drop of accuracy.
        fine: how many counts a refinement tries.
        rounds: of refinement at most; each makes the gap ``fine`` + 1 times smaller.

    Returns:
        A count, 0 if only that is tolerable.
    """
    steps = torch.cat([torch.zeros(1, dtype=torch.int64), coarse.cpu()]).unique()
    reached = accuracy(steps)
    floor = (1 - tolerance) * reached[0] - 1e-9
    best = int(steps[reached >= floor].max())
    for _ in range(rounds):
        later = steps[steps > best]
        if not len(later) or int(later[0]) == best + 1:
            break
        between = torch.linspace(best, int(later[0]), fine + 2).round().long().unique()
        steps = torch.cat([between[between > best], later]).unique()
        between = between[(between > best) & (between < later[0])]
        good = between[accuracy(between) >= floor]
        best = int(good.max()) if len(good) else best
    return best


def cut_ranking(
    model: Classifier,
    groups: Sequence[Channels],
    scores: Tensor,
    levels: Tensor,
    clean: Split,
    tolerance: float,
) -> Tensor:
    """Which units to silence: the most suspicious ones, as many as clean samples tolerate.

    Args:
        model: whose units are masked for the trial; left as it is.
        groups: its units, U in all.
        scores: [U], higher = more suspicious.
        levels: coarse cuts; at each of them the units that score above it are tried.
        clean: the defender's samples, at least one.
        tolerance: largest relative drop of accuracy on them.

    Returns:
        bool [U] on the scores' device.
    """
    order = scores.argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)

    def accuracy(counts: Tensor) -> Tensor:
        return accuracies(model, groups, rank[None] >= counts.to(rank.device)[:, None], clean)

    coarse = (scores[None] > levels.to(scores)[:, None]).sum(1)
    return rank < deepest_cut(accuracy, coarse, tolerance)


def silence(groups: Sequence[Channels], units: Tensor) -> int:
    """Zero weight and bias of some units in place; ``units`` is bool [U] over all groups. Returns how many."""
    for group, mine in zip(groups, split_units(units, groups), strict=True):
        group.zero(mine)
    return int(units.sum())


@torch.no_grad()
def watch_units(
    model: Classifier,
    groups: Sequence[Channels],
    inputs: Inputs,
    visit: Callable[[int, Tensor], None],
    *,
    received: bool = False,
    batch_size: int = 500,
) -> None:
    """Show what all units return (or receive) to a function, in one pass over raw samples, in fp32.

    Args:
        model: run in evaluation mode, left as it is.
        groups: its units.
        inputs: raw samples, N rows.
        visit: called for every batch and layer with the number of the group and values float32 [B, P, U] at P
            positions (1 where a layer returns vectors); must not keep them if N is large.
        received: show the layers' inputs (norms only: these have as many channels) instead of their outputs.
        batch_size: samples per forward pass.
    """

    def hook(number: int, group: Channels) -> Callable[..., None]:
        def leave(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            values = group.units_last(args[0] if received else output).float()
            visit(number, values.reshape(len(values), -1, group.count))

        return leave

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for number, group in enumerate(groups):
            stack.callback(group.module.register_forward_hook(hook(number, group)).remove)
        for start in range(0, len(inputs), batch_size):
            table = model.modality.encode(inputs[start : start + batch_size]).to(model.device)
            model(model.modality.prepare(table))


class Moments:
    """Running sums over values of the units of one layer; means and variances from them."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, values: Tensor) -> None:
        """Take in values [..., U]."""
        rows = values.flatten(0, -2).double()
        self.count += len(rows)
        self.total = self.total.to(rows) + rows.sum(0)
        self.squares = self.squares.to(rows) + rows.square().sum(0)

    @property
    def mean(self) -> Tensor:
        """float64 [U]."""
        return self.total / self.count

    @property
    def variance(self) -> Tensor:
        """Biased, float64 [U]."""
        return (self.squares / self.count - self.mean.square()).clamp_min(0)
