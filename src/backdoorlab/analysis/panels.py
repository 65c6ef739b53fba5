"""Figures of curves: small panels in rows under a title, one legend for all of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from backdoorlab.analysis.figures import GREY, INK

COLORS = ("#0969da", "#bf5b00", "#8250df", "#1a7f4b", "#c62f2f", "#6a737d")
"""For things of equal rank, in this order."""

EDGE = "#d0d7de"


@dataclass(frozen=True)
class Curve:
    """One series of a panel.

    Attributes:
        label: in the legend, where every label appears once.
        x: positions.
        y: values; None leaves a gap.
        color: of the line and its marks.
        style: "-", "--", ":" or "" for marks alone.
        marker: of matplotlib, "" for none.
        kind: "line", "bar" (of :attr:`width` around x) or "area" (filled down to 0, in steps).
        width: of bars.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    color: str
    style: str = "-"
    marker: str = ""
    kind: str = "line"
    width: float = 0.35


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: above it.
        x_label: below it; "" where the panel below says it.
        y_label: beside it.
        curves: drawn in this order.
        log_x: whether x is logarithmic.
        y_range: smallest and largest y; None fits the data.
        ticks: positions and texts on the x axis; None leaves them to matplotlib.
        levels: horizontal dotted lines with their labels in the legend.
        marks: vertical lines (x, color).
    """

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    log_x: bool = False
    y_range: tuple[float, float] | None = None
    ticks: Sequence[tuple[float, str]] | None = None
    levels: Sequence[tuple[float, str]] = ()
    marks: Sequence[tuple[float, str]] = field(default=())


_WIDTH, _HEIGHT, _HEAD, _SPACE_X, _SPACE_Y, _LEFT, _BOTTOM, _LEAST = 3.0, 1.9, 1.35, 0.75, 0.85, 0.85, 0.65, 7.5
"""Inches: a panel, the head of the figure, what lies between panels, the margins, the least width of a figure."""


def draw_panels(title: str, subtitle: str, rows: Sequence[Sequence[Panel]]) -> bytes:
    """A PNG of rows of panels.

    Args:
        title: of the figure.
        subtitle: one line below it.
        rows: at least one, each with at least one panel.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(len(row) for row in rows)
    gaps = _LEFT + (columns - 1) * _SPACE_X + 0.3
    broad = max(_WIDTH, (_LEAST - gaps) / columns)
    width = gaps + columns * broad
    height = _HEAD + len(rows) * _HEIGHT + (len(rows) - 1) * _SPACE_Y + _BOTTOM
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.25 / width, 1 - 0.34 / height, title, fontsize=15, fontweight="bold", color=INK, va="center")
    figure.text(0.25 / width, 1 - 0.63 / height, subtitle, fontsize=10, color=GREY, va="center")
    handles: dict[str, Any] = {}
    for i, row in enumerate(rows):
        bottom = height - _HEAD - (i + 1) * _HEIGHT - i * _SPACE_Y
        for j, panel in enumerate(row):
            left = _LEFT + j * (broad + _SPACE_X)
            axes = figure.add_axes((left / width, bottom / height, broad / width, _HEIGHT / height))
            for label, handle in _draw(axes, panel).items():
                handles.setdefault(label, handle)
    if handles:
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="center left",
            bbox_to_anchor=(0.17 / width, 1 - 0.9 / height),
            ncols=len(handles),
            frameon=False,
            fontsize=9.5,
            handlelength=1.6,
            columnspacing=1.4,
            labelcolor=INK,
        )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw(axes: Any, panel: Panel) -> dict[str, Any]:
    """Draw one panel; what the legend shows for it."""
    handles: dict[str, Any] = {}
    for curve in panel.curves:
        values = [float("nan") if y is None else y for y in curve.y]
        if curve.kind == "bar":
            handle = axes.bar(curve.x, values, curve.width, color=curve.color)
        elif curve.kind == "area":
            axes.fill_between(curve.x, values, step="mid", color=curve.color, alpha=0.22, linewidth=0)
            (handle,) = axes.step(curve.x, values, where="mid", color=curve.color, linewidth=1.4)
        else:
            (handle,) = axes.plot(
                curve.x,
                values,
                color=curve.color,
                linestyle=curve.style or "none",
                marker=curve.marker or None,
                markersize=4 if curve.style else 3,
                linewidth=1.7,
                alpha=1.0 if curve.style else 0.6,
                markeredgewidth=0,
            )
        handles.setdefault(curve.label, handle)
    for level, label in panel.levels:
        handles.setdefault(label, axes.axhline(level, color=GREY, linestyle=":", linewidth=1.2, zorder=0))
    for x, color in panel.marks:
        axes.axvline(x, color=color, linestyle="--", linewidth=1, zorder=0)
    axes.set_title(panel.title, fontsize=10.5, color=INK, loc="left", pad=6)
    axes.set_xlabel(panel.x_label, fontsize=9, color=GREY)
    axes.set_ylabel(panel.y_label, fontsize=9, color=GREY)
    if panel.log_x:
        axes.set_xscale("log")
    if panel.ticks is not None:
        axes.set_xticks([x for x, _ in panel.ticks], [text for _, text in panel.ticks])
        axes.minorticks_off()
    if panel.y_range is not None:
        axes.set_ylim(*panel.y_range)
    axes.tick_params(labelsize=8.5, color=EDGE, labelcolor=INK)
    axes.grid(True, axis="y", color="#eaeef2", linewidth=0.8)
    axes.set_axisbelow(True)
    for name, spine in axes.spines.items():
        spine.set(color=EDGE, linewidth=0.8, visible=name in ("left", "bottom"))
    return handles
