"""What a grid will cost: which of its stages are stored, and hours and disk for the rest, before anything is run.

The seconds of a stage come from the nearest thing that is known, in this order:

- "same setting": finished runs of the same task and method in the store, with other seeds or settings;
- "other data": finished runs of the method on other tasks, as multiples of the benign training there;
- "assumed": a number of trainings that is typical of its kind.

A training is as long as a few measured steps of the task's recipe say. Estimates on a machine that does something else
meanwhile are as wrong as it is busy.
"""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

import torch

from backdoorlab.benchmark.card import Card
from backdoorlab.benchmark.grid import Stage
from backdoorlab.benchmark.runner import DONE, Runner
from backdoorlab.benchmark.spec import Experiment
from backdoorlab.core.canonical import canonical
from backdoorlab.core.errors import ArtifactError, BackdoorLabError, InputError
from backdoorlab.defenses.base import defenses
from backdoorlab.tasks import Task, TaskSpec
from backdoorlab.training.context import Context

TYPICAL = {"benign": 1.0, "attack": 1.0, "dataset": 1.1, "training": 1.5, "repair": 0.3, "input": 0.1, "model": 0.5}
"""Trainings that a stage takes where nothing is known of the method; dataset defenses train again."""
STEPS = 6
"""Steps that are timed, after as many to warm up."""
KEPT = 0.1
"""Megabytes of a card with scores, without a model."""


@dataclass(frozen=True)
class Cost:
    """What one stage will take.

    Attributes:
        stage: of the plan.
        seconds: estimated; 0 if it is stored, None if it cannot be run as it is written.
        megabytes: on disk.
        basis: "stored", "same setting", "other data", "assumed", or why it cannot be run.
    """

    stage: Stage
    seconds: float | None
    megabytes: float
    basis: str


@dataclass(frozen=True)
class Forecast:
    """What a grid will take.

    Attributes:
        costs: of every stage, in the order of the plan.
    """

    costs: tuple[Cost, ...]

    @property
    def seconds(self) -> float:
        """Of all stages that are not stored."""
        return sum(cost.seconds or 0.0 for cost in self.costs)

    @property
    def megabytes(self) -> float:
        """Of all stages that are not stored."""
        return sum(cost.megabytes for cost in self.costs if cost.basis != "stored")

    def count(self, basis: str) -> int:
        """Stages with this basis."""
        return sum(cost.basis == basis for cost in self.costs)


def forecast(stages: Iterable[Stage], runner: Runner) -> Forecast:
    """Estimate seconds and disk of every stage; loads the tasks, and times a few steps of each.

    Args:
        stages: a plan.
        runner: says which store, device and data folder.

    Raises:
        InputError: if a task cannot be loaded.
    """
    known = _Known(runner)
    return Forecast(tuple(known.cost(stage) for stage in stages))


def _method(experiment: Experiment) -> str:
    """The method whose work a stage is."""
    if experiment.defense is not None:
        return experiment.defense.name
    return experiment.attack.name if experiment.attack else "benign"


class _Known:
    """Seconds of what the store holds, and of a training of each task."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.same: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.ratios: dict[str, list[float]] = defaultdict(list)
        self.trainings: dict[TaskSpec, tuple[float, float]] = {}
        cards = [card for card in map(_finished, runner.store.runs()) if card is not None]
        for card in cards:
            self.same[canonical(card.spec["task"]), _method(card.experiment())].append(sum(card.seconds.values()))
        for (place, method), seconds in self.same.items():
            if method != "benign" and (place, "benign") in self.same:
                self.ratios[method].append(median(seconds) / median(self.same[place, "benign"]))

    def cost(self, stage: Stage) -> Cost:
        """Of one stage."""
        experiment = stage.experiment
        try:
            resolved = self.runner.resolve(experiment)
        except InputError as error:
            return Cost(stage, None, 0.0, str(error))
        run = self.runner.store.run(resolved.stage, resolved.key)
        card = _finished(run) if self.runner.store.has(resolved.stage, resolved.key) else None
        kind = experiment.defense and defenses.get(experiment.defense.name).stage
        weighs = kind not in ("input", "model") and not (kind == "dataset" and not experiment.retrain)
        training, size = self.training(experiment.task)
        megabytes = size if weighs else KEPT
        method = _method(experiment)
        if card is not None:
            return Cost(stage, 0.0, megabytes, "stored")
        if seconds := self.same.get((canonical(resolved.spec["task"]), method)):
            return Cost(stage, median(seconds), megabytes, "same setting")
        if method in self.ratios:
            return Cost(stage, median(self.ratios[method]) * training, megabytes, "other data")
        trainings = TYPICAL[kind or ("attack" if experiment.attack else "benign")]
        return Cost(stage, trainings * training, megabytes, "assumed")

    def training(self, spec: TaskSpec) -> tuple[float, float]:
        """Seconds of a training of the task and megabytes of a stored model with a tenth of the data."""
        if spec not in self.trainings:
            task = self.runner.task(spec)
            if not isinstance(task, Task):
                raise InputError(f"the cost of a task of kind {task.name} cannot be estimated; expected classification")
            self.trainings[spec] = (time_training(task, self.runner.device), _megabytes(task))
        return self.trainings[spec]


def _finished(run: object) -> Card | None:
    try:
        card: Card = run.card()  # type: ignore[attr-defined]
        return card if card.status in DONE and card.stage != "asset" else None
    except (ArtifactError, KeyError):
        return None


def time_training(task: Task, device: torch.device) -> float:
    """Seconds that a training by the task's recipe takes, from a few measured steps on random rows of its data."""
    recipe = task.recipe.resolve(len(task.train))
    short = dataclasses.replace(recipe, epochs=2, schedule="constant", lr=1e-6, compile=False)
    rows = torch.arange(STEPS * recipe.batch_size) % len(task.train)
    seconds: list[float] = []
    started = time.perf_counter()

    def lap(epoch: int, model: object) -> None:
        nonlocal started
        seconds.append(time.perf_counter() - started)
        started = time.perf_counter()

    try:
        task.fit(task.train[rows], Context(0, device), recipe=short, on_epoch=[lap], label="timing a training")
    except BackdoorLabError as error:
        raise InputError(f"{task.spec.dataset.name}: a training cannot be timed: {error}") from None
    steps = recipe.epochs * (len(task.train) // recipe.batch_size)
    return seconds[-1] / STEPS * steps


def _megabytes(task: Task) -> float:
    weights = sum(p.numel() for p in task.build_model(Context(0)).parameters()) * 4
    inputs = task.train.inputs
    sample = inputs[0].numel() * inputs.element_size() if isinstance(inputs, torch.Tensor) else 200
    return (weights + 0.1 * len(task.train) * sample) / 2**20 + KEPT


class Budget:
    """Admits a stage to a run of so many seconds while it is expected to finish in time.

    Attributes:
        postponed: indices of the stages that were not admitted.
    """

    def __init__(self, costs: Forecast, seconds: float) -> None:
        """``costs`` of the plan that is run."""
        self.expected = {cost.stage.index: cost.seconds or 0.0 for cost in costs.costs}
        self.until = time.perf_counter() + seconds
        self.postponed: set[int] = set()

    def __call__(self, stage: Stage) -> bool:
        """May this stage begin? Stored ones always may; what builds on a postponed one may not."""
        late = time.perf_counter() + self.expected[stage.index] > self.until and self.expected[stage.index] > 0
        if late or stage.parent in self.postponed:
            self.postponed.add(stage.index)
            return False
        return True
