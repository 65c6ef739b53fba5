"""What a study is: a list of cells, each with a card in the store, and what is read from these.

A cell is either an ordinary stage (an attack, a benign model, a defense), which every other command sees and shares, or
a *measurement* on such stages: curves and maps that no defense returns. A measurement is kept as the artifact
``asset/study-<name>/<key>``, with a card and its numbers as safetensors. Its key depends on the keys of the stages that
it is taken on, its settings and the code that takes it. Cells are whole or absent; a study that was interrupted goes on
where it stopped, and what another study or grid has made is reused.

Measurements know the truth (roles, triggers); no defense reads anything of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from torch import Tensor

from backdoorlab.attacks.base import Attack, attacks
from backdoorlab.attacks.result import Backdoor
from backdoorlab.benchmark.card import Card
from backdoorlab.benchmark.meter import Meter, asset_card, environment
from backdoorlab.benchmark.runner import DONE, Runner, failure
from backdoorlab.benchmark.spec import Experiment, MethodSpec, Resolved
from backdoorlab.benchmark.store import StoredRun, StoreError
from backdoorlab.core.canonical import jsonable
from backdoorlab.core.errors import BackdoorLabError, InputError, unknown
from backdoorlab.core.seeding import derive_seed
from backdoorlab.core.syntax import code_of
from backdoorlab.defenses.base import Defense, defenses
from backdoorlab.models.classifier import Classifier
from backdoorlab.tasks import Task, TaskSpec
from backdoorlab.training.context import Context

PAPER = "paper"
"""Stands for all attacks that the study's source names."""


@dataclass(frozen=True)
class StudyOptions:
    """What is studied.

    Attributes:
        task: data, architecture and recipe.
        attacks: names; empty takes the study's short list, :data:`PAPER` all attacks of its source. Of these lists, the
            ones that serve the data's modality are taken.
        settings: hyper-parameters of the studied defense in all cells.
        parts: of the study; empty takes all.
        seed: of all cells.
    """

    task: TaskSpec
    attacks: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Site:
    """Where a measurement is taken.

    Attributes:
        task: the task.
        backdoor: of the first stage.
        models: of the stages, in their order.
        ctx: with the seed that the defense has in this experiment, so that both draw the same numbers.
        seed: of the experiment.
    """

    task: Task
    backdoor: Backdoor
    models: tuple[Classifier, ...]
    ctx: Context
    seed: int


@dataclass(frozen=True)
class Found:
    """What a measurement gives.

    Attributes:
        metrics: for the card; None for what is not defined.
        reasons: for every None.
        tensors: by file name, then by name.
    """

    metrics: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Measurement:
    """Something that is measured on stored stages.

    Attributes:
        name: of what is measured.
        settings: all that the result depends on beside the stages and the code; JSON-able.
        code: module that takes it, whose syntax tree is part of the key.
        method: studied defense, whose code is part of the key too.
        take: does the work.
    """

    name: str
    settings: Mapping[str, Any]
    code: ModuleType
    method: type[Defense]
    take: Callable[[Site], Found]

    def digest(self) -> str:
        """Hash of the code."""
        own = hashlib.sha256(code_of(Path(inspect.getfile(self.code)))).hexdigest()[:16]
        return f"{own}-{self.method.code_digest()}"


@dataclass(frozen=True, eq=False)
class Cell:
    """One cell.

    Attributes:
        attack: its name, or "benign".
        label: what tells it from the other cells of the attack.
        part: of the study.
        experiment: the stage; with a measurement, the stage that it is taken on.
        measurement: None for an ordinary stage.
        beside: further stages that a measurement needs.
    """

    attack: str
    label: str
    part: str
    experiment: Experiment
    measurement: Measurement | None = None
    beside: tuple[Experiment, ...] = ()


