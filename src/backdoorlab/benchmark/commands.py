"""The command line that repeats an experiment; printed on every card."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from backdoorlab.benchmark.spec import Experiment, build_attack, build_defense
from backdoorlab.core.method import Method
from backdoorlab.tasks import BaseTask


def attack_command(experiment: Experiment, task: BaseTask) -> str:
    """``backdoorlab attack ...`` with everything that differs from a default."""
    spec, dataset = task.spec, task.spec.dataset
    words = ["backdoorlab", "attack", experiment.attack.name if experiment.attack else "none"]
    words += ["--dataset", dataset.name, "--model", spec.model, "--recipe", spec.recipe]
    for option, value in (
        ("--size", dataset.size),
        ("--train-size", dataset.train_size),
        ("--test-size", dataset.test_size),
    ):
        words += [option, str(value)] if value is not None else []
    words += ["--kind", spec.kind] if spec.kind != "classification" and experiment.attack is None else []
    words += ["--data-seed", str(dataset.seed)] if dataset.seed else []
    words += _pairs("--recipe-set", dict(spec.recipe_changes)) + _pairs(
        "--set", _changed(build_attack(experiment, task))
    )
    for kind, key in (experiment.attack.assets if experiment.attack else {}).items():
        words += ["--asset", f"{kind}={key}"]
    return shlex.join([*words, "--seed", str(experiment.seed)])


def defense_command(experiment: Experiment, task: BaseTask, parent: str) -> str:
    """``backdoorlab defend ... --run PARENT``; the parent's card has the command that makes it."""
    defense = build_defense(experiment, task)
    assert experiment.defense is not None
    words = ["backdoorlab", "defend", experiment.defense.name, "--run", parent]
    if experiment.clean_fraction is not None:
        words += ["--clean-fraction", f"{experiment.clean_fraction:g}"]
    words += [] if experiment.retrain else ["--no-retrain"]
    return shlex.join(words + _pairs("--set", _changed(defense)))


def _changed(method: Method | None) -> dict[str, Any]:
    """Hyper-parameters that differ from their defaults."""
    if method is None:
        return {}
    defaults = {p.name: p.default for p in type(method).parameters()}
    return {k: v for k, v in method.settings().items() if v != defaults[k]}


def _pairs(option: str, values: Mapping[str, Any]) -> list[str]:
    words = []
    for key, value in values.items():
        text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        words += [option, f"{key}={text.lower() if isinstance(value, bool) else text}"]
    return words
