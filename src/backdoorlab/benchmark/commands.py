"""The command line that repeats a run; printed on every card."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from backdoorlab.attacks.base import Attack
from backdoorlab.benchmark.spec import Experiment, Resolved
from backdoorlab.defenses.base import Defense
from backdoorlab.tasks import TaskSpec


def command_of(resolved: Resolved) -> str:
    """``backdoorlab attack ...`` or ``backdoorlab defend ... --run KEY`` with everything that differs from a default.

    The card of the run with that key has the command that makes it.
    """
    if resolved.defense is not None and resolved.base is not None:
        return shlex.join(_defense_words(resolved.experiment, resolved.defense, resolved.base.key))
    return shlex.join(_attack_words(resolved.experiment, resolved.attack, resolved.task.spec))


def _attack_words(experiment: Experiment, attack: Attack | None, task: TaskSpec) -> list[str]:
    words = ["backdoorlab", "attack", attack.name if attack else "none"]
    words += ["--dataset", task.dataset.name, "--model", task.model, "--recipe", task.recipe]
    for option, value in (
        ("--size", task.dataset.size),
        ("--train-size", task.dataset.train_size),
        ("--test-size", task.dataset.test_size),
    ):
        words += [option, str(value)] if value is not None else []
    words += ["--kind", task.kind] if task.kind != "classification" and experiment.attack is None else []
    words += ["--data-seed", str(task.dataset.seed)] if task.dataset.seed else []
    words += _pairs("--recipe-set", dict(task.recipe_changes))
    words += _pairs("--set", attack.changed() if attack else {})
    for kind, key in (experiment.attack.assets if experiment.attack else {}).items():
        words += ["--asset", f"{kind}={key}"]
    return [*words, "--seed", str(experiment.seed)]


def _defense_words(experiment: Experiment, defense: Defense, run: str) -> list[str]:
    words = ["backdoorlab", "defend", defense.name, "--run", run]
    if experiment.clean_fraction is not None:
        words += ["--clean-fraction", f"{experiment.clean_fraction:g}"]
    words += [] if experiment.retrain else ["--no-retrain"]
    return words + _pairs("--set", defense.changed())


def _pairs(option: str, values: Mapping[str, Any]) -> list[str]:
    words = []
    for key, value in values.items():
        text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        words += [option, f"{key}={text.lower() if isinstance(value, bool) else text}"]
    return words
