"""``backdoorlab bench``: run a grid of experiments from a YAML file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from backdoorlab.cli import options as opt
from backdoorlab.cli.console import err, number, out, print_json, shown, warn
from backdoorlab.cli.helppage import HelpCommand
from backdoorlab.core.errors import InputError, unknown
from backdoorlab.core.foreign import visible

if TYPE_CHECKING:
    from backdoorlab.benchmark import Card, GridReport, Stage
    from backdoorlab.benchmark.planner import Forecast

ENGINES = ("local",)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("bench", cls=HelpCommand)(bench_command)


def bench_command(
    file: Annotated[str, typer.Argument(help="The grid: tasks x attacks x defenses x seeds.", metavar="FILE.yaml")],
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Reuse results that the store has, or run everything again.")
    ] = True,
    engine: Annotated[str, typer.Option(help="What runs the stages: local, this machine.", metavar="NAME")] = "local",
    device: Annotated[
        str,
        typer.Option(
            help="Where models run: auto, cpu or cuda; a list such as cuda:0,cuda:1 gets a worker each.",
            metavar="DEVICE",
        ),
    ] = "auto",
    only_plan: Annotated[
        bool, typer.Option("--plan", help="Only say what is stored already, and hours and disk for the rest.")
    ] = False,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Begin no stage that is expected to end later than this; the same command goes on with the rest.",
            metavar="NUMBER",
        ),
    ] = None,
    store: opt.StoreOption = "",
    root: opt.RootOption = None,
    download: opt.DownloadOption = False,
    as_json: opt.JsonOption = False,
) -> None:
    """Run a grid of experiments from a YAML file.

    Every attack, every defense against it, every seed; the undefended and the benign rows come along.

    Interrupt it with Ctrl-C whenever you like: the same command goes on where it stopped. A failed cell does not stop
    the others; the exit code is 1 if there was one.

    With --plan nothing runs but a few timed steps of each task. What is known of a method from runs in the store is
    used; the rest is assumed from its kind.

    Try:

      backdoorlab bench configs/quick.yaml

      backdoorlab bench configs/cifar10-cpu.yaml --plan

      backdoorlab bench grid.yaml --store results --json

      backdoorlab results --group-by attack,defense --metric der
    """
    if engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    path = opt.existing_file(file, "grid file")
    from backdoorlab.benchmark import Grid, LocalEngine, plan, run_grid
    from backdoorlab.cli.attack import make_runner
    from backdoorlab.cli.outcome import warnings_of

    grid = Grid.from_yaml(path)
    devices = [str(opt.device_of(name.strip())) for name in device.split(",")]
    runner = make_runner(store, devices[0], root, download)
    stages = plan(grid)
    budget = None
    if only_plan or minutes is not None:
        if minutes is not None and not minutes > 0:
            raise InputError(f"--minutes must be more than 0, got {minutes:g}")
        from backdoorlab.benchmark.planner import Budget, forecast

        costs = forecast(stages, runner)
        if only_plan:
            _print_plan(grid.name, costs, runner.store.root, as_json)
            return
        budget = Budget(costs, 60 * (minutes or 0))
    done = 0

    def on_card(stage: Stage, card: Card, reused: bool) -> None:
        nonlocal done
        done += 1
        line = f"[{done}/{len(stages)}] {stage.label}: {_brief(card)}{'  (stored)' if reused else ''}"
        if reused and not err.is_terminal:  # a finished grid has thousands of such lines, and rich takes its time
            print(visible(line), file=err.file)
        else:
            err.print(shown(line), soft_wrap=True)
        for warning in warnings_of(card) if reused else ():  # those of a new run were printed while it ran
            warn(f"{stage.label}: {warning}")

    report = run_grid(grid, runner, resume=resume, on_card=on_card, engine=LocalEngine(devices, budget))
    summary = _summary(grid.name, len(stages), report)
    if budget is not None:
        summary["postponed"] = len(budget.postponed)
    if as_json:
        print_json(summary)
    else:
        _print_summary(summary)
    if summary["failed"] or summary["refused"]:
        raise typer.Exit(1)


def _print_plan(name: str, costs: Forecast, folder: Path, as_json: bool) -> None:
    free = shutil.disk_usage(next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())).free
    counts = {basis: costs.count(basis) for basis in ("stored", "same setting", "other data", "assumed")}
    refused = [(cost.stage.label, cost.basis) for cost in costs.costs if cost.seconds is None]
    plan = {
        "name": name,
        "stages": len(costs.costs),
        "estimates": counts,
        "hours": costs.seconds / 3600,
        "gigabytes": costs.megabytes / 1024,
        "free_gigabytes": free / 2**30,
        "refused": [{"stage": stage, "reason": reason} for stage, reason in refused],
        "costs": [
            {"stage": c.stage.label, "seconds": c.seconds, "megabytes": c.megabytes, "basis": c.basis}
            for c in costs.costs
        ],
    }
    if as_json:
        print_json(plan)
        return
    out.print(shown(f"{name}: {len(costs.costs)} stages, {counts['stored']} stored"), soft_wrap=True)
    for basis in ("same setting", "other data", "assumed"):
        if counts[basis]:
            hours = sum(c.seconds or 0 for c in costs.costs if c.basis == basis) / 3600
            out.print(shown(f"  {counts[basis]:5d} to run, {hours:8.2f} h ({basis})"), soft_wrap=True)
    needs = f"{costs.seconds / 3600:.2f} h and {costs.megabytes / 1024:.2f} GB; {free / 2**30:.0f} GB are free"
    out.print(shown(f"in all {needs}"), soft_wrap=True)
    for stage, reason in refused:
        out.print(Text.assemble(("cannot be run ", "bold red"), shown(f"{stage}: {reason}")), soft_wrap=True)


def _brief(card: Card) -> str:
    if card.status != "ok":
        return f"{card.status.replace('_', ' ')}: {card.reason}"
    shown = ("acc", "asr", "der", "auroc", "verdict")
    return "  ".join(f"{m} {number(card.metrics[m])}" for m in shown if card.metrics.get(m) is not None)


def _summary(name: str, stages: int, report: GridReport) -> dict[str, Any]:
    cards = report.cards
    runs = [
        {"key": c.key, "stage": c.stage, "status": c.status, "reason": c.reason, "reused": i in report.reused}
        for i, c in sorted(cards.items())
    ]
    counts = {status: sum(c.status == status for c in cards.values()) for status in ("ok", "failed", "not_applicable")}
    refused = [{"stage": stage.label, "reason": message} for stage, message in report.refused]
    return {"name": name, "stages": stages, **counts, "reused": len(report.reused), "refused": refused, "runs": runs}


def _print_summary(summary: dict[str, Any]) -> None:
    counts = ", ".join(f"{summary[k]} {k.replace('_', ' ')}" for k in ("ok", "failed", "not_applicable") if summary[k])
    line = f"{summary['name']}: {summary['stages']} stages: {counts or 'none ran'}; {summary['reused']} were stored"
    out.print(shown(line), soft_wrap=True)
    for item in summary["refused"]:
        reason = shown(f"{item['stage']}: {item['reason']}")
        out.print(Text.assemble(("refused ", "bold red"), reason), soft_wrap=True)
    for run in summary["runs"]:
        if run["status"] == "failed":
            reason = shown(f"{run['stage']}/{run['key'][:8]}: {run['reason']}")
            out.print(Text.assemble(("failed ", "bold red"), reason), soft_wrap=True)
    if summary.get("postponed"):
        out.print(f"{summary['postponed']} stages are left for the next time: run the same command again")
    out.print("next: backdoorlab results", style="dim")
