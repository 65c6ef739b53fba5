"""How one run is printed: as a JSON object for scripts, in a few lines for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table
from rich.text import Text

from backdoorlab.cli.console import complain, number, out, print_json, shown

if TYPE_CHECKING:
    from backdoorlab.benchmark import Card, RunResult

MEANING = {
    "acc": "clean accuracy (ACC)",
    "asr": "attack success rate (ASR)",
    "ra": "robust accuracy (RA)",
    "der": "defense effectiveness rating (DER; 0.5 = nothing happened, 1 = perfect)",
    "rir": "robust improvement rate (RIR; 0.5 = nothing happened)",
    "auroc": "area under the ROC curve of the detector (0.5 = guessing)",
    "tpr": "share of poisoned samples found (TPR)",
    "fpr": "share of clean samples flagged (FPR)",
    "precision": "share of flagged samples that are poisoned",
    "f1": "F1 of the flags",
    "score": "anomaly score of the model",
    "verdict": "verdict on the model",
    "targets": "suspected target classes",
}
"""The metrics of every card, in words."""


def conclude(result: RunResult, as_json: bool) -> None:
    """Print the result of a command that ran one experiment.

    Raises:
        typer.Exit: with code 1 if its status is not "ok".
    """
    card = result.card
    if as_json:
        print_json(as_record(result))
    else:
        print_run(card, result.reused)
    if card.status != "ok":
        complain(card.reason or card.status, label=f"{card.status.replace('_', ' ')}: ")
        raise typer.Exit(1)


def as_record(result: RunResult) -> dict[str, Any]:
    """The flat JSON object of a run."""
    card = result.card
    return {
        "key": card.key,
        "stage": card.stage,
        "status": card.status,
        "reason": card.reason,
        "metrics": card.metrics,
        "warnings": warnings_of(card),
        "seconds": total_seconds(card),
        "reused": result.reused,
        "attack": name_of(card, "attack"),
        "defense": name_of(card, "defense"),
        "digests": card.digests,
        "parents": card.parents,
    }


def warnings_of(card: Card) -> list[str]:
    """What the run's methods warned of."""
    warnings = card.notes.get("warnings")
    return [str(text) for text in warnings] if isinstance(warnings, list) else []


def total_seconds(card: Card) -> float:
    """Wall time of the whole stage."""
    return float(card.seconds["total"] if "total" in card.seconds else sum(card.seconds.values()))


def name_of(card: Card, kind: str) -> str | None:
    """Name of the card's attack or defense."""
    method = card.spec.get(kind)
    return method["name"] if method else None


def title_of(card: Card) -> str:
    """Such as "digits / badnets / ft / seed 0"."""
    task = card.spec["task"]
    parts = [task["dataset"]["name"], task["model"], name_of(card, "attack") or "benign", name_of(card, "defense")]
    return " / ".join([*filter(None, parts), f"seed {card.spec['seed']}"])


def print_run(card: Card, reused: bool) -> None:
    """The run in a few lines: what it is, its numbers, what to do next."""
    stored = "   stored result" if reused else ""
    out.print(Text.assemble(shown(title_of(card), "bold"), (stored, "dim")), soft_wrap=True)
    out.print(metrics_table(card))
    for warning in warnings_of(card) if reused else ():  # those of a new run were printed while it ran
        out.print(Text.assemble(("warning: ", "bold yellow"), shown(warning)), soft_wrap=True)
    ending = f"run {card.key}, {total_seconds(card):.1f} s, {card.status}"
    out.print(Text(ending, style="dim"), soft_wrap=True)
    if card.status == "ok":
        more = f"backdoorlab show {card.key[:8]}"
        if card.stage != "defense":
            more = f"backdoorlab defend ft --run {card.key[:8]}     or     {more}"
        out.print(Text.assemble(("next: ", "dim"), more), soft_wrap=True)


def metrics_table(card: Card) -> Table:
    """The scalar metrics that mean something for this run."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(justify="right", style="bold cyan")
    table.add_column()
    for name, words in MEANING.items():
        value = card.metrics.get(name)
        if value is None or (name == "targets" and not value):
            continue
        if isinstance(value, list):
            value = ", ".join(map(str, value))
        table.add_row(shown(number(value, 4)), words)
    return table
