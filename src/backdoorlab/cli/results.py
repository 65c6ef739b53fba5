"""``backdoorlab results``: what the store holds, run by run or summed up over seeds."""

from __future__ import annotations

import csv
import json
import sys
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from backdoorlab.cli import options as opt
from backdoorlab.cli.console import complain, number, out, print_json
from backdoorlab.core.errors import InputError

_SHOWN = (
    "key",
    "dataset",
    "model",
    "attack",
    "defense",
    "seed",
    "status",
    "acc",
    "asr",
    "ra",
    "der",
    "auroc",
    "verdict",
)

_FOLDED = ("dataset", "model", "seed")
"""Columns that are told once, above the table, if all rows agree."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("results")(results_command)


def results_command(
    group_by: Annotated[
        str | None, typer.Option(help="Columns, comma-separated, such as attack,defense.", metavar="COLUMNS")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="What to average: acc, asr, ra, der, ...", metavar="NAME")] = None,
    store: opt.StoreOption = "",
    as_json: opt.JsonOption = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated values.")] = False,
) -> None:
    """Show stored runs, or means over seeds.

    With --group-by or --metric: means over seeds with 95 % bootstrap intervals.

    Try:

      backdoorlab results

      backdoorlab results --group-by defense --metric der

      backdoorlab results --csv > runs.csv
    """
    if as_json and as_csv:
        raise InputError("--json and --csv exclude each other; give one of them")
    path = opt.existing_store(store)
    from backdoorlab.benchmark import Results, Store
    from backdoorlab.benchmark.results import DEFAULT_GROUP

    found = Results(Store(path))
    grouped = group_by is not None or metric is not None
    columns: tuple[str, ...] = DEFAULT_GROUP
    if group_by is not None:
        columns = tuple(part.strip() for part in group_by.split(",") if part.strip())
        if not columns:
            raise InputError(f"--group-by: expected column names such as attack,defense, got {group_by!r}")
    rows = found.table(metric or "asr", columns) if grouped else found.rows()
    for refusal in found.refusals:
        complain(f"{refusal.path}: {refusal.reason}", label="left out: ")
    if as_json:
        print_json(rows)
    elif as_csv:
        _print_csv(rows)
    elif not rows:
        out.print(f"no runs in {path}; make one with: backdoorlab attack badnets", highlight=False, soft_wrap=True)
    elif grouped:
        _print_table(rows, tuple(rows[0]), f"mean {metric or 'asr'} over seeds, 95 % bootstrap interval")
    else:
        alike = [c for c in _FOLDED if len({row[c] for row in rows}) == 1]
        used = tuple(c for c in _SHOWN if c not in alike and any(row.get(c) not in (None, "ok") for row in rows))
        _print_table(rows, used, "   ".join(f"{c}: {rows[0][c]}" for c in alike) or None)


def _print_csv(rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([json.dumps(v) if isinstance(v, (list, dict)) else v for v in (row.get(c) for c in columns)])


def _print_table(rows: list[dict[str, Any]], columns: tuple[str, ...], title: str | None) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title=title, title_justify="left")
    for column in columns:
        numeric = any(isinstance(row.get(column), (int, float)) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", no_wrap=column in ("key", "defense", "attack"),
                         style="cyan" if column == "key" else "")  # fmt: skip
    for row in rows:
        table.add_row(*(Text(str(row["key"])[:8] if c == "key" else number(row.get(c))) for c in columns))
    out.print(table)
