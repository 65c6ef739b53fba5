"""``backdoorlab show``: everything that is known about one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from backdoorlab.cli import options as opt
from backdoorlab.cli.console import complain, out, print_json, shown
from backdoorlab.cli.helppage import HelpCommand
from backdoorlab.core.errors import InputError
from backdoorlab.core.paths import exists

if TYPE_CHECKING:
    from torch import Tensor

    from backdoorlab.benchmark import Card, Runner, StoredRun
    from backdoorlab.data.split import Inputs

FIGURES = (".png", ".pdf", ".svg")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("show", cls=HelpCommand)(show_command)


def show_command(
    run: Annotated[str, typer.Argument(help="A stored run: (the start of) its key, or its folder.", metavar="RUN")],
    figure: Annotated[
        str | None,
        typer.Option(
            help="Also draw clean images, triggered images and their magnified difference.", metavar="OUT.png"
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the figure if there is one.")] = False,
    samples: Annotated[int, typer.Option(min=1, max=20, help="Samples in the figure.", metavar="N")] = 8,
    store: opt.StoreOption = "",
    root: opt.RootOption = None,
    download: opt.DownloadOption = False,
    as_json: opt.JsonOption = False,
) -> None:
    """Show a run's result card: numbers, specification, timing, and the command that makes it again.

    Try:

      backdoorlab show 3f2a

      backdoorlab show 3f2a --figure trigger.png

      backdoorlab show 3f2a --json | jq .metrics
    """
    picture = None if figure is None else _figure_place(figure, force)
    stored = opt.existing_store(store).find(run)
    card = stored.card()
    drawn = None
    if picture is not None:
        from backdoorlab.cli.attack import make_runner

        drawn = _draw(make_runner(store, "cpu", root, download), stored, picture, samples)
    if as_json:
        print_json(card.model_dump() | ({"visibility": drawn} if drawn else {}))
        return
    with stored.rebuilding("card.json"):
        _print_run(stored, card)
    if drawn is not None:
        psnr = "unchanged" if drawn["psnr"] is None else f"PSNR {drawn['psnr']:.1f} dB"
        _heading("trigger")
        out.print(f"  {psnr}, SSIM {drawn['ssim']:.3f}, L-infinity {drawn['linf']} of 255", highlight=False)
        out.print(shown(f"  figure: {picture}"), soft_wrap=True)
    if card.status != "ok":
        complain(card.reason or "", label=f"{card.status.replace('_', ' ')}: ")


def _figure_place(figure: str, force: bool) -> Path:
    """Where the figure goes.

    Raises:
        InputError: for a type that cannot be drawn, a place that cannot be written, or a file that is there already.
    """
    path = opt.output_file(figure, "--figure")
    if path.suffix.lower() not in FIGURES:
        suffix = path.suffix or "a file without suffix"
        raise InputError(f"--figure: cannot draw {suffix}; expected {', '.join(FIGURES)}")
    if exists(path) and not force:
        raise InputError(f"--figure: {path} exists; choose another name or pass --force to replace it")
    return path


def _draw(runner: Runner, stored: StoredRun, figure: Path, samples: int) -> dict[str, Any]:
    from dataclasses import asdict

    from backdoorlab.analysis.figures import draw_trigger
    from backdoorlab.attacks.result import Backdoor
    from backdoorlab.attacks.triggers.base import stamp_all

    if stored.stage != "attack":
        raise InputError(f"--figure: {stored.id} has no trigger to draw; give an attack's run{_parent_hint(stored)}")
    with stored.rebuilding():
        record = stored.record()
        kind = record.get("backdoor")
        modality = record["model"]["modality"]["name"] if kind == Backdoor.kind else kind
    if modality != "image":
        raise InputError(f"--figure draws image triggers; {stored.id} is an attack on {modality} data")
    task, backdoor = runner.load_classification(stored)
    chosen = backdoor.target_map.eligible(task.test.labels).nonzero().flatten()[:samples]
    clean = task.test[chosen].inputs
    triggered = stamp_all(backdoor.trigger, clean)
    name = str(stored.card().spec["attack"]["name"])
    return asdict(draw_trigger(figure, name, pictures(clean), pictures(triggered)))


def pictures(inputs: Inputs) -> Tensor:
    """Raw samples that can be drawn.

    Raises:
        InputError: for texts.
    """
    from torch import Tensor

    if not isinstance(inputs, Tensor):
        raise InputError("a figure needs images, got texts")
    return inputs


def _parent_hint(stored: StoredRun) -> str:
    parents = [p for p in stored.card().parents if p.startswith("attack/")]
    return f", such as {parents[0]}" if parents else ""


def _print_run(stored: StoredRun, card: Card) -> None:
    from backdoorlab.cli.outcome import metrics_table, title_of, total_seconds

    out.print(Text.assemble(shown(title_of(card), "bold"), f"   {card.status}"), soft_wrap=True)
    out.print(shown(f"run {card.id}   {stored.path}", "dim"), soft_wrap=True)
    _heading("metrics")
    out.print(metrics_table(card))
    for kind in ("attack", "defense"):
        method = card.spec.get(kind)
        if method:
            _heading(f"{kind}: {method['name']}")
            _pairs(method["settings"])
    task, resolved = card.spec["task"], card.spec.get("resolved", {})
    _heading("task")
    data = {f"data {k}" if k in ("name", "seed") else k: v for k, v in task["dataset"].items() if v is not None}
    _pairs(
        data | {"model": task["model"], "run seed": card.spec["seed"], "clean fraction": card.spec["clean_fraction"]}
    )
    _heading(f"recipe: {task['recipe']}")
    _pairs({k: v for k, v in resolved.get("recipe", {}).items() if k != "name"})
    if card.notes:
        _heading("notes")
        _pairs(card.notes)
    _heading("cost")
    _pairs(
        {f"{k} (s)": round(v, 2) for k, v in card.seconds.items()}
        | {
            "all (s)": round(total_seconds(card), 2),
            "peak memory (MB)": card.peak_memory_mb,
            "made": card.created,
            "commit": card.commit or "–",
        }
    )
    _heading("again")
    out.print(shown(f"  {card.command}"), soft_wrap=True)


def _heading(text: str) -> None:
    out.print()
    out.print(shown(text, "bold cyan"))


def _pairs(values: dict[str, Any]) -> None:
    """Two pairs a line where they are short."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
    items = [(f"  {k.replace('_', ' ')}", _short(v)) for k, v in values.items()]
    wide = any(len(v) > 30 for _, v in items)
    step = 1 if wide else 2
    for _ in range(step):
        table.add_column(style="dim")
        table.add_column(overflow="fold")
    for start in range(0, len(items), step):
        table.add_row(*(shown(cell) for pair in items[start : start + step] for cell in pair))
    out.print(table)


def _short(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)
