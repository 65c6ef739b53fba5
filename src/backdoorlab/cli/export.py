"""``backdoorlab export``: the poisoned data of a stored attack as plain files."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from backdoorlab.cli import options as opt
from backdoorlab.cli.console import out, print_json, shown
from backdoorlab.cli.helppage import HelpCommand
from backdoorlab.core.errors import InputError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("export", cls=HelpCommand)(export_command)


def export_command(
    run: Annotated[str, typer.Argument(help="A stored attack: (the start of) its key, or its folder.", metavar="RUN")],
    folder: Annotated[
        str | None,
        typer.Option("--out", help="New folder for the files; it appears whole or not at all.", metavar="DIR"),
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="What to write: folder (png, wav, csv), npz (arrays; jsonl for text) or both.",
            metavar="FORMAT",
        ),
    ] = "both",
    only: Annotated[
        str,
        typer.Option(help="Which samples to write: all, or poisoned, which leaves out clean ones.", metavar="WHICH"),
    ] = "all",
    force: Annotated[
        bool, typer.Option("--force", help="Replace an earlier export in DIR, if nobody changed it.")
    ] = False,
    store: opt.StoreOption = "",
    root: opt.RootOption = None,
    download: opt.DownloadOption = False,
    as_json: opt.JsonOption = False,
) -> None:
    """Write an attack's poisoned training set and its triggered test samples as plain files.

    Images become DIR/train/CLASS/INDEX.png under their poisoned label, beside roles.csv (which samples are poisoned,
    and their true labels) and npz arrays; sound becomes wav, text csv and jsonl, video npz. DIR can be used again as
    --dataset folder:DIR (text: csv:DIR).

    Try:

      backdoorlab export 3f2a --out poisoned

      backdoorlab export 3f2a --out poisoned --format npz --only poisoned

      backdoorlab attack none --dataset folder:poisoned
    """
    if folder is None:
        raise InputError("export: expected --out DIR, the folder for the exported data")
    place = opt.output_folder(folder, "--out")
    opt.existing_store(store)
    from backdoorlab.benchmark.export import export_run
    from backdoorlab.cli.attack import make_runner

    card = export_run(make_runner(store, "cpu", root, download), run, place, form=form, only=only, force=force)
    if as_json:
        print_json(card | {"folder": str(place)})
    else:
        _print_export(card, place)


def _print_export(card: dict[str, Any], folder: Path) -> None:
    title = shown(f"{card['dataset']['name']} / {card['attack']}", "bold")
    out.print(Text.assemble(title, f"   {card['run']}"), soft_wrap=True)
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("part")
    for name in ("samples", "clean", "backdoor", "cover"):
        table.add_column(name, justify="right", style="bold cyan" if name == "samples" else "")
    for part, counts in card["counts"].items():
        table.add_row(part.replace("_", " "), *(str(n) for n in counts.values()))
    out.print(table)
    if card["replay"]:
        out.print(Text.assemble(("replay: ", "bold yellow"), card["replay_note"]))
    out.print(Text.assemble(("folder  ", "dim"), shown(folder)), soft_wrap=True)
    if card["loads_as"]:
        again = f"backdoorlab attack none --dataset {shlex.quote(card['loads_as'] + str(folder))}"
    else:
        again = f"not readable as a data set of this library: {card['loads_as_note']}"
    out.print(Text.assemble(("again   ", "dim"), shown(again)), soft_wrap=True)
