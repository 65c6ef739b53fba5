"""The study of l-infinity pruning: which norm of a feature map shows a trigger, and what pruning by it does.

Cheng et al., "Defending against Backdoor Attack on Deep Neural Networks", arXiv 2002.12162.

Parts:
- ``norms``: l1, l2 and l-infinity norms of the last maps, channel by channel, of clean and triggered test samples in a
  benign and in the backdoored model; Grad-CAM of both.
- ``pruning``: ACC and ASR over the fraction pruned, for a ranking by each norm, by the recovered trigger (what a
  defender has) and by the real one (an upper bound); and the fraction that the defense chooses from clean samples.
- ``defense``: the defense ``linf`` with each norm and without a trigger, as ordinary stages, on the backdoored and on
  the benign model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from backdoorlab.benchmark.runner import Runner
from backdoorlab.benchmark.spec import owned_fraction
from backdoorlab.benchmark.studies import activations
from backdoorlab.benchmark.studies.activations import MODELS, measure_norms, measure_pruning
from backdoorlab.benchmark.studies.base import Cell, Measurement, Outcome, Planned, Study, stored
from backdoorlab.defenses.repair.linf import ORDERS, PeakPruning
from backdoorlab.tasks import Task

NORMS = {"linf": "l-infinity", "l2": "l2", "l1": "l1"}
DEFENSES: dict[str, dict[str, Any]] = {
    **{f"pruned by {label}": {"statistic": name} for name, label in NORMS.items()},
    "pruned without trigger": {"trigger": "none"},
}


@dataclass(frozen=True, kw_only=True)
class NormStudy(Study):
    """Norms of feature maps, Grad-CAM, and pruning by each norm."""

    name: ClassVar[str] = "linf"
    summary: ClassVar[str] = "l-infinity pruning: norms of feature maps, Grad-CAM, pruning by each norm"
    parts: ClassVar[tuple[str, ...]] = ("norms", "pruning", "defense")
    defense: ClassVar[str] = "linf"
    short: ClassVar[tuple[str, ...]] = ("badnets", "blended")
    paper: ClassVar[tuple[str, ...]] = ("badnets", "blended", "sig", "wanet", "ssba")

    def cells(self, task: Task, planting: Sequence[str]) -> Iterator[Cell]:
        """See :meth:`Study.cells`."""
        benign = self.base(None)
        yield Cell("benign", "undefended", "", benign)
        if self.wants("defense"):
            yield Cell("benign", "pruned by l-infinity", "defense", self.defended(None, {"statistic": "linf"}))
        for attack in planting:
            base = self.base(attack)
            yield Cell(attack, "undefended", "", base)
            if self.wants("norms"):
                yield Cell(attack, "norms", "norms", base, self.measurement("norms", {}), (benign,))
            if self.wants("pruning"):
                defense = PeakPruning.build(dict(self.options.settings))
                settings = {
                    **defense.settings(),
                    "fraction": None,
                    "trigger": "synthetic",
                    "clean_fraction": owned_fraction(defense, None),
                }
                yield Cell(attack, "sweep", "pruning", base, self.measurement("pruning", settings))
            if self.wants("defense"):
                for label, settings in DEFENSES.items():
                    yield Cell(attack, label, "defense", self.defended(attack, settings))

    def measurement(self, name: str, settings: Mapping[str, Any]) -> Measurement:
        """Norms of maps, or the sweep over the fraction pruned."""
        take = measure_norms if name == "norms" else measure_pruning
        return Measurement(name, settings, activations, PeakPruning, partial(_take, take, settings))

    def rows(self, outcomes: Sequence[Outcome], runner: Runner) -> list[dict[str, Any]]:
        """See :meth:`Study.rows`; a sweep gives one row for each norm, at the fraction chosen from clean samples."""
        rows: list[dict[str, Any]] = []
        for outcome in outcomes:
            values = dict.fromkeys(("acc", "asr", "ra", "der"))
            blank = {"attack": outcome.cell.attack, "cell": outcome.cell.label, "status": outcome.status} | values
            blank |= {"fraction": None}
            for which in MODELS:
                for how in ("max", "weighted"):
                    blank |= dict.fromkeys(f"auroc_{statistic}_{how}_{which}" for statistic in ORDERS)
            for kind in ("clean", "triggered"):
                for which in MODELS:
                    blank[f"heat_on_trigger_{kind}_{which}"] = None
            blank["trigger_area"] = None
            rest = {"reused": outcome.reused, "stage": outcome.planned.stage, "key": outcome.planned.key}
            rest["reason"] = outcome.reason
            if outcome.cell.label == "sweep" and outcome.ok:
                for statistic, label in NORMS.items():
                    own = {name: outcome.metric(f"{name}_{statistic}") for name in ("acc", "asr", "fraction")}
                    rows.append({**blank, "cell": f"sweep by {label}", **own, **rest})
            elif outcome.cell.measurement is not None:
                own = {name: outcome.metric(name) for name in blank if name.startswith(("auroc", "heat", "trigger"))}
                rows.append({**blank, **own, **rest})
            else:
                rows.append({**blank, **{name: outcome.metric(name) for name in values}, **rest})
        return rows

    def figure_names(self, planned: Sequence[Planned]) -> list[str]:
        """See :meth:`Study.figure_names`."""
        attacks = [p.cell.attack for p in planned if p.cell.label == "norms"]
        names = ["norms.png", "channels.png", *(f"grad-cam-{attack}.png" for attack in attacks)] if attacks else []
        return [*names, *(["pruning.png"] if self.wants("pruning") else [])]

    def figures(self, outcomes: Sequence[Outcome], runner: Runner) -> dict[str, bytes]:
        """See :meth:`Study.figures`."""
        from backdoorlab.benchmark.studies import linf_figures as draw

        found: dict[str, bytes] = {}
        tensors = _tensors(outcomes, runner, "norms", "norms")
        if tensors:
            found["norms.png"] = draw.histograms(self.about(), tensors)
            found["channels.png"] = draw.channels(self.about(), tensors)
        sweeps = _tensors(outcomes, runner, "sweep", "sweep")
        if sweeps:
            chosen = {
                o.cell.attack: {name: float(o.metric(f"fraction_{name}")) for name in ORDERS}
                for o in outcomes
                if o.cell.label == "sweep" and o.ok
            }
            found["pruning.png"] = draw.pruning(self.about(), sweeps, chosen)
        for attack, heat in _tensors(outcomes, runner, "norms", "heat").items():
            found[f"grad-cam-{attack}.png"] = draw.heat_maps(self.about(), attack, heat)
        return found


def _take(take: Any, settings: Mapping[str, Any], site: Any) -> Any:
    return take(site, settings)


def _tensors(outcomes: Sequence[Outcome], runner: Runner, label: str, file: str) -> dict[str, dict[str, Tensor]]:
    """One file of the measurements of a kind, by attack; those that have none are left out."""
    found = {}
    for outcome in outcomes:
        wanted = outcome.ok and outcome.cell.label == label
        if wanted and outcome.card is not None and f"{file}.safetensors" in outcome.card.digests:
            found[outcome.cell.attack] = stored(outcome, runner).tensors(file)
    return found
