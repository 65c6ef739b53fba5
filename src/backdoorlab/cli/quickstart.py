"""``backdoorlab quickstart``: one attack and a defense of every stage, on digits that ship with scikit-learn.

Everything runs through the benchmark's runner, so that each line of the table is a stored run like any other. The
hyper-parameters below differ from the defaults where those are made for tens of thousands of color photographs: the
defender's 5 % of digits are 72 images, a single step per epoch. What does not work on so small a network (a pruning
method has few channels to choose from) stays in the table: that is what a benchmark is for.
"""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from backdoorlab.cli import options as opt
from backdoorlab.cli.console import number, out, print_json, shown
from backdoorlab.cli.helppage import HelpCommand
from backdoorlab.core.errors import BackdoorLabError, unknown

if TYPE_CHECKING:
    from backdoorlab.benchmark import Card, Runner

TARGET, SHOWN = 0, 8

_LEGEND = (
    "ACC: clean digits read correctly. ASR: digits with the patch that are read as 0 (a defender wants 0.000). "
    "DER: 1 = backdoor gone at no cost, 0.5 = nothing happened."
)


@dataclass(frozen=True)
class Step:
    """One defense of the tour: its name, settings for digits, and the stage in words."""

    name: str
    words: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    on_benign: bool = False


RATE = 0.05
"""At 0.1 half of what is labelled "0" would be poison, and a method that looks for a minority could not find it."""

