"""Figures of the study of ABL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from backdoorlab.analysis.figures import BAD, GOOD, GREY
from backdoorlab.analysis.panels import COLORS, Curve, Panel, draw_panels

if TYPE_CHECKING:
    from backdoorlab.benchmark.studies.abl import Losses, Numbers

_RATES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
_RATE_TICKS = [(100 * rate, f"{100 * rate:g}") for rate in _RATES]
_ACC, _ASR = COLORS[0], BAD
_COLUMNS = 3
_STYLES = ("-", "--", "-.", ":")
"""Of lines that may lie on each other."""
_TICKS = {
    "undefended": "none",
    "sequential": "pure\nascent",
    "joint, LGA per sample": "joint\nper\nsample",
    "joint, flooding": "joint\nflooding",
}

AllLosses = Mapping[str, Mapping[str, "Losses"]]


def loss_curves(about: str, losses: AllLosses) -> bytes:
    """Mean loss of clean and of poisoned samples over the epoch: a row per attack, a column per way of training."""
    rows = []
    for attack, ways in losses.items():
        panels: list[Panel] = []
        for way, found in ways.items():
            epochs = range(1, len(found.losses) + 1)
            curves = [
                Curve(label, epochs, values, color, marker="o" if len(epochs) < 12 else "")
                for label, color, values in (
                    ("clean samples", GOOD, found.mean(False)),
                    ("poisoned samples", BAD, found.mean(True)),
                )
                if values
            ]
            first = not panels
            panels.append(
                Panel(
                    f"{attack}: {way}",
                    "epoch",
                    "mean loss" if first else "",
                    curves,
                    marks=[(found.turning, GREY)],
                )
            )
        highest = 1.08 * max(y for panel in panels for curve in panel.curves for y in curve.y if y is not None)
        rows.append([_scaled(panel, (0, highest)) for panel in panels])
    subtitle = f"{about}; loss of every training sample in evaluation mode after each epoch; dashed: turning epoch"
    return draw_panels("Loss of clean and of poisoned samples", subtitle, rows)


def precision_by_rate(about: str, losses: AllLosses) -> bytes:
    """Share of poison among the isolated samples over the isolation rate."""
    panels = []
    for attack, ways in losses.items():
        curves = [
            Curve(way, [100 * rate for rate in _RATES], found.precision(_RATES), color, style, marker="o")
            for (way, found), color, style in zip(ways.items(), COLORS, _STYLES, strict=False)
        ]
        panels.append(
            Panel(
                attack,
                "isolated (% of the training set)",
                "precision",
                curves,
                log_x=True,
                y_range=(-0.03, 1.05),
                ticks=_RATE_TICKS,
                levels=[(_share(ways), "at random")],
            )
        )
    return draw_panels("Isolation precision over the isolation rate", f"{about}; at the turning epoch", _rows(panels))


def precision_by_epoch(about: str, losses: AllLosses) -> bytes:
    """Precision of the lowest 1 % over the epoch at which the isolation phase ends."""
    panels = []
    for attack, ways in losses.items():
        curves = []
        for (way, found), color, style in zip(ways.items(), COLORS, _STYLES, strict=False):
            epochs = range(1, len(found.losses) + 1)
            values = [found.precision((0.01,), epoch)[0] for epoch in epochs]
            curves.append(Curve(way, epochs, values, color, style, marker="o" if len(epochs) < 12 else ""))
        turning = next(iter(ways.values())).turning
        panels.append(
            Panel(
                attack,
                "epoch at which the phase ends",
                "precision at 1 %",
                curves,
                y_range=(-0.03, 1.05),
                levels=[(_share(ways), "at random")],
                marks=[(turning, GREY)],
            )
        )
    subtitle = f"{about}; isolated: 1 % of the training set; dashed: turning epoch"
    return draw_panels("Isolation precision over the turning epoch", subtitle, _rows(panels))


def isolated_classes(about: str, losses: AllLosses) -> bytes:
    """Labels of the isolated samples against those of the data: a backdoor is tied to one class."""
    panels = []
    for attack, ways in losses.items():
        found = ways.get("LGA") or next(iter(ways.values()))
        count = int(found.labels.max()) + 1
        own = torch.bincount(found.isolated(0.01), minlength=count).double()
        every = torch.bincount(found.labels, minlength=count).double()
        classes = torch.arange(count).double()
        bars = [
            Curve("all samples", (classes - 0.2).tolist(), (every / every.sum()).tolist(), GREY, kind="bar", width=0.4),
            Curve(
                "isolated by LGA (1 %)",
                (classes + 0.2).tolist(),
                (own / own.sum().clamp(min=1)).tolist(),
                BAD,
                kind="bar",
                width=0.4,
            ),
        ]
        step = max(1, count // 10)
        ticks = [(float(k), str(k)) for k in range(0, count, step)]
        panels.append(Panel(attack, "label in the data", "share", bars, y_range=(0, 1.05), ticks=ticks))
    return draw_panels("Labels of the isolated samples", f"{about}; at the turning epoch", _rows(panels))


def unlearning(about: str, numbers: Numbers) -> bytes:
    """ACC and ASR without defense and after each way of unlearning."""
    panels = []
    for attack, cells in numbers.items():
        places = [float(i) for i in range(len(cells))]
        bars = [
            Curve("ACC", [x - 0.19 for x in places], [acc for acc, _ in cells.values()], _ACC, kind="bar", width=0.36),
            Curve("ASR", [x + 0.19 for x in places], [asr for _, asr in cells.values()], _ASR, kind="bar", width=0.36),
        ]
        texts = [_TICKS.get(label, label) for label in cells]
        ticks = list(zip(places, texts, strict=True))
        panels.append(Panel(attack, "", "share of test samples", bars, y_range=(0, 1.05), ticks=ticks))
    subtitle = f"{about}; isolation by LGA on the mean of a batch unless said otherwise"
    return draw_panels("Joint and pure gradient-ascent unlearning", subtitle, _rows(panels))


def defended_over(about: str, numbers: Numbers, x_label: str, places: Mapping[str, float], log: bool = False) -> bytes:
    """ACC and ASR of the defended model over a hyper-parameter.

    Args:
        about: of the study.
        numbers: by attack and label.
        x_label: name of the hyper-parameter.
        places: its value for each label.
        log: logarithmic axis.
    """
    panels = []
    for attack, cells in numbers.items():
        there = [label for label in places if label in cells]
        xs = [places[label] for label in there]
        curves = [
            Curve("ACC", xs, [cells[label][0] for label in there], _ACC, marker="o"),
            Curve("ASR", xs, [cells[label][1] for label in there], _ASR, marker="o"),
        ]
        if "undefended" in cells:
            ends = [min(places.values()), max(places.values())]
            for name, color, value in (("ACC", _ACC, cells["undefended"][0]), ("ASR", _ASR, cells["undefended"][1])):
                curves.append(Curve(f"{name} undefended", ends, [value, value], color, style=":"))
        ticks = [(x, f"{x:g}") for x in places.values()]
        panels.append(
            Panel(attack, x_label, "share of test samples", curves, log_x=log, y_range=(-0.03, 1.05), ticks=ticks)
        )
    return draw_panels(f"ABL over the {x_label.partition(' (')[0]}", about, _rows(panels))


def _share(ways: Mapping[str, Losses]) -> float:
    """Share of poison in the training set: the precision of a random choice."""
    return float(next(iter(ways.values())).poisoned.double().mean())


def _rows(panels: Sequence[Panel]) -> list[list[Panel]]:
    return [list(panels[start : start + _COLUMNS]) for start in range(0, len(panels), _COLUMNS)]


def _scaled(panel: Panel, y_range: tuple[float, float]) -> Panel:
    from dataclasses import replace

    return replace(panel, y_range=y_range)
