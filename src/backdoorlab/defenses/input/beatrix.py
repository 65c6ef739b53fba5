"""Beatrix for single inputs: the correlations of features inside a triggered input are not those of its class.

Ma, Wang, Sun, Gong, Xue, Zhang, Shi, "The 'Beatrix' Resurrections: Robust Backdoor Detection via Gram Matrices", NDSS
2023 (arXiv 2209.11715).

Gram matrices, bounds and deviations are those of :mod:`backdoorlab.defenses.dataset.beatrix`, which filters training
sets and finds attacked classes; here inputs are judged at inference, each against the clean samples of the class that
the model *predicts* for it. Which class is attacked cannot be asked, since there is no set of inputs to compare.

The score is the deviation over what is usual in the class: the ``1 - frr`` quantile of its clean samples, held out in
``folds``. Classes with fewer than 1 / ``frr`` clean samples share the quantile of all. The threshold is the ``1 - frr``
quantile of the held-out scores of all clean samples, near 1.

Choices and deviations
- Clean samples count for the class that the model predicts, as the inputs do.
- A class with fewer than three clean samples has no bounds of its own; the inputs that are predicted so are compared
  with ``per_class`` clean samples of any class.
- At most ``per_class`` clean samples of a class are used (the paper: 30, on which its recall varies much).

Limits: as for the defense of data sets; memory grows with C^2, and ``layer`` names another map.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backdoorlab.core.method import param
from backdoorlab.data.split import Inputs, take
from backdoorlab.defenses.base import InputDefense, InputDetector, defenses
from backdoorlab.defenses.common.calibration import clean_quantile
from backdoorlab.defenses.common.classes import need_samples
from backdoorlab.defenses.common.gram import (
    BYTES,
    Bounds,
    gram_vectors,
    held_out_deviations,
    map_layer,
    maps_and_features,
)
from backdoorlab.defenses.view import DefenderView
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.context import Context
from backdoorlab.training.evaluate import predict


@dataclass(frozen=True, eq=False)
class Known:
    """What clean samples of one class look like.

    Attributes:
        scale: largest activation.
        bounds: of the Gram entries.
        usual: deviation that a share of the clean samples exceeds.
    """

    scale: float
    bounds: Bounds
    usual: float


@dataclass(frozen=True, eq=False)
class BeatrixDetector(InputDetector):
    """Scores inputs by how far their Gram matrices lie outside of their class.

    Attributes:
        known: of each class that is predicted for at least three clean samples.
        rest: of clean samples of any class.
    """

    model: Classifier
    layer: str
    orders: int
    known: dict[int, Known]
    rest: Known
    threshold: float = math.inf

    def score(self, inputs: Inputs) -> Tensor:
        """Deviation over what is usual in the predicted class: float32 [N] on the CPU."""
        classes = predict(self.model, inputs).argmax(1)
        found = torch.zeros(len(inputs))
        layer = map_layer(self.model, self.layer)
        for k in classes.unique().tolist():
            rows = (classes == k).nonzero().flatten()
            known = self.known.get(k, self.rest)
            maps, _ = maps_and_features(self.model, take(inputs, rows), layer)
            found[rows] = (deviations(maps, known, self.orders) / known.usual).float().cpu()
        return found


def deviations(maps: Tensor, known: Known, orders: int) -> Tensor:
    """Deviation of feature maps [N, C, M] from clean ones: float [N]."""
    entries = orders * maps.shape[1] * (maps.shape[1] + 1) // 2
    chunk = max(1, BYTES // (4 * entries))
    # More than a hundred times the largest clean activation would overflow in the highest order.
    parts = [
        known.bounds.deviation(gram_vectors((part / known.scale).clamp(-100, 100), orders))
        for part in maps.split(chunk)
    ]
    return torch.cat(parts)


@defenses.register
@dataclass(frozen=True, kw_only=True)
class BeatrixInput(InputDefense):
    """Deviation of Gram matrices from those of clean samples of the predicted class."""

    name: ClassVar[str] = "beatrix_input"
    paper: ClassVar[str] = "Ma et al., The Beatrix Resurrections, NDSS 2023, arXiv 2209.11715"
    year: ClassVar[int] = 2023
    modalities: ClassVar[tuple[str, ...]] = ("image", "text", "audio", "video")

    layer: str = param(
        "", "whose feature maps are looked at; empty: what the last stage of convolutions receives", source="paper"
    )
    orders: int = param(8, "Gram matrices of the orders 1 to this", low=1, high=16, source="paper")
    width: float = param(10.0, "bounds are median -+ this many median absolute deviations", above=0, source="paper")
    folds: int = param(5, "of the clean samples of a class, for what is usual", low=2, source="paper")
    frr: float = param(0.05, "share of clean inputs that may be rejected", above=0, high=0.5, source="paper")
    per_class: int = param(100, "clean samples of a class that are used, at most", low=3, source="ours (paper: 30)")

    def run(self, view: DefenderView, ctx: Context) -> BeatrixDetector:
        """Learn the bounds of every class that is predicted for clean samples.

        Raises:
            InputError: if there are fewer than four clean samples, or no such layer.
            NotApplicable: if the model has no penultimate features.
        """
        model, clean = view.model, view.clean
        need_samples(self.name, "clean", clean, 4)
        layer = map_layer(model, self.layer)
        classes = predict(model, clean.inputs).argmax(1)
        maps, _ = maps_and_features(model, clean.inputs, layer)
        rest, everything = self._learn(maps[: self.per_class])
        learned = {
            int(k): self._learn(maps[(classes == k).to(maps.device)][: self.per_class])
            for k in classes.unique()
            if int((classes == k).sum()) >= 3
        }
        held = {k: own for k, (_, own) in learned.items()} or {-1: everything}
        pooled = clean_quantile(torch.cat(list(held.values())), self.frr)
        enough, least = math.ceil(1 / self.frr), 1e-12
        known = {
            k: dataclasses.replace(
                found, usual=max(clean_quantile(own, self.frr) if len(own) >= enough else pooled, least)
            )
            for k, (found, own) in learned.items()
        }
        rest = dataclasses.replace(rest, usual=max(clean_quantile(everything, self.frr), least))
        scores = torch.cat([own / known[k].usual if k in known else own / rest.usual for k, own in held.items()])
        return BeatrixDetector(model, self.layer, self.orders, known, rest, clean_quantile(scores.float(), self.frr))

    def _learn(self, maps: Tensor) -> tuple[Known, Tensor]:
        """Bounds from clean maps [N, C, M], and the held-out deviation of each: float64 [N] on the CPU."""
        scale = float(maps.abs().max().clamp_min(1e-30))
        grams = gram_vectors(maps / scale, self.orders)
        held = held_out_deviations(grams, self.width, self.folds).double().cpu()
        return Known(scale, Bounds.of(grams, self.width), math.nan), held
