"""AGPD: in a poisoned class the gradients of the labelled class at an inner layer point in two directions.

Yuan, Wu, Zhu, Wei, Wang, "Activation Gradient based Poisoned Sample Detection Against Backdoor Attacks", ICLR 2025
(arXiv 2312.06230).

g_l(x) is the gradient of the logit of the label y with respect to the output of layer l, averaged over its positions: a
vector with an entry per channel. For each class k, the mean r_k of g_l over clean samples of the class that the model
classifies correctly is the clean direction, and the sample of the class least similar to it (cosine) is the seed q_k.

(All g are taken less their mean over the clean samples of all classes, see below.)

1. Dispersion of a class at a layer: root mean square, over its samples, of cos(g, r_k) - cos(g, q_k).
2. Robust z-scores of the dispersions among the classes, per layer. The layer with the largest one is used; classes with
   a z-score above e^2 there are suspected.
3. In a suspected class the set P of poison starts with the seed and grows. In every round

       rate(x) = (1 - cos(g, mean of P)) / (1 - cos(g, mean of P) + 1 - cos(g, r_k))

   is scaled to [0, 1] over the samples outside of P, and those with a rate of at most ``tau`` join P, until none is
   left. The Jensen-Shannon divergence between the histograms of rates of successive rounds tells where to stop: the
   start of the window of 10 rounds with the smallest mean + 5 standard deviations.

The score of a sample is 1 - rate for members of P and -rate for the others, by the rates of the round that is taken
(scaled over the whole class). Samples of classes that are not suspected follow below, those least similar to their
clean direction first; -2 where there is none. Flagged is what is above 0.

Choices and deviations
- Layers are all convolutions and, in networks without any, the linear and normalisation layers; found by tracing. All
  their gradients come from one backward pass. Gradients of tokens or time steps are averaged over them.
- The dispersion is a mean, not a sum, over samples: a large class is not suspicious as such.
- ``stop="middle"`` (default) takes the last round whose new members are, on average, nearer to P than to the clean
  direction (unscaled rate below one half). With a few hundred samples a class, the rounds are too few and too uneven
  for the windows of ``stop="window"``, which is the paper's.
- ``centred=True`` (default) subtracts the mean clean gradient of all classes. In a shallow network the gradients of all
  samples share most of their direction, and the differences between them are lost in cosines near 1.
- A suspected class is filtered only if its correctly classified clean samples, put through the same filter, stay
  outside of P more than chance has it (Fisher's exact test, ``level``), or altogether. ``level=1`` is the paper's rule,
  by which some layer of a benign model may well have some class above e^2. A P that holds nothing but its seed is no
  finding.
- The paper's second chance (three late layers, dispersion above 0.3, if no layer has an outlier) is the option
  ``fallback``, off by default: the constant belongs to one network.
- Fewer than 5 judged classes give no index; then dispersion and clean samples decide: the layer is the one with the
  largest dispersion.

Limits: all-to-all attacks leave no class to compare with; a class without clean samples is not judged. In a network of
few layers the gradients of poison and clean samples hardly differ.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.core.errors import NotApplicable
from backdoorlab.core.method import param
from backdoorlab.data.split import Split
from backdoorlab.defenses.base import DatasetDefense, defenses
from backdoorlab.defenses.common.classes import need_classes, need_samples, rows_per_class
from backdoorlab.defenses.common.outliers import FEWEST_CLASSES, Evidence, deviations
from backdoorlab.defenses.view import DefenderView
from backdoorlab.models.anatomy import Channels, channels, frozen
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.context import Context

BINS = 100
WINDOW = 10
LATE = 3
FLOOR = 1e-3
"""Least spread of dispersions (they lie between 0 and 2) among the classes of a layer."""


def layers_of(model: Classifier) -> list[Channels]:
    """Layers whose gradients are looked at: convolutions, or linear and normalisation layers where there are none.

    Raises:
        NotApplicable: if there is no such layer before the head.
    """
    for kinds in (("conv",), ("linear", "layernorm")):
        found = channels(model, kinds=kinds)
        if found:
            return found
    raise NotApplicable(f"agpd: {model.arch} has no layer before the one that yields the logits")


def activation_gradients(
    model: Classifier, data: Split, layers: list[Channels], batch_size: int
) -> tuple[list[Tensor], Tensor]:
    """Gradients of the labelled logits at the outputs of layers, averaged over positions, and predictions.

    Args:
        model: left as it is.
        data: raw samples and labels, N rows.
        layers: of the model.
        batch_size: samples per pass.

    Returns:
        For each layer float32 [N, C], on the CPU; and int64 [N], the predicted classes.
    """
    outputs: dict[int, Tensor] = {}
    order = {id(layer.module): i for i, layer in enumerate(layers)}

    def keep(module: nn.Module, args: object, output: Tensor) -> Tensor:
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        outputs[order[id(module)]] = output
        return output.clone()  # what follows may write in place

    parts: list[list[Tensor]] = [[] for _ in layers]
    predicted = []
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        for layer in layers:
            stack.callback(layer.module.register_forward_hook(keep).remove)
        for inputs, labels in data.batches(batch_size):
            x = model.modality.prepare(model.modality.encode(inputs).to(model.device))
            outputs.clear()
            with torch.enable_grad():
                logits = model(x)
            chosen = logits.gather(1, labels.to(logits.device)[:, None]).sum()
            seen = sorted(outputs)
            gradients = torch.autograd.grad(chosen, [outputs[i] for i in seen], allow_unused=True)
            for i, gradient in zip(seen, gradients, strict=True):
                output = outputs[i]
                gradient = torch.zeros_like(output) if gradient is None else gradient
                flat = layers[i].units_last(gradient)
                parts[i].append(flat.reshape(len(flat), -1, flat.shape[-1]).mean(1).float().cpu())
            predicted.append(logits.detach().argmax(1).cpu())
    return [torch.cat(part) for part in parts], torch.cat(predicted)


def cosines(vectors: Tensor, direction: Tensor) -> Tensor:
    """Cosine of each row of float64 [N, C] with a vector [C]: [N]; 0 for vectors of length 0."""
    return F.cosine_similarity(vectors, direction[None], dim=1, eps=1e-30)


def dispersion(vectors: Tensor, clean: Tensor) -> tuple[float, int]:
    """Root mean square of cos to the clean direction less cos to the seed, and the seed, least similar to the former.

    Args:
        vectors: gradients of a class, float64 [N, C].
        clean: the clean direction, float64 [C].
    """
    to_clean = cosines(vectors, clean)
    seed = int(to_clean.argmin())
    return float((to_clean - cosines(vectors, vectors[seed])).square().mean().sqrt()), seed


def rates(vectors: Tensor, members: Tensor, clean: Tensor) -> Tensor:
    """Distance to the mean of the members over the sum of this and the distance to the clean direction: float64 [N]."""
    near = 1 - cosines(vectors, vectors[members].mean(0))
    far = 1 - cosines(vectors, clean)
    return near / (near + far).clamp_min(1e-12)


@dataclass(frozen=True, eq=False)
class Growth:
    """How the poison set of a class grew.

    Attributes:
        joined: int64 [N], round in which each sample joined (0: the seed).
        closeness: of each round from 1, mean rate of those that joined in it.
        divergence: of each round from 2, Jensen-Shannon divergence of the histogram of rates from that before.
    """

    joined: Tensor
    closeness: list[float]
    divergence: list[float]


def grow(vectors: Tensor, seed: int, clean: Tensor, tau: float) -> Growth:
    """Let the poison set of a class grow until it is the whole class.

    Args:
        vectors: gradients of the class, float64 [N, C].
        seed: first member.
        clean: the clean direction, float64 [C].
        tau: samples whose scaled rate is at most this join.
    """
    joined = torch.full((len(vectors),), -1, dtype=torch.int64)
    joined[seed] = 0
    closeness, divergence, last, number = [], [], None, 0
    while bool((joined < 0).any()):
        number += 1
        rate = rates(vectors, joined >= 0, clean)
        outside = joined < 0
        low, high = rate[outside].min(), rate[outside].max()
        scaled = (rate - low) / (high - low).clamp_min(1e-12)
        histogram = torch.histc(scaled[outside], BINS, 0.0, 1.0)
        new = outside & (scaled <= tau)
        joined[new] = number
        closeness.append(float(rate[new].mean()))
        if last is not None:
            divergence.append(jensen_shannon(last, histogram))
        last = histogram
    return Growth(joined, closeness, divergence)


def jensen_shannon(a: Tensor, b: Tensor) -> float:
    """Jensen-Shannon divergence in nats of two histograms of counts."""
    p, q = (h.double() / h.sum().clamp_min(1) for h in (a, b))
    middle = (p + q) / 2
    parts = (torch.xlogy(h, h / middle.clamp_min(1e-30)).sum() / 2 for h in (p, q))
    return float(sum(parts))


def smoothest(divergence: list[float]) -> int:
    """Round at which the smoothest window of divergences starts; the last round if there is no whole window."""
    if len(divergence) < WINDOW:
        return len(divergence) + 1
    windows = torch.tensor(divergence, dtype=torch.float64).unfold(0, WINDOW, 1)
    return int((windows.mean(1) + 5 * windows.std(1, correction=0)).argmin()) + 1


def last_near(closeness: list[float]) -> int:
    """Last round in a row, from the first, whose new members are nearer to the poison than to the clean direction."""
    return next((i for i, mean in enumerate(closeness) if mean >= 0.5), len(closeness))


@defenses.register
@dataclass(frozen=True, kw_only=True)
class Agpd(DatasetDefense):
    """Directions of gradients at inner layers, and growth of a poison set from the least similar sample."""

    name: ClassVar[str] = "agpd"
    paper: ClassVar[str] = (
        "Yuan et al., Activation Gradient based Poisoned Sample Detection, ICLR 2025, arXiv 2312.06230"
    )
    year: ClassVar[int] = 2025
    modalities: ClassVar[tuple[str, ...]] = ("image", "text", "audio", "video")
    reads: ClassVar[tuple[str, ...]] = ("model", "suspicious", "clean")
    needs_clean_fraction: ClassVar[float] = 0.05

    tau: float = param(0.05, "scaled rate up to which samples join the poison", low=0, high=1, source="ours")
    threshold: float = param(7.389056, "index above which a class is suspected", low=0, source="paper: e^2")
    level: float = param(
        0.05,
        "chance of the clean samples' division at most (1: the index decides alone, as in the paper)",
        above=0,
        high=1,
        source="ours",
    )
    centred: bool = param(True, "gradients less the mean clean one of all classes", source="ours")
    stop: str = param("middle", "which round of the growth is taken", choices=("middle", "window"), source="ours")
    fallback: bool = param(
        False,
        "without an outlier, suspect classes with a dispersion above 0.3 in one of the last three layers",
        source="ours (paper: yes)",
    )
    min_samples: int = param(10, "smaller classes are not judged", low=3, source="ours")
    batch_size: int = param(256, "samples per backward pass", low=1, source="BackdoorBench")

    def score(self, view: DefenderView, ctx: Context) -> Tensor:
        """1 - rate for members of the poison, -rate for the others of suspected classes, less elsewhere."""
        model, data, clean = view.model, view.suspicious, view.clean
        need_samples(self.name, "suspicious", data)
        need_samples(self.name, "clean", clean)
        need_classes(self.name, model, data)
        layers = layers_of(model)
        known, predicted = activation_gradients(model, clean, layers, self.batch_size)
        right = predicted == clean.labels.cpu()
        middle = [part[right].double().mean(0) if self.centred and bool(right.any()) else 0.0 for part in known]
        owned = [rows[right[rows]] for rows in rows_per_class(clean.labels, model.num_classes)]
        mine = rows_per_class(data.labels, model.num_classes)
        judged = [k for k in range(model.num_classes) if len(mine[k]) >= self.min_samples and len(owned[k])]
        if not judged:
            raise NotApplicable(
                "agpd: no class has clean samples that the model classifies correctly and enough others"
            )
        spread = torch.full((len(layers), model.num_classes), math.nan, dtype=torch.float64)
        near = torch.ones(len(layers), len(data), dtype=torch.float64)
        for k in ctx.track(judged, "agpd: directions of gradients", len(judged)):
            vectors, _ = activation_gradients(model, data[mine[k]], layers, self.batch_size)
            for i in range(len(layers)):
                towards = known[i][owned[k]].double().mean(0) - middle[i]
                spread[i, k], _ = dispersion(vectors[i].double() - middle[i], towards)
                near[i, mine[k]] = cosines(vectors[i].double() - middle[i], towards)
        layer, found = self.outliers(spread)
        scores = -1.5 - near[layer] / 2
        for k in found:
            vectors, _ = activation_gradients(model, data[mine[k]], layers, self.batch_size)
            both = torch.cat([vectors[layer], known[layer][owned[k]]]).double() - middle[layer]
            rate, members = self.filter(both, len(mine[k]))
            evidence = Evidence.none(model.num_classes)
            evidence.put(k, 0.0, members[: len(mine[k])], members[len(mine[k]) :])
            few, own = len(judged) < FEWEST_CLASSES, slice(0, len(mine[k]))
            excused = float(evidence.odds[k]) > self.level and (few or not bool(evidence.untouched[k]))
            if int(members[own].sum()) > 1 and not excused:
                scores[mine[k]] = torch.where(members[own], (1 - rate[own]).clamp_min(1e-6), -rate[own])
        return scores.float()

    def outliers(self, spread: Tensor) -> tuple[int, list[int]]:
        """The layer that is used and the classes that stand out there, given dispersions float64 [L, K]."""
        index = torch.stack([deviations(row, FLOOR) for row in spread])
        if int((~spread[0].isnan()).sum()) < FEWEST_CLASSES:
            layer = int(spread.nan_to_num(-1.0).max(1).values.argmax())
            return layer, (~spread[layer].isnan()).nonzero().flatten().tolist()
        layer = int(index.max(1).values.argmax())
        found = (index[layer] > self.threshold).nonzero().flatten().tolist()
        if not found and self.fallback:
            late = spread[-LATE:].nan_to_num(-1.0)
            layer = len(spread) - len(late) + int(late.max(1).values.argmax())
            found = (spread[layer].nan_to_num(-1.0) > 0.3).nonzero().flatten().tolist()
        return layer, found

    def filter(self, vectors: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Rates and membership of a class: the first ``count`` gradients are suspicious, the rest clean samples.

        Returns:
            Rates float64 [N], scaled to [0, 1], and bool [N]: what the poison set holds in the round that is taken.
        """
        clean = vectors[count:].mean(0)
        _, seed = dispersion(vectors[:count], clean)
        growth = grow(vectors, seed, clean, self.tau)
        last = smoothest(growth.divergence) if self.stop == "window" else last_near(growth.closeness)
        members = growth.joined <= last
        rate = rates(vectors, members, clean)
        low, high = rate.min(), rate.max()
        return (rate - low) / (high - low).clamp_min(1e-12), members

    def flags(self, scores: Tensor, view: DefenderView) -> Tensor:
        """Members of the poison sets of suspected classes."""
        return scores > 0
