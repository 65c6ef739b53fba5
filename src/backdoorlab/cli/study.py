"""``backdoorlab study``: reproduce a paper's study cell by cell."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from backdoorlab.cli import options as opt
from backdoorlab.cli.console import complain, err, number, out, print_csv, print_json, shown
from backdoorlab.cli.helppage import HelpCommand
from backdoorlab.core.errors import InputError, unknown

if TYPE_CHECKING:
    from backdoorlab.benchmark.studies import Outcome, Planned

NAMES = ("abl", "linf")

_HEADS = {
    "abl": {
        "attack": "attack",
        "cell": "cell",
        "status": "status",
        "acc": "ACC",
        "asr": "ASR",
        "der": "DER",
        "precision": "precision",
        "precision_0.005": "at 0.5 %",
        "precision_0.01": "at 1 %",
        "precision_0.05": "at 5 %",
        "precision_0.2": "at 20 %",
        "auroc": "AUROC",
        "loss_clean": "clean",
        "loss_poisoned": "poison",
    },
    "linf": {
        "attack": "attack",
        "cell": "cell",
        "status": "status",
        "acc": "ACC",
        "asr": "ASR",
        "der": "DER",
        "fraction": "pruned",
        "auroc_l1_max_backdoored": "AUROC l1",
        "auroc_l2_max_backdoored": "l2",
        "auroc_linf_max_backdoored": "linf",
        "heat_on_trigger_triggered_backdoored": "heat",
        "trigger_area": "area",
    },
}
"""Columns on the terminal with their heads; --json and --csv have all."""
_TITLES = {
    "abl": "isolation: precision at isolation rates, AUROC, and mean loss by role at the turning epoch",
    "linf": "backdoored model: AUROC of the largest norm for triggered inputs, Grad-CAM on the trigger, pruning",
}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("study", cls=HelpCommand)(study_command)


def study_command(
    name: Annotated[str | None, typer.Argument(help="The study: abl or linf.", metavar="NAME")] = None,
    dataset: Annotated[
        str, typer.Option(help="Data set: one of `backdoorlab list datasets`.", metavar="NAME")
    ] = "digits",
    attacks: Annotated[
        str | None,
        typer.Option(
            help="Attacks, comma-separated; `paper` takes all that the source names and that serve the data. "
            "Default: badnets,blended.",
            metavar="NAMES",
        ),
    ] = None,
    parts: Annotated[
        str | None,
        typer.Option(
            help="Parts, comma-separated. abl: isolation, unlearning, rate, turning. linf: norms, pruning, defense. "
            "Default: all.",
            metavar="NAMES",
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Architecture: one of `backdoorlab list models`, or any timm name.", metavar="NAME")
    ] = "auto",
    recipe: Annotated[
        str, typer.Option(help="Training recipe: reference, fast (minutes) or smoke (seconds).", metavar="NAME")
    ] = "smoke",
    recipe_set: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe-set",
            help="Change a field of the training recipe, such as epochs=5; repeatable.",
            metavar="KEY=VALUE",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Change a hyper-parameter of the studied defense in all cells; repeatable.",
            metavar="KEY=VALUE",
        ),
    ] = None,
    train_size: Annotated[
        int | None, typer.Option(help="Training samples to use, a class-balanced subset.", metavar="N")
    ] = None,
    test_size: Annotated[
        int | None, typer.Option(help="Test samples to use, a class-balanced subset.", metavar="N")
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Height and width of images in pixels, for data sets of any size.", metavar="PX")
    ] = None,
    seed: opt.SeedOption = 0,
    plan: Annotated[
        bool, typer.Option("--plan", help="List the cells and which of them are done; run nothing.")
    ] = False,
    folder: Annotated[str | None, typer.Option("--out", help="Folder for the figures (PNG).", metavar="DIR")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace figures of the same name in DIR.")] = False,
    device: opt.DeviceOption = "auto",
    store: opt.StoreOption = "",
    root: opt.RootOption = None,
    download: opt.DownloadOption = False,
    as_json: opt.JsonOption = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated values.")] = False,
) -> None:
    """Reproduce a paper's study: every cell stored, a table, figures.

    abl: are poisoned samples learned faster, whom does anti-backdoor learning isolate, what does unlearning need?
    linf: which norm of a feature map shows a trigger, and what does pruning by it do?

    Interrupt it with Ctrl-C whenever you like: the same command goes on where it stopped. A failed cell does not stop
    the others; the exit code is 1 if there was one.

    Try:

      backdoorlab study abl --out figures                         (embedded digits, minutes)

      backdoorlab study abl --dataset cifar10 --recipe fast --attacks paper --plan

      backdoorlab study linf --attacks badnets,sig --parts norms --csv
    """
    if name is None:
        raise InputError(f"study: which one? Expected NAME, one of: {', '.join(NAMES)}")
    if name not in NAMES:
        raise unknown("study", name, NAMES)
    if as_json and as_csv:
        raise InputError("--json and --csv exclude each other; give one of them")
    place = None if folder is None else opt.output_folder(folder, "--out")
    from backdoorlab.benchmark.spec import task_spec
    from backdoorlab.benchmark.studies import STUDIES, StudyOptions, plan_study, run_study
    from backdoorlab.cli.attack import make_runner

    task = task_spec(
        dataset,
        size=size,
        train_size=train_size,
        test_size=test_size,
        model=model,
        recipe=recipe,
        recipe_changes=opt.pairs(recipe_set, "--recipe-set"),
    )
    options = StudyOptions(task, _names(attacks, "--attacks"), opt.pairs(settings), _names(parts, "--parts"), seed)
    study = STUDIES[name](options=options)
    study.check()
    runner = make_runner(store, device, root, download)
    planned = plan_study(study, runner)
    if plan:
        _print_plan(name, planned, as_json, as_csv)
        return
    if place is not None:
        _check_free(place, study.figure_names(planned), force)
    count = 0

    def on_cell(outcome: Outcome) -> None:
        nonlocal count
        count += 1
        line = f"[{count}/{len(planned)}] {outcome.cell.attack} / {outcome.cell.label}: {_brief(outcome)}"
        err.print(shown(f"{line}{'  (stored)' if outcome.reused else ''}"), soft_wrap=True)

    outcomes = run_study(planned, runner, on_cell)
    rows = study.rows(outcomes, runner)
    drawn = [] if place is None else _write(place, study.figures(outcomes, runner))
    if as_json:
        print_json({"study": name, "cells": rows, "figures": [str(path) for path in drawn]})
    elif as_csv:
        columns = list(rows[0])
        print_csv(columns, ([_plain(row[c]) for c in columns] for row in rows))
    else:
        measured = [row["stage"].startswith("asset/") for row in rows]
        for title, wanted in ((f"study {name}: {study.about()}", False), (_TITLES[name], True)):
            _print_table([r for r, m in zip(rows, measured, strict=True) if m is wanted], _HEADS[name], title)
        for path in drawn:
            out.print(shown(f"figure: {path}"), soft_wrap=True)
    bad = [outcome for outcome in outcomes if outcome.status in ("failed", "refused")]
    for outcome in bad:
        complain(f"{outcome.cell.attack} / {outcome.cell.label}: {outcome.reason}", label=f"{outcome.status} ")
    if bad:
        raise typer.Exit(1)


def _names(text: str | None, option: str) -> tuple[str, ...]:
    """Names that a user separated by commas; none if the option was not given.

    Raises:
        InputError: if it names none.
    """
    names = tuple(part.strip() for part in (text or "").split(",") if part.strip())
    if text is not None and not names:
        raise InputError(f"{option}: expected names such as badnets,blended, got {text!r}")
    return names


def _check_free(place: Path, names: Sequence[str], force: bool) -> None:
    """No figure that is there is replaced unless asked for; looked at before hours of work.

    Raises:
        InputError: naming the first one in the way.
    """
    from backdoorlab.core.paths import exists, is_folder

    there = [place / name for name in names if exists(place / name)]
    folders = [path for path in there if is_folder(path)]
    if folders:
        raise InputError(f"--out: {folders[0]} is a folder; a figure would get its name")
    if there and not force:
        more = f" (and {len(there) - 1} more)" if len(there) > 1 else ""
        raise InputError(f"--out: {there[0]} exists{more}; choose another folder, or pass --force to replace")


def _write(place: Path, figures: dict[str, bytes]) -> list[Path]:
    from backdoorlab.data.files import write_atomically

    for name, content in figures.items():
        write_atomically(place / name, content)
    return [place / name for name in figures]


def _brief(outcome: Outcome) -> str:
    if not outcome.ok:
        return f"{outcome.status.replace('_', ' ')}: {outcome.reason}"
    wanted = ("acc", "asr", "precision", "precision_0.01", "auroc")
    parts = [f"{m} {number(outcome.metric(m))}" for m in wanted if outcome.metric(m) is not None]
    return "  ".join(parts) or "measured"


def _print_plan(name: str, planned: Sequence[Planned], as_json: bool, as_csv: bool) -> None:
    rows = [
        {"attack": p.cell.attack, "cell": p.cell.label, "stage": p.stage, "key": p.key, "done": p.done} for p in planned
    ]
    distinct = {(p.stage, p.key): p.done for p in planned}
    done = sum(distinct.values())
    if as_json:
        print_json({"study": name, "cells": rows, "distinct": len(distinct), "done": done})
        return
    if as_csv:
        print_csv(list(rows[0]), (list(row.values()) for row in rows))
        return
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in ("attack", "cell", "stage", "key", "state"):
        table.add_column(column, style="cyan" if column == "key" else "")
    for p in planned:
        cells = (p.cell.attack, p.cell.label, p.stage, p.key[:8], "done" if p.done else "open")
        table.add_row(*map(shown, cells))
    out.print(table)
    same = f" ({len(planned) - len(distinct)} repeat another)" if len(planned) > len(distinct) else ""
    out.print(shown(f"{len(planned)} cells{same}; {done} of {len(distinct)} are done"))


def _print_table(rows: Sequence[dict[str, Any]], heads: dict[str, str], title: str) -> None:
    """The columns that have anything to say."""
    used = [c for c in heads if any(row[c] not in (None, "ok") for row in rows)]
    if not rows:
        return
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in used:
        numeric = any(isinstance(row[column], float) for row in rows)
        table.add_column(heads[column], justify="right" if numeric else "left", no_wrap=column in ("attack", "cell"))
    for row in rows:
        table.add_row(*(shown(number(row[column])) for column in used))
    out.print(shown(title, "bold"), soft_wrap=True)
    out.print(table)
    out.print()


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (list, dict)) else value