ABL = {"lga_mode": "per_sample", "mode": "sequential", "ascent_steps": 20}
STEPS = (
    Step("ft", "repair: fine-tune on 72 clean digits", {"lr": 0.5, "batch_size": 64}),
    Step("fp", "repair: prune what clean digits do not use, fine-tune", {"epochs": 60, "batch_size": 32}),
    Step("abl", "training: unlearn what is learnt too fast", ABL),
    Step("ac", "data: cluster the activations, drop, train again"),
    Step("strip", "inputs: reject those whose class survives blending"),
    Step("neural_cleanse", "model: search a small trigger for every class", {"epochs": 30}, on_benign=True),
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("quickstart", cls=HelpCommand)(quickstart_command)


def quickstart_command(
    folder: Annotated[
        str, typer.Option("--out", help="Folder for the figure quickstart.png.", metavar="DIR")
    ] = "quickstart",
    defenses: Annotated[
        str | None, typer.Option(help="Defenses to run, comma-separated; all of the tour by default.", metavar="NAMES")
    ] = None,
    recipe: Annotated[str, typer.Option(help="Training recipe: smoke or fast.", metavar="NAME")] = "smoke",
    seed: opt.SeedOption = 0,
    device: opt.DeviceOption = "auto",
    store: opt.StoreOption = "",
    as_json: opt.JsonOption = False,
) -> None:
    """Attack, repair, detect: a tour on handwritten digits, nothing to download.

    A patch in the corner of 1 training digit in 20 teaches a model to answer 0. A defense of every kind then has
    its turn. Ends with one table and one figure; run it again and it prints the stored results at once.

    Try:

      backdoorlab quickstart

      backdoorlab quickstart --seed 1 --out tour
    """
    figure = opt.output_file(opt.output_folder(folder, "--out") / "quickstart.png", "--out")
    steps = _chosen(defenses)
    from backdoorlab.benchmark import Experiment, MethodSpec
    from backdoorlab.cli.attack import make_runner
    from backdoorlab.cli.outcome import as_record
    from backdoorlab.tasks import TaskSpec

    started = time.perf_counter()
    runner = make_runner(store, device)
    clean = Experiment(task=TaskSpec(recipe=recipe), seed=seed)
    attacked = dataclasses.replace(clean, attack=MethodSpec("badnets", {"target": TARGET, "poison_rate": RATE}))
    patched = f"a white patch on 1 training digit in {1 / RATE:.0f}, labelled 0"
    plan = [(clean, "trained on clean digits"), (attacked, patched)]
    for step in steps:
        for base in (attacked, clean) if step.on_benign else (attacked,):
            plan.append((dataclasses.replace(base, defense=MethodSpec(step.name, step.settings)), step.words))
    results = []
    for experiment, _ in plan:
        result = runner.run(experiment)
        card = result.card
        if card.status != "ok" and card.stage != "defense":
            raise BackdoorLabError(f"{card.stage} run {card.key}: {card.reason}")
        results.append(result)
    cards = [result.card for result in results]
    _draw(runner, cards, figure)
    if as_json:
        print_json({"figure": str(figure), "runs": [as_record(result) for result in results]})
    else:
        seconds, words = time.perf_counter() - started, [text for _, text in plan]
        _print_tour(list(zip(cards, words, strict=True)), figure, seconds, runner.store.root)
    if any(card.status == "failed" for card in cards):
        raise typer.Exit(1)


def _chosen(names: str | None) -> tuple[Step, ...]:
    if names is None:
        return STEPS
    chosen, choices = [name.strip() for name in names.split(",") if name.strip()], [step.name for step in STEPS]
    for name in chosen:
        if name not in choices:
            raise unknown("defense of the tour", name, choices)
    return tuple(step for step in STEPS if step.name in chosen)


def _print_tour(cards: list[tuple[Card, str]], figure: Path, seconds: float, store: Path) -> None:
    from backdoorlab.cli.outcome import name_of

    title = "backdoorlab quickstart: BadNets on handwritten digits\n"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in ("model", "defense", "ACC", "ASR", "DER", "what happened"):
        table.add_column(head, justify="right" if head.isupper() else "left", no_wrap=head != "what happened")
    for card, words in cards:
        attacked, defense = name_of(card, "attack") is not None, name_of(card, "defense")
        cells = [number(card.metrics.get(m)) if card.status == "ok" else "" for m in ("acc", "asr", "der")]
        if defense and attacked and card.metrics.get("der") is None:
            cells = ["", "", ""]
        table.add_row(
            Text("backdoored" if attacked else "benign", style="red" if attacked else "green"),
            Text(defense or "none", style="" if defense else "dim"),
            *cells,
            Text.assemble(shown(happened(card)), (f"\n{words}", "dim")),
        )
    out.print(table)
    out.print(f"\n{_LEGEND}", style="dim", highlight=False)
    out.print(Text.assemble(("figure  ", "bold"), shown(figure)), soft_wrap=True)
    where = f"--store {shlex.quote(str(store))}"
    out.print(Text.assemble(("runs    ", "bold"), shown(f"{store}  (backdoorlab results {where})")), soft_wrap=True)
    show = f"backdoorlab show {cards[1][0].key[:8]} {where}"
    out.print(Text.assemble(("next    ", "bold"), shown(show)), soft_wrap=True)
    out.print(f"{seconds:.0f} s", style="dim", highlight=False)


def happened(card: Card) -> str:
    """One run in plain words, made from its numbers."""
    if card.status != "ok":
        return f"{card.status.replace('_', ' ')}: {card.reason}"
    m, stage = card.metrics, card.stage
    if stage == "benign":
        return f"reads {m['acc']:.0%} of the test digits correctly"
    if stage == "attack":
        return f"reads {m['acc']:.0%} correctly, yet the patch turns {m['asr']:.0%} into a 0"
    parts = []
    if m.get("verdict") is not None:
        towards = ", ".join(map(str, m["targets"] or ()))
        verdict = m["verdict"] + (f", towards class {towards}" if towards else "")
        parts.append(f"verdict: {verdict} (score {number(m['score'], 1)})")
    if m.get("tpr") is not None:
        parts.append(f"finds {m['tpr']:.0%} of the patched ones, {m['fpr']:.0%} false alarms")
    if m.get("der") is not None:
        effect = "no help here: the patch still turns" if m["der"] < 0.6 else "the patch now turns"
        parts.append(f"{effect} {m['asr']:.0%} into a 0")
    return "; ".join(parts) or "nothing to report"


def _draw(runner: Runner, cards: list[Card], path: Path) -> None:
    """Clean and triggered digits, and how the model classifies them before and after the most effective defense."""
    from backdoorlab.analysis.figures import BAD, GOOD, Line, Row, draw_rows
    from backdoorlab.attacks.triggers.base import stamp_all
    from backdoorlab.cli.show import pictures
    from backdoorlab.training.evaluate import predict

    attack = cards[1]
    defended = [c for c in cards[2:] if "model.safetensors" in c.digests and c.metrics["der"] is not None]
    best = max(defended, key=lambda c: c.metrics["der"], default=None)
    task, backdoor = runner.load_backdoor(attack)
    labels = task.test.labels
    rows_shown = [int((labels == k).nonzero()[0]) for k in range(task.num_classes) if k != TARGET][:SHOWN]
    chosen = task.test[labels.new_tensor(rows_shown)]
    stamped = stamp_all(backdoor.trigger, chosen.inputs)
    models = [("the attacked model says", backdoor.model)]
    if best is not None:
        models.append((f"defended by {best.spec['defense']['name']}", runner.load_model(best)))
    rows = []
    for label, images in (("test digits", pictures(chosen.inputs)), ("with the patch", pictures(stamped))):
        lines = []
        for words, model in models:
            predicted = predict(model, images).argmax(1)
            colors = tuple(GOOD if right else BAD for right in (predicted == chosen.labels).tolist())
            lines.append(Line(words, tuple(map(str, predicted.tolist())), colors))
        rows.append(Row(label, images, tuple(lines)))
    subtitle = f"BadNets, ASR {attack.metrics['asr']:.0%}"
    if best is not None:
        subtitle += f"; {best.metrics['asr']:.0%} after {best.spec['defense']['name']}"
    draw_rows(path, "A backdoor, and what a defense does to it", f"{subtitle}. Green: right, red: wrong.", rows)
