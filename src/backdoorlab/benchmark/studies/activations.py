"""What a trigger does to the last maps of a network: norms over positions, Grad-CAM, and pruning by either norm.

The rankings by the recovered trigger are those of the defense :mod:`~backdoorlab.defenses.repair.linf`, and so is the
choice of a fraction, from clean samples alone. The real trigger serves the measuring, and rankings by it are an upper
bound that no defender has.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorlab.attacks.triggers.base import stamp_all
from backdoorlab.benchmark.studies.base import Found, Site
from backdoorlab.data.split import Inputs, Split, clean_indices, take
from backdoorlab.defenses.common.maps import LastMaps, last_maps
from backdoorlab.defenses.common.pruning import hold_out
from backdoorlab.defenses.input.sentinet import grad_cam
from backdoorlab.defenses.repair.linf import ORDERS, PeakPruning, bias, norms
from backdoorlab.metrics.detection import detection_metrics
from backdoorlab.models.anatomy import evaluating, frozen, spatial_layers
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.evaluate import predict

POOL = 1000
"""Test samples that are measured at most."""
PICTURES = 6
"""Samples whose Grad-CAM is kept."""
MODELS = ("backdoored", "benign")
FRACTIONS = (*[i / 50 for i in range(16)], 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Shares of the channels that are pruned in turn."""


@torch.no_grad()
def map_norms(model: Classifier, maps: LastMaps, inputs: Inputs, batch_size: int = 500) -> dict[str, Tensor]:
    """Norms over positions of the last maps of raw samples: float32 [N, C] on the CPU by name of the norm."""
    parts: dict[str, list[Tensor]] = {statistic: [] for statistic in ORDERS}
    table = model.modality.encode(inputs).to(model.device)
    with evaluating(model):
        for part in table.split(batch_size):
            seen = maps.of(model, model.modality.prepare(part))
            for statistic in ORDERS:
                parts[statistic].append(norms(seen, statistic).cpu())
    return {statistic: torch.cat(found) for statistic, found in parts.items()}


def separation(clean: Tensor, triggered: Tensor) -> dict[str, float | None]:
    """How well norms tell triggered from clean samples, as AUROC: float [N, C] each.

    ``max`` takes the largest channel of a sample, ``weighted`` the sum over channels weighted by the bias (where it is
    positive). The bias comes from the samples with even numbers, the AUROC from the others.
    """
    weights = bias(clean[::2], triggered[::2], False).clamp_min(0)
    plain, other = clean[1::2], triggered[1::2]
    truth = torch.arange(len(plain) + len(other)) >= len(plain)
    found = {}
    for name, of in (("max", lambda x: x.amax(1)), ("weighted", lambda x: x @ weights)):
        scores = torch.cat([of(plain), of(other)])
        found[name] = detection_metrics(scores, None, truth)["auroc"]
    return found


def measure_norms(site: Site, settings: Mapping[str, Any]) -> Found:
    """Norms per channel of clean and triggered test samples in the backdoored and in the benign model, and Grad-CAM.

    Tensors ``norms``: for every model, kind of input and norm the mean and standard deviation of each channel
    (``backdoored.triggered.linf.mean`` [C], ...) and the largest channel of each sample (``....peak`` [N]).
    Tensors ``heat`` (images only): ``clean`` and ``triggered`` uint8 [S,C,H,W], and heat in [0, 1] of the predicted
    class float32 [S,H,W] for each model and kind of input.
    """
    clean, triggered = _pairs(site)
    tensors: dict[str, Tensor] = {}
    metrics: dict[str, Any] = {"n": len(clean)}
    for which, model in zip(MODELS, site.models, strict=True):
        maps = last_maps(model)
        found = {"clean": map_norms(model, maps, clean), "triggered": map_norms(model, maps, triggered)}
        metrics[f"channels_{which}"] = maps.count
        for kind, by_norm in found.items():
            for statistic, values in by_norm.items():
                name = f"{which}.{kind}.{statistic}"
                tensors |= {f"{name}.mean": values.mean(0), f"{name}.std": values.std(0, correction=0)}
                tensors[f"{name}.peak"] = values.amax(1)
        for statistic in ORDERS:
            for how, value in separation(found["clean"][statistic], found["triggered"][statistic]).items():
                metrics[f"auroc_{statistic}_{how}_{which}"] = value
    kept = {"norms": tensors}
    if site.task.modality.name == "image" and isinstance(clean, Tensor) and isinstance(triggered, Tensor):
        heat, shares = _heat(site, clean, triggered)
        kept["heat"] = heat
        metrics |= shares
    reasons = {
        name: "the heat is 0 everywhere" if name.startswith("heat") else "no two kinds of samples to tell apart"
        for name, value in metrics.items()
        if value is None
    }
    return Found(metrics, kept, reasons)


