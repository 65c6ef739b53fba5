"""``backdoorlab results``: what the store holds, run by run or summed up over seeds."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.cells import cell_len
from rich.table import Table

from backdoorlab.cli import options as opt
from backdoorlab.cli.console import complain, number, out, print_csv, print_json, shown
from backdoorlab.cli.helppage import HelpCommand
from backdoorlab.core.errors import InputError
from backdoorlab.core.foreign import visible

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

_BESIDE = {
    "dataset": "dataset",
    "model": "model",
    "recipe": "recipe",
    "attack": "attack",
    "poison_rate": "rate",
    "defense": "defense",
    "n": "n",
    **{
        f"{before}{name}{after}": f"{short}{name}"
        for name in ("acc", "asr", "ra")
        for before, after, short in (("", "", ""), ("published_", "", "p."), ("", "_difference", "d."))
    },
}
"""Columns of --published, and their heads."""

_FOLDED = ("dataset", "model", "seed")
"""Columns that are shown once, above the table, if all rows agree."""

_MANY = 200
"""Rows above which the table is plain text: fitting a table to the window takes a millisecond per row."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("results", cls=HelpCommand)(results_command)


def results_command(
    group_by: Annotated[
        str | None,
        typer.Option(help="Columns to group by, comma-separated, such as attack,defense.", metavar="COLUMNS"),
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="Metric to average: acc, asr, ra, der, ...", metavar="NAME")
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Show the runs that the public leaderboard has too, beside its numbers.")
    ] = False,
    store: opt.StoreOption = "",
    as_json: opt.JsonOption = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated values.")] = False,
) -> None:
    """Show stored runs, or means over seeds.

    With --group-by or --metric: means over seeds with 95 % bootstrap intervals.

    With --published: the numbers of BackdoorBench's leaderboard for the same data set, attack, poison rate and defense,
    and ours minus theirs. Runs on a network that it lacks stand beside its PreAct-ResNet18.

    Try:

      backdoorlab results

      backdoorlab results --group-by defense --metric der

      backdoorlab results --published

      backdoorlab results --csv > runs.csv
    """
    if as_json and as_csv:
        raise InputError("--json and --csv exclude each other; give one of them")
    if published and (group_by is not None or metric is not None):
        raise InputError("--published has a row for each setting already; leave out --group-by and --metric")
    columns = _columns(group_by)
    opened = opt.existing_store(store)
    from backdoorlab.benchmark.published import SOURCE, beside
    from backdoorlab.benchmark.results import DEFAULT_GROUP, Results

    results = Results(opened)
    grouped, mean = group_by is not None or metric is not None, "asr" if metric is None else metric
    rows = results.table(mean, columns or DEFAULT_GROUP) if grouped else results.rows()
    some = bool(rows)
    rows = beside(rows) if published else rows
    for refusal in results.refusals:
        reason = refusal.reason
        complain(reason if refusal.path in reason else f"{refusal.path}: {reason}", label="left out: ")
    if as_json:
        print_json(rows)
    elif as_csv:
        _print_csv(rows)
    elif some and not rows:
        out.print(shown(f"none of these runs has a counterpart in: {SOURCE}"), soft_wrap=True)
    elif not rows:
        where = getattr(opened, "url", opened.root)
        out.print(shown(f"no runs in {where}; make one with: backdoorlab attack badnets"), soft_wrap=True)
    elif published:
        _print_beside(rows, SOURCE)
    elif grouped:
        _print_table(rows, tuple(rows[0]), f"mean {mean} over seeds, 95 % bootstrap interval")
    else:
        alike = [c for c in _FOLDED if len({row[c] for row in rows}) == 1]
        used = tuple(c for c in _SHOWN if c not in alike and any(row.get(c) not in (None, "ok") for row in rows))
        _print_table(rows, used, "   ".join(f"{c}: {rows[0][c]}" for c in alike) or None)


def _columns(group_by: str | None) -> tuple[str, ...]:
    """The columns of --group-by; none if it was not given.

    Raises:
        InputError: if it names none.
    """
    columns = tuple(part.strip() for part in (group_by or "").split(",") if part.strip())
    if group_by is not None and not columns:
        raise InputError(f"--group-by: expected column names such as attack,defense, got {group_by!r}")
    return columns


def _print_csv(rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    print_csv(columns, ([_plain(row.get(c)) for c in columns] for row in rows))


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (list, dict)) else value


def _print_beside(rows: list[dict[str, Any]], source: str) -> None:
    folded = [c for c in ("dataset", "model", "recipe") if len({row[c] for row in rows}) == 1]
    short = [{_BESIDE[name]: row[name] for name in _BESIDE if name not in folded} for row in rows]
    out.print(shown(f"p.: published ({source}); d.: ours minus theirs"), soft_wrap=True)
    _print_table(short, tuple(short[0]), "   ".join(f"{c}: {rows[0][c]}" for c in folded) or None)


def _print_table(rows: list[dict[str, Any]], columns: tuple[str, ...], title: str | None) -> None:
    right = [any(isinstance(row.get(column), (int, float)) for row in rows) for column in columns]
    cells = [[visible(str(row["key"])[:8] if c == "key" else number(row.get(c))) for c in columns] for row in rows]
    if len(rows) > _MANY:
        _print_lines([list(columns), *cells], right, title)
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title_justify="left")
    table.title = shown(title) if title else None
    for column, numeric in zip(columns, right, strict=True):
        table.add_column(
            shown(column),
            justify="right" if numeric else "left",
            no_wrap=column in ("key", "defense", "attack") or column.startswith(("p.", "d.")),
            style="cyan" if column == "key" else "",
        )
    for line in cells:
        table.add_row(*map(shown, line))
    out.print(table)


def _print_lines(lines: list[list[str]], right: list[bool], title: str | None) -> None:
    """The same columns as wide as their content, for pipes and pagers."""
    lengths = [[len(cell) if cell.isascii() else cell_len(cell) for cell in line] for line in lines]
    widths = [max(column) for column in zip(*lengths, strict=True)]
    printed = [visible(title)] if title else []
    for line, sizes in zip(lines, lengths, strict=True):
        padded = []
        for cell, size, width, numeric in zip(line, sizes, widths, right, strict=True):
            space = " " * (width - size)
            padded.append(space + cell if numeric else cell + space)
        printed.append("  ".join(padded).rstrip())
    print("\n".join(printed))
