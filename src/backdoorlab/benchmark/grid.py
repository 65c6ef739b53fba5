"""Grids: tasks x attacks x defenses x seeds from a YAML file, planned as stages, each with the stage that it builds on.

    name: quick
    tasks:
      - {dataset: digits, recipe: smoke}
    attacks: [badnets, {name: blended, settings: {poison_rate: 0.05}}]
    defenses: [ft, anp]
    seeds: [0, 1]

The undefended row (defense none) of every attack and the benign model (attack none) under every defense always belong
to a grid: a defense is judged by what it does to a backdoor *and* by what it does without one. Where tasks are of
several modalities, each gets the methods that serve it.

Results that the store has are reused, since their keys say that nothing changed; an interrupted grid therefore goes on
where it stopped. ``resume=False`` computes every stage again and replaces the stored one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from backdoorlab.attacks.base import Attack, attacks
from backdoorlab.benchmark.card import Card
from backdoorlab.benchmark.engine import Engine, LocalEngine
from backdoorlab.benchmark.runner import Runner
from backdoorlab.benchmark.spec import Experiment, MethodSpec, task_spec
from backdoorlab.core.canonical import MAX_SEED, canonical
from backdoorlab.core.errors import InputError, nearest
from backdoorlab.core.excerpt import brief, shown
from backdoorlab.core.paths import printable, read_bytes
from backdoorlab.core.records import YAML_BYTES, parse_yaml
from backdoorlab.core.registry import Registry
from backdoorlab.defenses.base import Defense, defenses
from backdoorlab.tasks import TaskSpec, kinds

_AnyRegistry = Registry[Attack] | Registry[Defense]

MOST_STAGES = 1_000_000
"""Stages that a grid may have: a second each is twelve days."""


@dataclass(frozen=True)
class Stage:
    """One node of the plan.

    Attributes:
        index: position in the plan.
        experiment: without a defense it is an attack (or benign) stage.
        parent: index of the stage that a defense builds on; None for attack and benign stages.
    """

    index: int
    experiment: Experiment
    parent: int | None

    @property
    def label(self) -> str:
        """Such as "digits / badnets / anp / seed 0"."""
        spec = self.experiment
        methods = [spec.attack.name if spec.attack else "benign", *([spec.defense.name] if spec.defense else [])]
        return " / ".join([spec.task.dataset.name, *methods, f"seed {spec.seed}"])


OnCard = Callable[[Stage, Card, bool], None]
"""(stage, its card, True if the card was in the store already)."""


@dataclass(frozen=True)
class GridReport:
    """What became of a grid.

    Attributes:
        cards: by index of the stage.
        refused: stages that could not be run as they are written, with the reason; they have no card.
        reused: indices of stages whose card was in the store already.
    """

    cards: dict[int, Card] = field(default_factory=dict)
    refused: list[tuple[Stage, str]] = field(default_factory=list)
    reused: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Grid:
    """tasks x attacks x defenses x seeds.

    Aliases of attacks and defenses are replaced by the registered names.

    Attributes:
        name: of the grid.
        tasks: at least one.
        attacks: besides the benign model.
        defenses: besides none.
        seeds: at least one.
        clean_fraction: of every defender; None takes each defense's own default.
        retrain: after dataset defenses.
    """

    name: str
    tasks: tuple[TaskSpec, ...]
    attacks: tuple[MethodSpec, ...]
    defenses: tuple[MethodSpec, ...]
    seeds: tuple[int, ...]
    clean_fraction: float | None = None
    retrain: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "attacks", tuple(_named(attacks, method) for method in self.attacks))
        object.__setattr__(self, "defenses", tuple(_named(defenses, method) for method in self.defenses))

    @classmethod
    def from_yaml(cls, path: str | Path) -> Grid:
        """Read and validate a grid.

        Raises:
            InputError: one line with the file's name, the place, and the nearest valid choice.
        """
        path = Path(path)
        where = printable(path)
        content = parse_yaml(read_bytes(path, YAML_BYTES), where)
        if not isinstance(content, dict):
            raise InputError(f"{where}: a grid is a mapping with {', '.join(_GridFile.model_fields)}")
        try:
            read = _GridFile.model_validate({"name": printable(path.stem)} | content)
            grid = read.grid()
            grid.check()
        except ValidationError as error:
            raise InputError(f"{where}: {_first(error)}") from None
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        return grid

    def check(self) -> None:
        """Look up every method and build it with its settings, so that a typo is found before the first hour of work.

        Raises:
            InputError: for the first mistake.
        """
        count = len(self.tasks) * len(self.seeds) * (1 + len(self.attacks)) * (1 + len(self.defenses))
        if count > MOST_STAGES:
            raise InputError(f"a grid of {count:,} stages; expected at most {MOST_STAGES:,}")
        modalities = {modality for task in self.tasks for modality in _modalities(task)}
        for registry, methods in ((attacks, self.attacks), (defenses, self.defenses)):
            for method in methods:
                _check_method(registry, method, modalities)


def plan(grid: Grid) -> list[Stage]:
    """All stages, each after the one that it builds on; equal experiments appear once."""
    stages: list[Stage] = []
    planned: set[str] = set()
    for task in grid.tasks:
        served = _modalities(task)
        planting = [None, *(a for a in grid.attacks if _serves(attacks, a, served))]
        defending = [d for d in grid.defenses if _serves(defenses, d, served)]
        for seed in grid.seeds:
            for attack in planting:
                base = Experiment(task=task, attack=attack, seed=seed)
                if (text := canonical(base.to_json())) in planned:
                    continue
                planned.add(text)
                parent = Stage(len(stages), base, None)
                stages.append(parent)
                for defense in defending:
                    cell = dataclasses.replace(
                        base, defense=defense, clean_fraction=grid.clean_fraction, retrain=grid.retrain
                    )
                    if (text := canonical(cell.to_json())) not in planned:
                        planned.add(text)
                        stages.append(Stage(len(stages), cell, parent.index))
    return stages


def run_grid(
    grid: Grid, runner: Runner, *, resume: bool = True, on_card: OnCard | None = None, engine: Engine | None = None
) -> GridReport:
    """Run the plan of a grid.

    A failed stage does not stop the others. A stage whose spec cannot be run (a poison rate above the capacity of one
    of the tasks, ...) is listed as refused, together with the defenses that build on it.

    Args:
        grid: what to run.
        runner: its store receives the cards.
        resume: reuse what the store has; False computes everything again.
        on_card: called with every card as it arrives.
        engine: who executes the stages; None runs them in this process.

    Raises:
        StoreError: if the store cannot be written (any longer).
    """
    report, stages = GridReport(), plan(grid)
    # Closed at once if an error or Ctrl-C ends the loop: whatever works for the engine must end with it.
    results = (engine or LocalEngine()).execute(stages, runner, fresh=not resume)
    with closing(results):
        for stage, result in results:
            if isinstance(result, str):
                report.refused.append((stage, result))
                continue
            report.cards[stage.index] = result.card
            if result.reused:
                report.reused.add(stage.index)
            if on_card is not None:
                on_card(stage, result.card, result.reused)
    return report


def _as_method(entry: object) -> object:
    return {"name": entry} if isinstance(entry, str) else entry


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Method(_Strict):
    name: str
    settings: dict[str, Any] = {}

    def spec(self) -> MethodSpec:
        return MethodSpec(self.name, self.settings)


class _Task(_Strict):
    dataset: str
    size: int | None = None
    train_size: int | None = None
    test_size: int | None = None
    data_seed: int = 0
    model: str = "auto"
    recipe: str = "fast"
    recipe_changes: dict[str, Any] = {}
    kind: str = "classification"

    def spec(self) -> TaskSpec:
        return task_spec(**dict(self))


_Methods = Annotated[list[Annotated[_Method, BeforeValidator(_as_method)]], Field(min_length=1)]


class _GridFile(_Strict):
    name: Annotated[str, Field(min_length=1)]
    tasks: Annotated[list[_Task], Field(min_length=1)]
    attacks: _Methods
    defenses: _Methods
    seeds: Annotated[list[Annotated[int, Field(ge=0, le=MAX_SEED)]], Field(min_length=1)]
    clean_fraction: Annotated[float, Field(ge=0, le=1)] | None = None
    retrain: bool = True

    def grid(self) -> Grid:
        planting = tuple(m.spec() for m in self.attacks if m.name not in ("none", "benign"))
        defending = tuple(m.spec() for m in self.defenses if m.name != "none")
        tasks = tuple(t.spec() for t in self.tasks)
        return Grid(self.name, tasks, planting, defending, tuple(self.seeds), self.clean_fraction, self.retrain)


_PARTS: dict[str, type[BaseModel]] = {"tasks": _Task, "attacks": _Method, "defenses": _Method}


def _first(error: ValidationError) -> str:
    """The first mistake in one line: place, what is wrong, nearest valid choice."""
    problem = error.errors()[0]
    place = [part for part in problem["loc"] if isinstance(part, (str, int))]
    where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in place).lstrip(".")
    if problem["type"] == "extra_forbidden":
        names = list((_PARTS.get(str(place[0]), _GridFile) if len(place) > 1 else _GridFile).model_fields)
        return f"unknown key {brief(where)!r}.{nearest(str(place[-1]), names)} Expected: {', '.join(names)}"
    if problem["type"] == "missing":
        return f"{where!r} is missing"
    if problem["type"] == "too_short":
        return f"{where!r} is empty; it needs at least one entry"
    return f"{where!r}: {problem['msg']}, got {shown(problem['input'])}"


def _modalities(task: TaskSpec) -> tuple[str, ...]:
    """Names under which methods may serve a task; one, except for folders, which say so only when they are read."""
    return kinds.get(task.kind).check(task)


def _named(registry: _AnyRegistry, method: MethodSpec) -> MethodSpec:
    """The method under its registered name; every later look-up in a grid is by that."""
    return dataclasses.replace(method, name=registry.canonical(method.name))


def _serves(registry: _AnyRegistry, method: MethodSpec, modalities: tuple[str, ...]) -> bool:
    return any(method.name in registry.names(modality) for modality in modalities)


def _check_method(registry: _AnyRegistry, method: MethodSpec, modalities: set[str]) -> None:
    served = [m for m in sorted(modalities) if method.name in registry.names(m)]
    if not served:
        registry.get(method.name)  # an unknown name
        registry.get(method.name, min(modalities))  # a modality that it does not serve
    for modality in served:
        registry.get(method.name, modality).build(method.settings)