def measure_pruning(site: Site, settings: Mapping[str, Any]) -> Found:
    """ACC and ASR over the fraction pruned, for each norm, ranked by the recovered and by the real trigger.

    Tensors ``sweep``: ``fractions`` float64 [S]; ``<norm>.<trigger>.acc`` and ``.asr`` float64 [S] on test samples for
    ``<trigger>`` in recovered, real; ``<norm>.clean_acc`` and ``<norm>.recovered_asr`` float64 [S] on the defender's
    samples, for the ranking by the recovered trigger.
    Metrics: for each norm the chosen fraction, and ACC and ASR there.
    """
    fraction = float(settings["clean_fraction"])
    defense = PeakPruning(**{k: v for k, v in settings.items() if k != "clean_fraction"})
    task, model = site.task, copy.deepcopy(site.models[0]).eval()
    clean = task.train[clean_indices(task.train.labels, task.num_classes, fraction, site.seed)]
    learn, _ = hold_out(clean, defense.holdout, defense.name, site.ctx)
    maps = last_maps(model)
    stamp = defense.recover(model, learn, site.ctx)
    counts = (torch.tensor(FRACTIONS, dtype=torch.float64) * maps.count).round().long()
    test = task.test[torch.arange(min(POOL, len(task.test)))]
    _, triggered, desired = _triggered(site)
    pruned = {"clean": (test.inputs, test.labels), "triggered": (triggered, desired)}
    tensors = {"fractions": torch.tensor(FRACTIONS, dtype=torch.float64)}
    metrics: dict[str, Any] = {"channels": maps.count, "target": stamp.target}
    for statistic in ORDERS:
        by_norm = dataclasses.replace(defense, statistic=statistic)
        ranking = by_norm.rank(model, maps, learn, stamp).argsort(descending=True, stable=True)
        own = by_norm.sweep(model, maps, ranking, counts, clean, stamp)
        tensors[f"{statistic}.clean_acc"], tensors[f"{statistic}.recovered_asr"] = own
        chosen = by_norm.choose(model, maps, ranking, clean, stamp, site.ctx)
        metrics[f"fraction_{statistic}"] = chosen / maps.count
        for name, split in pruned.items():
            short = "acc" if name == "clean" else "asr"
            tensors[f"{statistic}.recovered.{short}"] = pruned_rates(model, maps, ranking, counts, *split)
            at = pruned_rates(model, maps, ranking, torch.tensor([chosen]), *split)
            metrics[f"{short}_{statistic}"] = float(at) if len(split[1]) else None
        real = _rank_by_trigger(site, by_norm, model, maps, learn).argsort(descending=True, stable=True)
        for name, split in pruned.items():
            short = "acc" if name == "clean" else "asr"
            tensors[f"{statistic}.real.{short}"] = pruned_rates(model, maps, real, counts, *split)
    reasons = {name: "no samples to measure it on" for name, value in metrics.items() if value is None}
    return Found(metrics, {"sweep": tensors}, reasons)


def pruned_rates(
    model: Classifier, maps: LastMaps, ranking: Tensor, counts: Tensor, inputs: Inputs, labels: Tensor
) -> Tensor:
    """Share of samples that get these labels with the first so many channels of a ranking silent: float64 [S]."""
    rank = torch.empty_like(ranking)
    rank[ranking] = torch.arange(len(ranking), device=ranking.device)
    found = []
    for count in counts.tolist():
        with maps.scaled((rank >= count).float()):
            found.append((predict(model, inputs).argmax(1) == labels).double().mean())
    return torch.stack(found)


def heat_share(heat: Tensor, changed: Tensor) -> Tensor:
    """Share of the heat that lies on changed pixels: [S,H,W] and bool [S,H,W] -> float64 [S]; NaN without any heat."""
    values = heat.double()
    return (values * changed).flatten(1).sum(1) / values.flatten(1).sum(1)


def _triggered(site: Site) -> tuple[Inputs, Inputs, Tensor]:
    """Test samples that count for ASR, the same with the trigger, and the attacker's labels; at most POOL."""
    test, target_map = site.task.test, site.backdoor.target_map
    rows = target_map.eligible(test.labels).nonzero().flatten()[:POOL]
    clean = take(test.inputs, rows)
    return clean, stamp_all(site.backdoor.trigger, clean, device=site.models[0].device), target_map(test.labels[rows])


def _pairs(site: Site) -> tuple[Inputs, Inputs]:
    clean, triggered, _ = _triggered(site)
    return clean, triggered


def _rank_by_trigger(site: Site, defense: PeakPruning, model: Classifier, maps: LastMaps, learn: Split) -> Tensor:
    """Bias of every channel under the real trigger, on the samples that the defender learns from: float32 [C]."""
    rows = site.backdoor.target_map.eligible(learn.labels)
    data = learn[rows] if bool(rows.any()) else learn
    stamped = stamp_all(site.backdoor.trigger, data.inputs, device=model.device)
    plain, other = (map_norms(model, maps, inputs)[defense.statistic] for inputs in (data.inputs, stamped))
    return bias(plain, other, defense.normalised).to(model.device)


def _heat(site: Site, clean: Tensor, triggered: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Pictures with their heat, and the mean share of the heat on the pixels that the trigger changes."""
    first, second = clean[:PICTURES].cpu(), triggered[:PICTURES].cpu()
    tensors = {"clean": first.contiguous(), "triggered": second.contiguous()}
    changed = (first.int() != second.int()).any(1)
    metrics: dict[str, Any] = {"trigger_area": float(changed.double().mean())}
    for which, model in zip(MODELS, site.models, strict=True):
        layers = spatial_layers(model)
        if not layers:
            continue
        for kind, images in (("clean", first), ("triggered", second)):
            x = model.modality.prepare(model.modality.encode(images).to(model.device))
            with frozen(model), evaluating(model):
                heat, _ = grad_cam(model, layers[-1][1], x, 1)
            sized = F.interpolate(heat.cpu(), size=first.shape[2:], mode="bilinear", align_corners=False)[:, 0]
            tensors[f"{which}.{kind}"] = sized.contiguous()
            share = heat_share(sized, changed)
            share = share[share.isfinite()]
            metrics[f"heat_on_trigger_{kind}_{which}"] = float(share.mean()) if len(share) else None
    return tensors, metrics
