"""Beatrix's Gram matrices, and the verdict that a data set defense and a scan share.

Ma, Wang, Sun, Gong, Xue, Zhang, Shi, "The 'Beatrix' Resurrections: Robust Backdoor Detection via Gram Matrices", NDSS
2023. What is done, and how it deviates, is described in :mod:`backdoorlab.defenses.dataset.beatrix`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backdoorlab.core.errors import InputError, NotApplicable, nearest
from backdoorlab.core.method import param
from backdoorlab.data.split import Inputs, Split, take
from backdoorlab.defenses.common.calibration import clean_quantile
from backdoorlab.defenses.common.classes import need_classes, need_samples, rows_per_class
from backdoorlab.defenses.common.outliers import Evidence
from backdoorlab.models.anatomy import channels, evaluating, features_and_logits, spatial_layers, trace
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.context import Context

BYTES = 2**27
"""Gram vectors that are held at a time."""
NOISE = 1.0
"""Least spread of discrepancies among classes; times n m / (n + m) they are about 1 for two groups of one kind."""
FLOOR = 1e-6
"""Added to the bounds that deviations are divided by; entries are in units of the largest clean activation."""
MOST = 500
"""Samples of a group that a discrepancy is computed of, at most."""


def gram_vectors(maps: Tensor, orders: int) -> Tensor:
    """Upper triangles of G^p = (F^p F^pT)^(1/p), powers element by element and the root with its sign, p = 1..orders.

    Args:
        maps: float [B, C, M], a feature map F with C channels per sample.
        orders: largest order.

    Returns:
        float [B, orders, C (C + 1) / 2].
    """
    rows, columns = torch.triu_indices(maps.shape[1], maps.shape[1], device=maps.device)
    found, powered = [], torch.ones_like(maps)
    for order in range(1, orders + 1):
        powered = powered * maps
        product = (powered @ powered.transpose(1, 2))[:, rows, columns]
        found.append(product.sign() * product.abs() ** (1 / order))
    return torch.stack(found, 1)


@dataclass(frozen=True, eq=False)
class Bounds:
    """Range of every Gram entry in a class: median -+ ``width`` times the median absolute deviation.

    Attributes:
        low: float [P, E].
        high: float [P, E].
    """

    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, grams: Tensor, width: float) -> Bounds:
        """Bounds from clean Gram vectors float [N, P, E]."""
        centre = median(grams)
        reach = width * median((grams - centre).abs())
        return cls(centre - reach, centre + reach)

    def deviation(self, grams: Tensor) -> Tensor:
        """Mean over all entries of how far they lie outside, relative to the bound: float [B, P, E] -> [B]."""
        below = (self.low - grams).relu() / (self.low.abs() + FLOOR)
        above = (grams - self.high).relu() / (self.high.abs() + FLOOR)
        return (below + above).flatten(1).mean(1)


def median(values: Tensor) -> Tensor:
    """Median along the first axis; of an even number the mean of the middle two."""
    ordered, count = values.sort(0).values, len(values)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


def held_out_deviations(grams: Tensor, width: float, folds: int) -> Tensor:
    """Deviation of each clean sample from the bounds of the other folds: float [N, P, E] -> [N]."""
    part = torch.arange(len(grams), device=grams.device) % folds
    found = grams.new_zeros(len(grams))
    for fold in range(min(folds, len(grams))):
        found[part == fold] = Bounds.of(grams[part != fold], width).deviation(grams[part == fold])
    return found


def discrepancy(a: Tensor, b: Tensor, kernels: int = 2, factor: float = 2.0) -> float:
    """Squared maximum mean discrepancy (biased) between float64 [N, D] and [M, D] samples.

    The kernel is a sum of Gaussians exp(-d^2 / w) with w the median squared distance of the joint sample, over
    factor^(kernels // 2), times 1, factor, factor^2, ...
    """
    joint = torch.cat([a, b])
    squared = torch.cdist(joint, joint).square()
    width = float(squared[~torch.eye(len(joint), dtype=torch.bool)].median())
    width = max(width, 1e-12) / factor ** (kernels // 2)
    kernel = sum((torch.exp(-squared / (width * factor**i)) for i in range(kernels)), torch.zeros_like(squared))
    n = len(a)
    return float(kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean())


def map_layer(model: Classifier, name: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]] | None:
    """The layer whose output is a feature map, and how that output becomes [B, C, M].

    Args:
        model: any classifier.
        name: of the layer; "" takes, of the feature maps of convolutions, the last one with another number of channels
            than the final map (what the last stage receives); the final map if all have the same number; and without
            any the tokens that the last normalisation or linear layer returns.

    Returns:
        None if the model has no such layer.

    Raises:
        InputError: if no layer with positions has that name.
    """

    def of_tokens(axis: int) -> Callable[[Tensor], Tensor]:
        return lambda out: out.movedim(axis, 1).flatten(2)

    calls = trace(model)
    shapes = {c.name: c.output.shape for c in calls if c.output is not None}
    found = {label: (module, of_tokens(1)) for label, module in spatial_layers(model)}
    earlier = [label for label in found if shapes[label][1] != shapes[list(found)[-1]][1]]
    if not found:
        groups = [g for g in channels(model, kinds=("layernorm", "linear")) if g.axis == -1]
        found = {g.name: (g.module, of_tokens(-1)) for g in groups if len(shapes[g.name]) == 3}
    if not name:
        return found[(earlier or list(found))[-1]] if found else None
    if name not in found:
        raise InputError(
            f"beatrix: {model.arch} has no layer {name!r} with positions.{nearest(name, found)} "
            f"It has: {', '.join(found) or 'none'}"
        )
    return found[name]


def maps_and_features(
    model: Classifier, inputs: Inputs, layer: tuple[nn.Module, Callable[[Tensor], Tensor]] | None, batch_size: int = 500
) -> tuple[Tensor, Tensor]:
    """One pass over raw samples: feature maps float32 [N, C, M] on the model's device, features float32 [N, D] on CPU.

    Without a layer the map is the feature vector itself, M = 1.
    """
    held: list[Tensor] = []
    maps, vectors = [], []
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.inference_mode())
        if layer is not None:
            module, arrange = layer
            handle = module.register_forward_hook(lambda _m, _i, out: held.append(arrange(out).float().clone()))
            stack.callback(handle.remove)
        for start in range(0, len(inputs), batch_size):
            batch = model.modality.encode(inputs[start : start + batch_size]).to(model.device)
            found, _ = features_and_logits(model, model.modality.prepare(batch))
            vectors.append(found.float().cpu())
            maps.append(held.pop() if layer is not None else found.float().unsqueeze(2))
            held.clear()
    if not maps:
        raise NotApplicable(f"{model.arch}: there are no samples to look at")
    return torch.cat(maps).clone(), torch.cat(vectors).clone()


@dataclass(frozen=True, eq=False)
class Deviating:
    """What the analysis says.

    Attributes:
        ratios: float64 [N], deviation of each suspicious sample over the threshold of its class; 0 where the class was
            not judged.
        evidence: discrepancy between the samples of a class that deviate and those that do not.
        targets: suspected classes, most suspicious first.
    """

    ratios: Tensor
    evidence: Evidence
    targets: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class GramAnalysis:
    """The hyper-parameters of Beatrix and the analysis itself, for whatever reports it."""

    layer: str = param(
        "", "whose feature maps are looked at; empty: what the last stage of convolutions receives", source="paper"
    )
    orders: int = param(8, "Gram matrices of the orders 1 to this", low=1, high=16, source="paper")
    width: float = param(10.0, "bounds are median -+ this many median absolute deviations", above=0, source="paper")
    folds: int = param(5, "of the clean samples of a class, for its threshold", low=2, source="paper")
    frr: float = param(0.05, "share of clean samples that may deviate", above=0, high=0.5, source="paper")
    per_class: int = param(100, "clean samples of a class that are used, at most", low=3, source="ours (paper: 30)")
    threshold: float = param(7.389056, "anomaly index above which a class is suspected", low=0, source="paper: e^2")
    level: float = param(
        0.05,
        "chance of the clean samples' division at most (1: the index decides alone, as in the paper)",
        above=0,
        high=1,
        source="ours",
    )

    def analyse(self, model: Classifier, suspicious: Split, clean: Split, ctx: Context) -> Deviating:
        """Deviations of all samples from the clean ones of their class.

        Raises:
            InputError: if there are no suspicious or clean samples, other classes than the model's, or no such layer.
            NotApplicable: if the model has no penultimate features, or no class has three clean samples.
        """
        need_samples("beatrix", "suspicious", suspicious)
        need_samples("beatrix", "clean", clean)
        need_classes("beatrix", model, suspicious)
        layer, count = map_layer(model, self.layer), model.num_classes
        mine, owned = (rows_per_class(part.labels, count) for part in (suspicious, clean))
        judged = [k for k in range(count) if len(owned[k]) >= 3 and len(mine[k])]
        if not judged:
            raise NotApplicable("beatrix: no class of the suspicious set has three clean samples to compare with")
        deviation = torch.zeros(len(suspicious), dtype=torch.float64)
        vectors = torch.zeros(len(suspicious), 0)
        held: dict[int, Tensor] = {}
        for k in ctx.track(judged, "beatrix: Gram matrices of classes", len(judged)):
            maps, _ = maps_and_features(model, take(clean.inputs, owned[k][: self.per_class]), layer)
            scale = float(maps.abs().max().clamp_min(1e-30))
            grams = gram_vectors(maps / scale, self.orders)
            held[k] = held_out_deviations(grams, self.width, self.folds).double().cpu()
            bounds = Bounds.of(grams, self.width)
            found, features = maps_and_features(model, take(suspicious.inputs, mine[k]), layer)
            if not vectors.shape[1]:
                vectors = torch.zeros(len(suspicious), features.shape[1])
            vectors[mine[k]] = features
            chunk = max(1, BYTES // (4 * grams[0].numel()))
            # More than a hundred times the largest clean activation would overflow in the highest order.
            parts = [
                bounds.deviation(gram_vectors((part / scale).clamp(-100, 100), self.orders))
                for part in found.split(chunk)
            ]
            deviation[mine[k]] = torch.cat(parts).double().cpu()
        return self.judge(deviation, vectors, mine, held, count, ctx)

    def judge(
        self,
        deviation: Tensor,
        vectors: Tensor,
        mine: list[Tensor],
        held: dict[int, Tensor],
        num_classes: int,
        ctx: Context,
    ) -> Deviating:
        """Thresholds of the classes, discrepancies, and suspected classes.

        Args:
            deviation: float64 [N].
            vectors: features float [N, D].
            mine: rows of each class.
            held: held-out deviations of the clean samples of each judged class.
            num_classes: K.
            ctx: for the choice of samples where a group is large.
        """
        pooled = clean_quantile(torch.cat(list(held.values())), self.frr)
        ratios, evidence = torch.zeros_like(deviation), Evidence.none(num_classes, NOISE)
        for k, known in held.items():
            own = len(known) >= math.ceil(1 / self.frr)
            limit = max(clean_quantile(known, self.frr) if own else pooled, 1e-12)
            ratios[mine[k]] = deviation[mine[k]] / limit
            beyond = deviation[mine[k]] > limit
            groups = [mine[k][beyond], mine[k][~beyond]]
            value = 0.0
            if min(map(len, groups)) > 1:
                n, m = map(len, groups)
                drawn = [
                    rows[torch.randperm(len(rows), generator=ctx.generator("beatrix", k))[:MOST]] for rows in groups
                ]
                value = discrepancy(vectors[drawn[0]].double(), vectors[drawn[1]].double()) * n * m / (n + m)
            evidence.put(k, value, beyond, known > limit)
        return Deviating(ratios, evidence, evidence.suspects(self.threshold, self.level))