@dataclass(frozen=True, eq=False)
class Planned:
    """A cell with its place in the store.

    Attributes:
        cell: the cell.
        stage: folder of the store.
        key: in it.
        done: whether its card is there and need not be made again.
        bases: the stage, or the stages that a measurement is taken on.
        blank: card of a measurement before it is taken; None for stages.
    """

    cell: Cell
    stage: str
    key: str
    done: bool
    bases: tuple[Resolved, ...]
    blank: Card | None = None


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of a cell.

    Attributes:
        planned: the cell.
        card: None if it was refused.
        reused: whether the card was in the store already.
        reason: why it was refused, failed or does not apply.
    """

    planned: Planned
    card: Card | None
    reused: bool = False
    reason: str | None = None

    @property
    def cell(self) -> Cell:
        """The cell."""
        return self.planned.cell

    @property
    def status(self) -> str:
        """Of the card, or "refused"."""
        return "refused" if self.card is None else self.card.status

    @property
    def ok(self) -> bool:
        """Are there numbers?"""
        return self.status == "ok"

    def metric(self, name: str) -> Any:
        """Of the card; None without one."""
        return None if self.card is None else self.card.metrics.get(name)


@dataclass(frozen=True, kw_only=True)
class Study(ABC):
    """A study with its options; subclasses declare the class variables and say what its cells, rows and figures are."""

    name: ClassVar[str]
    summary: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    defense: ClassVar[str]
    """Registered name of the studied defense."""
    short: ClassVar[tuple[str, ...]]
    """Attacks that are taken unless told otherwise."""
    paper: ClassVar[tuple[str, ...]]
    """Attacks of the source, by their names here."""

    options: StudyOptions

    @abstractmethod
    def cells(self, task: Task, planting: Sequence[str]) -> Iterator[Cell]:
        """All cells, each after those that it builds on.

        Args:
            task: loaded.
            planting: registered names of the attacks.
        """

    @abstractmethod
    def rows(self, outcomes: Sequence[Outcome], runner: Runner) -> list[dict[str, Any]]:
        """The table, one record per cell; all have the same columns."""

    @abstractmethod
    def figures(self, outcomes: Sequence[Outcome], runner: Runner) -> dict[str, bytes]:
        """PNG files by name; those without anything to show are left out."""

    def about(self) -> str:
        """One line for figures: what was studied."""
        task = self.options.task
        return f"{task.dataset.name}, recipe {task.recipe}, seed {self.options.seed}"

    @abstractmethod
    def figure_names(self, planned: Sequence[Planned]) -> list[str]:
        """Names of the files that :meth:`figures` may give."""

    def wants(self, part: str) -> bool:
        """Does this part belong to what is studied?"""
        return not self.options.parts or part in self.options.parts

    def check(self) -> None:
        """Look at what can be judged without data.

        Raises:
            InputError: for an unknown part or hyper-parameter.
        """
        for part in self.options.parts:
            if part not in self.parts:
                raise unknown("part", part, self.parts)

    def base(self, attack: str | None) -> Experiment:
        """The attack (or benign) stage."""
        method = None if attack is None else MethodSpec(attack)
        return Experiment(task=self.options.task, attack=method, seed=self.options.seed)

    def defended(self, attack: str | None, settings: Mapping[str, Any]) -> Experiment:
        """The stage of the studied defense; ``settings`` take precedence over the user's."""
        changed = {**self.options.settings, **settings}
        method = None if attack is None else MethodSpec(attack)
        return Experiment(
            task=self.options.task,
            attack=method,
            defense=MethodSpec(self.defense, changed),
            seed=self.options.seed,
        )

    def method(self, task: Task) -> type[Defense]:
        """The studied defense for a task."""
        return defenses.get(self.defense, task.modality.name)

    def planting(self, task: Task) -> tuple[str, ...]:
        """Registered names of the attacks.

        Raises:
            InputError: for an unknown attack, or one that does not serve the data.
        """
        modality = task.modality.name
        served = set(attacks.names(modality))
        if not self.options.attacks or self.options.attacks == (PAPER,):
            listed = self.paper if self.options.attacks else self.short
            chosen = tuple(name for name in listed if name in served)
            if chosen:
                return chosen
            raise InputError(
                f"study {self.name}: none of {', '.join(listed)} is an attack on {modality} data; pass --attacks with "
                f"some of: {', '.join(sorted(served))}"
            )
        found: list[type[Attack]] = [attacks.get(name, modality) for name in self.options.attacks]
        return tuple(dict.fromkeys(cls.name for cls in found))


def plan_study(study: Study, runner: Runner) -> list[Planned]:
    """All cells with their keys; equal ones (a value of a sweep that is the default) have the same.

    Raises:
        InputError: if the study cannot be run as it is written.
    """
    study.check()
    task = runner.task(study.options.task)
    if not isinstance(task, Task):
        raise InputError(f"study {study.name} is about classifiers, got a task of kind {task.name}")
    method = study.method(task)
    method.build(dict(study.options.settings))
    planned = []
    for cell in study.cells(task, study.planting(task)):
        bases = tuple(runner.resolve(experiment) for experiment in (cell.experiment, *cell.beside))
        blank = None if cell.measurement is None else _blank(study, cell.measurement, bases)
        stage, key = (bases[0].stage, bases[0].key) if blank is None else (_stage(study), blank.key)
        done = _stored(runner, stage, key) is not None
        planned.append(Planned(cell, stage, key, done, bases, blank))
    return planned


