"""What is run: experiments as JSON, resolved against a loaded task, and the keys under which results are kept.

A key is the hash of everything that a result depends on: the data (by content), the architecture, the recipe field by
field, each method's hyper-parameters with defaults filled in (files by content), the syntax tree of the method's file,
the seed, and :data:`CONTRACT`, which is raised whenever shared code (training loop, measuring) starts to give others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from backdoorlab.attacks.base import Attack, attacks
from backdoorlab.core.canonical import MAX_SEED, canonical, dump_canonical, jsonable
from backdoorlab.core.errors import InputError, nearest
from backdoorlab.core.excerpt import shown
from backdoorlab.core.method import Method
from backdoorlab.data.sources import DatasetSpec
from backdoorlab.data.split import Split
from backdoorlab.defenses.base import Defense, defenses
from backdoorlab.tasks import BaseTask, TaskSpec, kinds

CONTRACT = 2
"""Version of everything between a spec and its numbers that is not a method's own file."""

_digests: weakref.WeakKeyDictionary[BaseTask, str] = weakref.WeakKeyDictionary()
_recipes: weakref.WeakKeyDictionary[BaseTask, dict[str, Any]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class MethodSpec:
    """An attack or defense by name, with the hyper-parameters that differ from their defaults.

    Attributes:
        name: in the registry, or an alias.
        settings: hyper-parameters.
        assets: kind of asset -> key in the store of the user's own file that replaces it
            (:meth:`~backdoorlab.benchmark.runner.Runner.keep_asset`); attacks only.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    assets: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        own = {"assets": dict(self.assets)} if self.assets else {}
        return {"name": self.name, "settings": jsonable(dict(self.settings))} | own

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> MethodSpec:
        """Inverse of :meth:`to_json`; "code" and "files" of a resolved spec are left out."""
        _known("method", record, ("name", "settings", "assets", "code", "files"))
        settings, assets = record.get("settings", {}), record.get("assets", {})
        for what, values in (("settings", settings), ("assets", assets)):
            _expect_mapping(f"{what} of a method", values)
        if not isinstance(record.get("name"), str):
            raise InputError(f"the name of a method must be text, got {shown(record.get('name'))}")
        return cls(record["name"], dict(settings), {kind: str(key) for kind, key in assets.items()})


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One cell of a benchmark.

    Attributes:
        task: data, architecture and recipe.
        attack: None for the benign model.
        defense: None for the undefended row.
        seed: all randomness of the attack, the defense and the defender's clean samples derives from it; 0 to 2^63 - 1.
        clean_fraction: share of the clean training set that the defender owns; None takes the defense's own default.
        retrain: after a dataset defense, train a fresh model on the samples that it kept.
    """

    task: TaskSpec = field(default_factory=TaskSpec)
    attack: MethodSpec | None = None
    defense: MethodSpec | None = None
    seed: int = 0
    clean_fraction: float | None = None
    retrain: bool = True

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            InputError: naming the one that is of the wrong type or out of range.
        """
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed <= MAX_SEED:
            raise InputError(f"seed must be an integer from 0 to {MAX_SEED}, got {shown(self.seed)}")
        share = self.clean_fraction
        if share is not None and (isinstance(share, bool) or not isinstance(share, (int, float))):
            raise InputError(f"clean_fraction must be a number, got {shown(share)}")
        if not isinstance(self.retrain, bool):
            raise InputError(f"retrain must be true or false, got {shown(self.retrain)}")
        if self.clean_fraction is not None and not 0 <= self.clean_fraction <= 1:
            raise InputError(f"clean_fraction must be >= 0 and <= 1, got {self.clean_fraction!r}")

    def undefended(self) -> Experiment:
        """The attack (or benign) stage that this experiment stands on."""
        return dataclasses.replace(self, defense=None, clean_fraction=None, retrain=True)

    def to_json(self) -> dict[str, Any]:
        """As JSON values; :meth:`from_json` gives an equal experiment."""
        return {
            "task": jsonable(vars(self.task) | {"dataset": vars(self.task.dataset)}),
            "attack": self.attack and self.attack.to_json(),
            "defense": self.defense and self.defense.to_json(),
            "seed": self.seed,
            "clean_fraction": self.clean_fraction,
            "retrain": self.retrain,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Experiment:
        """Inverse of :meth:`to_json`; also reads the ``spec`` of a card.

        Raises:
            InputError: for a field that does not exist (with the nearest one), or a value of the wrong type.
        """
        _known("experiment", record, [f.name for f in dataclasses.fields(cls)] + ["resolved"])
        attack, defense = (MethodSpec.from_json(record[k]) if record.get(k) else None for k in ("attack", "defense"))
        plain = {k: record[k] for k in ("seed", "clean_fraction", "retrain") if k in record}
        return cls(task=task_spec(record.get("task", {})), attack=attack, defense=defense, **plain)


def task_spec(record: Mapping[str, Any]) -> TaskSpec:
    """A task spec from JSON values.

    Raises:
        InputError: for a field that does not exist, or a value of the wrong type.
    """
    _known("task", record, [f.name for f in dataclasses.fields(TaskSpec)])
    dataset = record.get("dataset", {})
    _known("dataset", dataset, [f.name for f in dataclasses.fields(DatasetSpec)])
    try:
        given = dict(record.get("recipe_changes", ()))
    except (TypeError, ValueError):
        raise InputError(f"recipe_changes must be pairs of a field and a value, got {shown(record)}") from None
    changes = kinds.get(str(record.get("kind", TaskSpec().kind))).recipe_changes(given)
    rest = {k: v for k, v in record.items() if k not in ("dataset", "recipe_changes")}
    return TaskSpec(dataset=DatasetSpec(**dataset), recipe_changes=changes, **rest)


def build_attack(experiment: Experiment, task: BaseTask) -> Attack | None:
    """The attack with all hyper-parameters set, or None.

    Raises:
        InputError: for what it does not have: a hyper-parameter, an asset.
    """
    given = experiment.attack
    if given is None:
        return None
    cls = attacks.get(given.name, task.methods)
    attack = cls.build(given.settings)
    for kind in given.assets:
        if kind not in cls.asset_kinds:
            has = ", ".join(cls.asset_kinds) or "none"
            raise InputError(f"{cls.name} has no asset {kind!r}.{nearest(kind, cls.asset_kinds)} It has: {has}")
        if kind not in attack.assets_in_use():
            has = ", ".join(attack.assets_in_use()) or "none"
            raise InputError(f"{cls.name} does not use the asset {kind!r} with these hyper-parameters, but: {has}")
    return attack


def build_defense(experiment: Experiment, task: BaseTask) -> Defense | None:
    """The defense with all hyper-parameters set, or None."""
    if experiment.defense is None:
        return None
    return defenses.get(experiment.defense.name, task.methods).build(experiment.defense.settings)


def resolve(experiment: Experiment, task: BaseTask) -> dict[str, Any]:
    """The experiment with every default filled in, as JSON; readable by :meth:`Experiment.from_json`.

    ``resolved`` holds what the user did not write: the recipe field by field, a digest of the data, and the contract.
    """
    attack, defense = build_attack(experiment, task), build_defense(experiment, task)
    fraction, retrain = 0.0, True
    if defense is not None and "clean" in defense.reads:
        given = experiment.clean_fraction
        fraction = defense.needs_clean_fraction if given is None else given
    if defense is not None and defense.stage == "dataset":
        retrain = experiment.retrain
    filled = dataclasses.replace(
        experiment, task=task.spec, attack=None, defense=None, clean_fraction=fraction, retrain=retrain
    ).to_json()
    filled["attack"], filled["defense"] = _method(attack), _method(defense)
    if experiment.attack is not None and experiment.attack.assets:
        filled["attack"]["assets"] = dict(experiment.attack.assets)
    filled["resolved"] = {"recipe": dict(_recipe(task)), "data": data_digest(task), "contract": CONTRACT}
    return filled


def changed_settings(experiment: Experiment, task: BaseTask) -> dict[str, list[str]]:
    """Names of the hyper-parameters that differ from their defaults, under "attack" and "defense"."""
    built: dict[str, Method | None] = {
        "attack": build_attack(experiment, task),
        "defense": build_defense(experiment, task),
    }
    return {kind: method.changed() for kind, method in built.items() if method is not None}


def attack_key(experiment: Experiment, task: BaseTask) -> str:
    """Key of the attack (or benign) stage: 20 hexadecimal digits."""
    return stage_key(resolve(experiment.undefended(), task))


def defense_key(experiment: Experiment, task: BaseTask) -> str:
    """Key of the defense stage.

    Raises:
        InputError: if the experiment has no defense.
    """
    if experiment.defense is None:
        raise InputError("an experiment without a defense has no defense stage")
    return stage_key(resolve(experiment, task))


def stage_key(resolved: Mapping[str, Any]) -> str:
    """Hash of a resolved spec. Names of recipes and files are only labels: fields and contents count instead."""
    spec = jsonable(resolved)
    for method in (spec["attack"], spec["defense"]):
        if method is not None:
            method["settings"] |= method.get("files", {})
    spec["task"] = {k: v for k, v in spec["task"].items() if k not in ("recipe", "recipe_changes")}
    spec["resolved"]["recipe"].pop("name", None)
    return hashlib.sha256(dump_canonical(spec).encode()).hexdigest()[:20]


def _recipe(task: BaseTask) -> dict[str, Any]:
    """Fields of the task's recipe as JSON values (kept per task)."""
    if task not in _recipes:
        _recipes[task] = jsonable(dataclasses.asdict(task.recipe))
    return _recipes[task]


def data_digest(task: BaseTask) -> str:
    """Hash of training and test samples (kept per task), so that a changed folder never meets old results."""
    if task not in _digests:
        parts = _split_digest(task.train) + _split_digest(task.test)
        _digests[task] = hashlib.sha256(parts).hexdigest()[:20]
    return _digests[task]


def _split_digest(split: Split) -> bytes:
    digest = hashlib.sha256(canonical(split.classes).encode())
    digest.update(split.labels.numpy().tobytes())
    if isinstance(split.inputs, torch.Tensor):
        digest.update(f"{split.inputs.dtype}{tuple(split.inputs.shape)}".encode())
        for start in range(0, len(split.inputs), 4096):
            digest.update(split.inputs[start : start + 4096].contiguous().numpy().tobytes())
    else:
        for text in split.inputs:
            coded = str(text).encode()
            digest.update(len(coded).to_bytes(8, "little") + coded)  # texts may hold any character, NUL too
    return digest.digest()


def _method(method: Method | None) -> dict[str, Any] | None:
    if method is None:
        return None
    files = method.file_digests()
    own = {"files": files} if files else {}
    return {"name": method.name, "settings": jsonable(method.settings()), "code": method.code_digest()} | own


def _expect_mapping(what: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise InputError(f"{what} must be a mapping, got {shown(value)}")


def _known(what: str, record: Any, names: Any) -> None:
    _expect_mapping(what, record)
    for key in record:
        if key not in names:
            raise InputError(f"{what} has no field {shown(key)}.{nearest(str(key), names)} It has: {', '.join(names)}")
