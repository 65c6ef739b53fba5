"""What ABL's isolation sees: the loss of every training sample after every epoch, and what it says about poison.

The training is the defense's own isolation phase, watched from outside; roles only enter afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor

from backdoorlab.benchmark.studies.base import Found, Site
from backdoorlab.data.split import BACKDOOR, Split
from backdoorlab.defenses.training.abl import AntiBackdoorLearning, sample_losses
from backdoorlab.metrics.detection import detection_metrics
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.blueprint import Blueprint
from backdoorlab.training.context import Context
from backdoorlab.training.log import FitLog
from backdoorlab.training.loop import FitOptions, OnEpoch
from backdoorlab.training.recipes import Recipe

RATES = (0.005, 0.01, 0.05, 0.1, 0.2)
"""Isolation rates, as shares of the training set."""


@dataclass(frozen=True, eq=False)
class Watched(Blueprint):
    """A blueprint whose trainings are watched.

    Attributes:
        watch: called after each epoch, besides what the training itself calls.
    """

    watch: OnEpoch[Classifier]

    def fit(
        self,
        split: Split,
        context: Context,
        *,
        model: Classifier | None = None,
        recipe: Recipe | None = None,
        **options: Unpack[FitOptions[Classifier]],
    ) -> tuple[Classifier, FitLog]:
        """See :meth:`Blueprint.fit`."""
        options["on_epoch"] = [*options.get("on_epoch", ()), self.watch]
        return super().fit(split, context, model=model, recipe=recipe, **options)


def watch_losses(defense: AntiBackdoorLearning, data: Split, blueprint: Blueprint, ctx: Context) -> Tensor:
    """Losses of all samples after every epoch of the isolation phase: float32 [E, N]."""
    ends: list[Tensor] = []

    def look(epoch: int, model: Classifier) -> None:
        ends.append(sample_losses(model, data))

    watched = Watched(blueprint.arch, blueprint.modality, blueprint.num_classes, blueprint.recipe, look)
    defense.isolate(data, watched, ctx)
    return torch.stack(ends)


def ranking_losses(losses: Tensor, turning: int) -> Tensor:
    """What ABL ranks by if the turning epoch is ``turning`` (1 to E): the mean over the later half of the epochs.

    Args:
        losses: float [E, N].
        turning: epochs of isolation.

    Returns:
        float [N].
    """
    return losses[turning // 2 : turning].mean(0)


def lowest(losses: Tensor, rate: float) -> Tensor:
    """Indices of the share ``rate`` of lowest losses, int64; rounded down, perhaps empty."""
    return losses.topk(int(rate * len(losses)), largest=False).indices


def precision_at(losses: Tensor, poisoned: Tensor, rates: Sequence[float]) -> list[float | None]:
    """Share of poison among the isolated samples at several isolation rates; None where nobody is isolated."""
    found = [poisoned[lowest(losses, rate)] for rate in rates]
    return [float(hits.double().mean()) if len(hits) else None for hits in found]


def recall_at(losses: Tensor, poisoned: Tensor, rates: Sequence[float]) -> list[float | None]:
    """Share of all poison that is isolated at several isolation rates; None without poison."""
    total = int(poisoned.sum())
    return [int(poisoned[lowest(losses, rate)].sum()) / total if total else None for rate in rates]


def top_class_share(labels: Tensor, chosen: Tensor) -> float | None:
    """Share of the most frequent observed label among chosen samples; None if none was chosen."""
    return float(labels[chosen].bincount().max()) / len(chosen) if len(chosen) else None


def measure_isolation(site: Site, settings: Mapping[str, Any]) -> Found:
    """Watch ABL's isolation phase with these hyper-parameters; ``turning`` is how long it is watched.

    Metrics are taken at the turning epoch of the hyper-parameter's default. Tensors: ``losses`` float32 [E, N],
    ``roles`` uint8 [N], ``labels`` int64 [N] as a defender sees them, ``turning`` the default turning epoch.
    """
    data = site.backdoor.poison.apply(site.task.train)
    defense, recipe = AntiBackdoorLearning(**settings), site.task.recipe.resolve(len(data))
    losses = watch_losses(defense, data.as_seen(), site.task.blueprint, site.ctx)
    turning = min(len(losses), AntiBackdoorLearning().isolation_epochs(recipe))
    ranked, poisoned = ranking_losses(losses, turning), data.roles == BACKDOOR
    precision, recall = precision_at(ranked, poisoned, RATES), recall_at(ranked, poisoned, RATES)
    metrics: dict[str, Any] = {"turning_epoch": turning, "epochs": len(losses), "auroc": None}
    metrics["auroc"] = detection_metrics(-ranked, None, poisoned)["auroc"]
    metrics |= {f"precision_{rate:g}": value for rate, value in zip(RATES, precision, strict=True)}
    metrics |= {f"recall_{rate:g}": value for rate, value in zip(RATES, recall, strict=True)}
    metrics["loss_clean"] = float(losses[turning - 1][~poisoned].mean()) if not bool(poisoned.all()) else None
    metrics["loss_poisoned"] = float(losses[turning - 1][poisoned].mean()) if bool(poisoned.any()) else None
    metrics["top_class_share"] = top_class_share(data.labels, lowest(ranked, 0.01))
    reasons = {
        name: "nothing is isolated at this rate, or there is nothing to count"
        for name, value in metrics.items()
        if value is None
    }
    tensors = {
        "losses": losses.contiguous(),
        "roles": data.roles,
        "labels": data.labels,
        "turning": torch.tensor(turning),
    }
    return Found(metrics, {"isolation": tensors}, reasons)
