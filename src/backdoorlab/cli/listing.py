"""``backdoorlab list``: what there is."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from backdoorlab.cli.console import out, print_json, shown
from backdoorlab.cli.helppage import HelpCommand
from backdoorlab.cli.options import JsonOption
from backdoorlab.core.errors import InputError, unknown
from backdoorlab.core.foreign import markdown_cell

KINDS = ("attacks", "defenses", "datasets", "models")
MODALITIES = ("image", "text", "audio", "video", "diffusion")

_SHOWN = {
    "attacks": ("name", "year", "modalities", "threat_model", "label_mode", "trigger_visibility", "paper"),
    "defenses": ("name", "year", "modalities", "stage", "needs_clean_fraction", "paper"),
    "datasets": ("name", "modalities", "summary"),
    "models": ("name", "modalities", "summary"),
}
_HEADS = {
    "threat_model": "threat",
    "label_mode": "labels",
    "trigger_visibility": "trigger",
    "needs_clean_fraction": "clean data",
}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("list", cls=HelpCommand)(list_command)


def list_command(
    kind: Annotated[str, typer.Argument(metavar="attacks|defenses|datasets|models", help="What to list.")],
    modality: Annotated[
        str | None, typer.Option(help="Modality to list: image, text, audio, video or diffusion.", metavar="MODALITY")
    ] = None,
    as_json: JsonOption = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table, for documents.")] = False,
) -> None:
    """List attacks, defenses, data sets or models.

    Try:

      backdoorlab list attacks --modality text

      backdoorlab list defenses --json

    Every timm name also works as an image model, and folder:PATH or csv:PATH as a data set.
    """
    if as_json and markdown:
        raise InputError("--json and --markdown exclude each other; give one of them")
    if kind not in KINDS:
        raise unknown("kind of thing", kind, KINDS)
    if modality is not None and modality not in MODALITIES:
        raise unknown("modality", modality, MODALITIES)
    rows = [row for row in _rows(kind) if modality is None or modality in row["modalities"]]
    if as_json:
        print_json(rows)
        return
    if markdown:
        out.print(markdown_table(kind, rows), soft_wrap=True, markup=False, highlight=False)
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in _SHOWN[kind]:
        table.add_column(
            _HEADS.get(column, column),
            style="cyan" if column == "name" else "",
            no_wrap=column not in ("paper", "summary", "modalities"),
        )
    for row in rows:
        table.add_row(*map(shown, _cells(kind, row)))
    out.print(table)
    if kind in ("attacks", "defenses"):
        verb = "attack" if kind == "attacks" else "defend"
        out.print(f"\n{len(rows)} {kind}. Details: backdoorlab {verb} NAME --help", style="dim")


def markdown_table(kind: str, rows: list[dict[str, Any]]) -> str:
    """The same columns as a Markdown table."""
    heads = [_HEADS.get(column, column) for column in _SHOWN[kind]]
    lines = [heads, ["---"] * len(heads), *(_cells(kind, row) for row in rows)]
    return "\n".join("| " + " | ".join(map(markdown_cell, line)) + " |" for line in lines)


def _cells(kind: str, row: dict[str, Any]) -> list[str]:
    """One row as it is shown; aliases stand beside the name."""
    cells = {column: _cell(column, row.get(column)) for column in _SHOWN[kind]}
    cells["name"] = " = ".join((cells["name"], *row.get("aliases", ())))
    return [*cells.values()]


def _rows(kind: str) -> list[dict[str, Any]]:
    if kind == "attacks":
        from backdoorlab.attacks import attacks

        return [cls.facts() for cls in attacks]
    if kind == "defenses":
        from backdoorlab.defenses import defenses

        return [cls.facts() for cls in defenses]
    if kind == "datasets":
        from backdoorlab.data.sources import datasets

        return [
            {
                "name": s.name,
                "modalities": list(s.modalities),
                "summary": s.summary,
                "download_url": s.download_url or None,
            }
            for s in datasets
        ]
    from backdoorlab.models import models

    return [{"name": m.name, "modalities": list(m.modalities), "summary": m.summary} for m in models]


def _cell(column: str, value: Any) -> str:
    if column == "needs_clean_fraction":
        return f"{value:.0%}" if value else "none"
    return ", ".join(value) if isinstance(value, list) else str(value)