def run_study(
    planned: Sequence[Planned], runner: Runner, on_cell: Callable[[Outcome], None] | None = None
) -> list[Outcome]:
    """Run the cells of a plan that are not done.

    A cell that fails, or cannot be run as it is written, does not stop the others.

    Args:
        planned: of :func:`plan_study`.
        runner: its store keeps the cards.
        on_cell: called with every outcome as it arrives.

    Raises:
        StoreError: if the store cannot be written.
    """
    outcomes: list[Outcome] = []
    known: dict[tuple[str, str], Outcome] = {}
    for cell in planned:
        place = (cell.stage, cell.key)
        if place in known:
            outcome = dataclasses.replace(known[place], planned=cell, reused=True)
        else:
            outcome = known[place] = _attempt(cell, runner)
        outcomes.append(outcome)
        if on_cell is not None:
            on_cell(outcome)
    return outcomes


def stored(outcome: Outcome, runner: Runner) -> StoredRun:
    """The artifact of a cell."""
    return runner.store.run(outcome.planned.stage, outcome.planned.key)


def _stage(study: Study) -> str:
    return f"asset/study-{study.name}"


def _stored(runner: Runner, stage: str, key: str) -> Card | None:
    if not runner.store.has(stage, key):
        return None
    card = runner.store.run(stage, key).card()
    return card if card.status in DONE else None


def _blank(study: Study, measurement: Measurement, bases: Sequence[Resolved]) -> Card:
    spec = {
        "measurement": measurement.name,
        "on": [f"{base.stage}/{base.key}" for base in bases],
        "settings": jsonable(dict(measurement.settings)),
        "seed": study.options.seed,
        "code": measurement.digest(),
    }
    command = shlex.join(["backdoorlab", "study", study.name, "--dataset", study.options.task.dataset.name])
    return asset_card(f"study {study.name}", spec).model_copy(
        update={"command": f"{command} ... (see the commands of {', '.join(spec['on'])})"}
    )


def _attempt(planned: Planned, runner: Runner) -> Outcome:
    try:
        card, reused = _run(planned, runner)
    except StoreError:
        raise
    except InputError as error:
        return Outcome(planned, None, reason=" ".join(str(error).split()))
    return Outcome(planned, card, reused, card.reason)


def _run(planned: Planned, runner: Runner) -> tuple[Card, bool]:
    if planned.blank is None:
        result = runner.run(planned.bases[0])
        return result.card, result.reused
    if (card := _stored(runner, planned.stage, planned.key)) is not None:
        return card, True
    cards = [runner.run(base).card for base in planned.bases]
    with runner.store.lock(planned.stage, planned.key, runner.reporter):
        if (card := _stored(runner, planned.stage, planned.key)) is not None:
            return card, True
        return _measure(planned, planned.blank, cards, runner), False


def _measure(planned: Planned, blank: Card, cards: Sequence[Card], runner: Runner) -> Card:
    """Take a measurement and store it; the caller holds the lock."""
    measurement, meter, log = planned.cell.measurement, Meter(runner.device), []
    assert measurement is not None
    status, reason, found = "ok", None, Found({}, {})
    notes: dict[str, Any] = {}
    try:
        for base in cards:
            if base.status != "ok":
                raise BackdoorLabError(f"{base.id} has status {base.status}: {base.reason}")
        with meter.part("load"):
            site = _site(planned, cards, runner)
        with meter.part("measure"):
            found = measurement.take(site)
        notes = {"warnings": list(site.ctx.warnings)} if site.ctx.warnings else {}
        if site.backdoor.poison.replay:
            notes["replay"] = True
    except InputError:
        raise
    except Exception as error:
        status, reason, nothing = failure(error)
        log = nothing.log
    card = Card.model_validate(
        blank.model_dump()
        | {"status": status, "reason": reason, "parents": [base.id for base in cards]}
        | {"metrics": found.metrics, "null_reasons": found.reasons, "notes": notes | meter.notes()}
        | meter.fields()
        | environment(runner.device)
    )
    return runner.store.save(card, found.tensors, log=log, stage=planned.stage).card()


def _site(planned: Planned, cards: Sequence[Card], runner: Runner) -> Site:
    task, backdoor = runner.load_classification(cards[0])
    others = [runner.load_model(card) for card in cards[1:]]
    models = tuple(model for model in (backdoor.model, *others) if isinstance(model, Classifier))
    seed = planned.cell.experiment.seed
    ctx = Context(derive_seed(seed, "defense"), runner.device, runner.reporter, runner.store.assets(runner.reporter))
    return Site(task, backdoor, models, ctx, seed)
