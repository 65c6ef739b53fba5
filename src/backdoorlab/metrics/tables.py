"""Metrics as objects that print and display themselves."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from backdoorlab.metrics.classification import defense_effectiveness, robust_improvement

COLUMNS = {"acc": "ACC", "asr": "ASR", "ra": "RA", "der": "DER", "rir": "RIR"}
"""Metrics of a table's columns, with their names; a column without any value is left out."""


@dataclass(frozen=True)
class Evaluation:
    """What a model does with clean and with triggered test samples.

    Attributes:
        title: what was measured.
        values: metrics by name: acc, asr, ra in [0, 1] (None where there are no samples), n_clean, n_triggered, ...
    """

    title: str
    values: Mapping[str, Any] = field(repr=False)

    @property
    def acc(self) -> float | None:
        """Share of clean test samples classified correctly."""
        return self.values.get("acc")

    @property
    def asr(self) -> float | None:
        """Share of triggered test samples classified as the attacker wants; None for a benign model."""
        return self.values.get("asr")

    @property
    def ra(self) -> float | None:
        """Share of the same samples classified as their true label; None for a benign model."""
        return self.values.get("ra")

    def __repr__(self) -> str:
        shown = [f"{words} {_cell(self.values[k])}" for k, words in COLUMNS.items() if self.values.get(k) is not None]
        counts = [
            f"{self.values[k]} {what}"
            for k, what in (("n_clean", "clean"), ("n_triggered", "triggered"))
            if self.values.get(k) is not None
        ]
        return f"{self.title}: {', '.join(shown) or 'nothing measured'} ({', '.join(counts)} test samples)"

    def _repr_html_(self) -> str:
        return Comparison((self,))._repr_html_()


@dataclass(frozen=True)
class Comparison:
    """Several evaluations on the same test samples, one a row; DER and RIR compare with the first."""

    rows: tuple[Evaluation, ...]

    def records(self) -> list[dict[str, Any]]:
        """One flat record per row, as for a data frame."""
        return [{"model": row.title, **{k: row.values.get(k) for k in COLUMNS}} for row in self.rows]

    def __repr__(self) -> str:
        head, *body = self._cells()
        widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
        return "\n".join(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in (head, *body)
        )

    def _repr_html_(self) -> str:
        head, *body = self._cells()
        top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line)}</tr>" for line in body)
        return f"<table><thead><tr>{top}</tr></thead><tbody>{rows}</tbody></table>"

    def _cells(self) -> list[list[str]]:
        kept = [k for k in COLUMNS if any(row.values.get(k) is not None for row in self.rows)]
        body = [[row.title, *(_cell(row.values.get(k)) for k in kept)] for row in self.rows]
        return [["model", *(COLUMNS[k] for k in kept)], *body]


def compared(before: Evaluation, after: Sequence[Evaluation]) -> Comparison:
    """Put DER and RIR beside the metrics of defended models.

    Args:
        before: the undefended model.
        after: defended models, measured on the same samples.
    """
    rows = [before]
    for row in after:
        extra: dict[str, Any] = {}
        if before.acc is not None and row.acc is not None:
            if before.asr is not None and row.asr is not None:
                extra["der"] = defense_effectiveness(before.acc, before.asr, row.acc, row.asr)
            if before.ra is not None and row.ra is not None:
                extra["rir"] = robust_improvement(before.acc, before.ra, row.acc, row.ra)
        rows.append(Evaluation(row.title, {**row.values, **extra}))
    return Comparison(tuple(rows))


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
