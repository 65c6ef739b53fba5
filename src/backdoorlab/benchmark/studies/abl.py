"""The study of ABL: are backdoors learned faster, who is isolated, and what does unlearning need?

Li et al., "Anti-Backdoor Learning: Training Clean Models on Poisoned Data", NeurIPS 2021 (arXiv 2110.11571).

Parts:
- ``isolation``: the loss of every training sample after every epoch of the isolation phase, under ordinary training,
  LGA (on the mean of a batch and per sample) and flooding: mean losses by role, precision over the epoch and over the
  isolation rate, and the labels of what is isolated (a backdoor is tied to one class).
- ``unlearning``: joint and sequential (pure gradient ascent); joint after LGA per sample and after flooding, which on
  the mean of a batch has the gradient of LGA; also of a benign model.
- ``rate``: the defended model over the isolation rate, 0.5 to 20 %.
- ``turning``: the defended model over the turning epoch.

Attacked, benign and defended models are ordinary stages; the losses are measurements.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from backdoorlab.benchmark.runner import Runner
from backdoorlab.benchmark.studies import isolation
from backdoorlab.benchmark.studies.base import Cell, Measurement, Outcome, Planned, Study, stored
from backdoorlab.benchmark.studies.isolation import (
    RATES,
    lowest,
    measure_isolation,
    precision_at,
    ranking_losses,
)
from backdoorlab.data.split import BACKDOOR
from backdoorlab.defenses.training.abl import AntiBackdoorLearning
from backdoorlab.tasks import Task

LOSSES: dict[str, dict[str, Any]] = {
    "ordinary training": {"local_loss": "lga", "gamma": 0.0},
    "LGA": {"local_loss": "lga"},
    "LGA per sample": {"local_loss": "lga", "lga_mode": "per_sample"},
    "flooding": {"local_loss": "flooding"},
}
"""How the isolation phase is trained; with gamma 0 no loss is low enough to be raised."""

UNLEARNING: dict[str, dict[str, Any]] = {
    "joint": {"mode": "joint"},
    "sequential": {"mode": "sequential"},
    "joint, LGA per sample": {"mode": "joint", "lga_mode": "per_sample"},
    "joint, flooding": {"mode": "joint", "local_loss": "flooding"},
}
TURNINGS = (0.1, 0.2, 0.3, 0.4)
"""Turning epochs as shares of the recipe (10 to 40 of the paper's 100 epochs)."""
FIGURES = {
    "isolation": ("loss-curves.png", "precision-by-rate.png", "precision-by-epoch.png", "isolated-classes.png"),
    "unlearning": ("unlearning.png",),
    "rate": ("isolation-rate.png",),
    "turning": ("turning-epoch.png",),
}
_ISOLATING = ("local_loss", "lga_mode", "gamma", "turning", "isolation_lr", "isolation_augment")
"""Hyper-parameters that the isolation phase depends on."""
WATCHED = 0.5
"""Share of the recipe that the isolation phase is watched."""


@dataclass(frozen=True, kw_only=True)
class IsolationStudy(Study):
    """Loss curves, isolation and unlearning of ABL."""

    name: ClassVar[str] = "abl"
    summary: ClassVar[str] = "ABL: backdoors are learned faster; isolation, turning epoch, unlearning"
    parts: ClassVar[tuple[str, ...]] = ("isolation", "unlearning", "rate", "turning")
    defense: ClassVar[str] = "abl"
    short: ClassVar[tuple[str, ...]] = ("badnets", "blended")
    paper: ClassVar[tuple[str, ...]] = (
        "badnets",
        "trojannn",
        "blended",
        "input_aware",
        "sig",
        "lc",
        "fc",
        "dfst",
        "lba",
        "cba",
    )

    def cells(self, task: Task, planting: Sequence[str]) -> Iterator[Cell]:
        """See :meth:`Study.cells`."""
        if self.wants("unlearning"):
            yield Cell("benign", "undefended", "unlearning", self.base(None))
            yield Cell("benign", "joint", "unlearning", self.defended(None, UNLEARNING["joint"]))
        for attack in planting:
            base = self.base(attack)
            yield Cell(attack, "undefended", "", base)
            if self.wants("isolation"):
                for label, loss in LOSSES.items():
                    yield Cell(attack, label, "isolation", base, self.measurement(loss))
            if self.wants("unlearning"):
                for label, settings in UNLEARNING.items():
                    yield Cell(attack, label, "unlearning", self.defended(attack, settings))
            if self.wants("rate"):
                for rate in RATES:
                    yield Cell(attack, _rate(rate), "rate", self.defended(attack, {"isolation": rate}))
            if self.wants("turning"):
                for turning in TURNINGS:
                    yield Cell(attack, _turn(turning), "turning", self.defended(attack, {"turning": turning}))

    def measurement(self, loss: Mapping[str, Any]) -> Measurement:
        """Losses of all samples under one way of training."""
        changed = {**self.options.settings, **loss, "turning": WATCHED}
        every = AntiBackdoorLearning.build(changed).settings()
        settings = {name: every[name] for name in _ISOLATING}
        return Measurement("losses", settings, isolation, AntiBackdoorLearning, partial(_take, settings))

    def rows(self, outcomes: Sequence[Outcome], runner: Runner) -> list[dict[str, Any]]:
        """See :meth:`Study.rows`. ``recall`` of losses is that of 1 %."""
        rows = []
        for outcome in outcomes:
            measured = outcome.cell.measurement is not None
            row: dict[str, Any] = {"attack": outcome.cell.attack, "cell": outcome.cell.label, "status": outcome.status}
            row |= {name: None if measured else outcome.metric(name) for name in ("acc", "asr", "ra", "der")}
            row["precision"] = None if measured else outcome.metric("precision")
            row["recall"] = outcome.metric("recall_0.01" if measured else "tpr")
            row["auroc"] = outcome.metric("auroc")
            for name in ("loss_clean", "loss_poisoned", "top_class_share"):
                row[name] = outcome.metric(name) if measured else None
            for rate in RATES:
                row[f"precision_{rate:g}"] = outcome.metric(f"precision_{rate:g}") if measured else None
            replay = bool(outcome.card is not None and outcome.card.notes.get("replay"))
            row |= {"replay": replay, "reused": outcome.reused, "stage": outcome.planned.stage}
            rows.append(row | {"key": outcome.planned.key, "reason": outcome.reason})
        return rows

    def figure_names(self, planned: Sequence[Planned]) -> list[str]:
        """See :meth:`Study.figure_names`."""
        return [name for part, names in FIGURES.items() if self.wants(part) for name in names]

    def figures(self, outcomes: Sequence[Outcome], runner: Runner) -> dict[str, bytes]:
        """See :meth:`Study.figures`."""
        from backdoorlab.benchmark.studies import abl_figures as draw

        about = self.about()
        losses = _losses(outcomes, runner)
        found: dict[str, bytes] = {}
        if losses:
            found["loss-curves.png"] = draw.loss_curves(about, losses)
            found["precision-by-rate.png"] = draw.precision_by_rate(about, losses)
            found["precision-by-epoch.png"] = draw.precision_by_epoch(about, losses)
            found["isolated-classes.png"] = draw.isolated_classes(about, losses)
        numbers = {part: _numbers(outcomes, part) for part in ("unlearning", "rate", "turning")}
        if numbers["unlearning"]:
            found["unlearning.png"] = draw.unlearning(about, numbers["unlearning"])
        if numbers["rate"]:
            found["isolation-rate.png"] = draw.defended_over(
                about, numbers["rate"], "isolation rate (%)", {_rate(rate): 100 * rate for rate in RATES}, log=True
            )
        if numbers["turning"]:
            found["turning-epoch.png"] = draw.defended_over(
                about, numbers["turning"], "turning epoch (% of the recipe)", {_turn(t): 100 * t for t in TURNINGS}
            )
        return found


def _take(settings: Mapping[str, Any], site: Any) -> Any:
    return measure_isolation(site, settings)


def _rate(rate: float) -> str:
    return f"isolation {100 * rate:g} %"


def _turn(turning: float) -> str:
    return f"turning at {100 * turning:g} %"


@dataclass(frozen=True, eq=False)
class Losses:
    """What one isolation phase showed.

    Attributes:
        losses: float32 [E, N].
        poisoned: bool [N].
        labels: int64 [N] as a defender sees them.
        turning: default turning epoch.
    """

    losses: Tensor
    poisoned: Tensor
    labels: Tensor
    turning: int

    def mean(self, poisoned: bool) -> list[float]:
        """Mean loss of one role after every epoch; empty without such samples."""
        chosen = self.losses[:, self.poisoned == poisoned]
        return chosen.mean(1).tolist() if chosen.shape[1] else []

    def precision(self, rates: Sequence[float], turning: int | None = None) -> list[float | None]:
        """Precision at isolation rates if the phase had ended at ``turning``."""
        return precision_at(ranking_losses(self.losses, turning or self.turning), self.poisoned, rates)

    def isolated(self, rate: float) -> Tensor:
        """Labels of what is isolated at the default turning epoch."""
        return self.labels[lowest(ranking_losses(self.losses, self.turning), rate)]


def _losses(outcomes: Sequence[Outcome], runner: Runner) -> dict[str, dict[str, Losses]]:
    """By attack, then by how the phase was trained."""
    found: dict[str, dict[str, Losses]] = {}
    for outcome in outcomes:
        if outcome.ok and outcome.cell.measurement is not None:
            kept = stored(outcome, runner).tensors("isolation")
            losses = Losses(kept["losses"], kept["roles"] == BACKDOOR, kept["labels"], int(kept["turning"]))
            found.setdefault(outcome.cell.attack, {})[outcome.cell.label] = losses
    return found


Numbers = dict[str, dict[str, tuple[float | None, float | None]]]
"""(ACC, ASR) by attack, then by label; the undefended model comes first."""


def _numbers(outcomes: Sequence[Outcome], part: str) -> Numbers:
    """Numbers of one part for the attacks that have any."""
    found: Numbers = {}
    for outcome in outcomes:
        if outcome.ok and outcome.cell.measurement is None and outcome.cell.part in ("", part):
            pair = (outcome.metric("acc"), outcome.metric("asr"))
            found.setdefault(outcome.cell.attack, {})[outcome.cell.label] = pair
    return {attack: cells for attack, cells in found.items() if attack != "benign" and len(cells) > 1}
