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
from typing import Any, Literal

import torch

from backdoorlab.attacks.base import Attack, attacks
from backdoorlab.core.canonical import canonical, dump_canonical, jsonable
from backdoorlab.core.errors import InputError, nearest
from backdoorlab.core.excerpt import shown
from backdoorlab.core.method import Method
from backdoorlab.core.settings import check_names, check_seed
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
        assets = {"assets": dict(self.assets)} if self.assets else {}
        return {"name": self.name, "settings": jsonable(dict(self.settings))} | assets

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> MethodSpec:
        """Inverse of :meth:`to_json`; "code" and "files" of a resolved spec are left out."""
        check_names("method", record, ("name", "settings", "assets", "code", "files"))
        settings, assets = record.get("settings", {}), record.get("assets", {})
        for what, values in (("settings", settings), ("assets", assets)):
            if not isinstance(values, Mapping):
                raise InputError(f"{what} of a method must be a mapping, got {shown(values)}")
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
        check_seed("seed", self.seed)
        check_fraction(self.clean_fraction)
        if not isinstance(self.retrain, bool):
            raise InputError(f"retrain must be true or false, got {shown(self.retrain)}")

    def undefended(self) -> Experiment:
        """The attack (or benign) stage that this experiment builds on."""
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
        check_names("experiment", record, [f.name for f in dataclasses.fields(cls)] + ["resolved"])
        attack, defense = (MethodSpec.from_json(record[k]) if record.get(k) else None for k in ("attack", "defense"))
        plain = {k: record[k] for k in ("seed", "clean_fraction", "retrain") if k in record}
        return cls(task=task_from_json(record.get("task", {})), attack=attack, defense=defense, **plain)


def task_spec(
    dataset: str,
    *,
    size: int | None = None,
    train_size: int | None = None,
    test_size: int | None = None,
    data_seed: int = 0,
    model: str = "auto",
    recipe: str = "fast",
    recipe_changes: Mapping[str, object] | None = None,
    kind: str = "classification",
) -> TaskSpec:
    """A task spec from what a user gives on a command line, in a grid or from Python.

    Args:
        dataset: name of the data set.
        size: height and width in pixels.
        train_size: training samples of a balanced subset.
        test_size: test samples of a balanced subset.
        data_seed: of subsets, splits and procedural data sets.
        model: architecture, or "auto".
        recipe: its name.
        recipe_changes: values, or text that stands for them, by field of the recipe; kept in alphabetical order.
        kind: of task.

    Raises:
        InputError: for an unknown kind or recipe field, or a value of the wrong type.
    """
    data = DatasetSpec(name=dataset, size=size, train_size=train_size, test_size=test_size, seed=data_seed)
    changes = tuple(sorted(kinds.get(kind).recipe_changes(recipe_changes or {})))
    return TaskSpec(dataset=data, model=model, recipe=recipe, recipe_changes=changes, kind=kind)


def task_from_json(record: Mapping[str, Any]) -> TaskSpec:
    """A task spec from JSON values.

    Raises:
        InputError: for a field that does not exist, or a value of the wrong type.
    """
    check_names("task", record, [f.name for f in dataclasses.fields(TaskSpec)])
    dataset = record.get("dataset", {})
    check_names("dataset", dataset, [f.name for f in dataclasses.fields(DatasetSpec)])
    try:
        changes = dict(record.get("recipe_changes", ()))
    except (TypeError, ValueError):
        raise InputError(f"recipe_changes must be pairs of a field and a value, got {shown(record)}") from None
    read = kinds.get(str(record.get("kind", TaskSpec().kind))).recipe_changes(changes)
    rest = {k: v for k, v in record.items() if k not in ("dataset", "recipe_changes")}
    return TaskSpec(dataset=DatasetSpec(**dataset), recipe_changes=read, **rest)


@dataclass(frozen=True, eq=False)
class Resolved:
    """One stage of an experiment together with its loaded task: everything that follows from the two, made once.

    Attributes:
        experiment: as the user wrote it.
        task: its data, architecture and recipe.
        attack: with all hyper-parameters set; None for the benign model.
        defense: with all hyper-parameters set; None for an attack (or benign) stage.
        clean_fraction: share of the training set that the defender owns, the defense's default filled in.
        retrain: whether a fresh model is trained on what a dataset defense keeps.
        spec: the experiment as JSON with every default filled in; :meth:`Experiment.from_json` reads it. Its
            ``resolved`` holds the recipe field by field, a digest of the data, and the contract.
        key: of the stage in the store: hash of ``spec``, 20 hexadecimal digits.
        base: the attack (or benign) stage that a defense builds on; None for such a stage itself.
    """

    experiment: Experiment
    task: BaseTask
    attack: Attack | None
    defense: Defense | None
    clean_fraction: float
    retrain: bool
    spec: Mapping[str, Any]
    key: str
    base: Resolved | None = None

    @property
    def stage(self) -> Literal["benign", "attack", "defense"]:
        """Of the store."""
        if self.defense is not None:
            return "defense"
        return "benign" if self.attack is None else "attack"

    @property
    def changed(self) -> dict[str, list[str]]:
        """Names of the hyper-parameters that differ from their defaults, under "attack" and "defense"."""
        methods: dict[str, Method | None] = {"attack": self.attack, "defense": self.defense}
        return {kind: list(method.changed()) for kind, method in methods.items() if method is not None}


def resolve(experiment: Experiment, task: BaseTask) -> Resolved:
    """Look up and build the methods of an experiment, fill in its defaults and compute its key.

    Args:
        experiment: what to run; without a defense it is an attack (or benign) stage.
        task: that belongs to it.

    Raises:
        InputError: for an unknown method, a hyper-parameter or asset that a method does not have, a value that does not
            fit, or a file that a hyper-parameter names and that is not there.
    """
    if experiment.defense is None:
        attack = _build_attack(experiment.attack, task)
        method = None if attack is None else _method_json(attack)
        if method is not None and experiment.attack is not None and experiment.attack.assets:
            method["assets"] = dict(experiment.attack.assets)
        return _resolved(experiment, task, attack, method)
    base = resolve(experiment.undefended(), task)
    defense = defenses.get(experiment.defense.name, task.methods).build(experiment.defense.settings)
    return _resolved(experiment, task, base.attack, base.spec["attack"], defense, base)


def _resolved(
    experiment: Experiment,
    task: BaseTask,
    attack: Attack | None,
    attack_json: Mapping[str, Any] | None,
    defense: Defense | None = None,
    base: Resolved | None = None,
) -> Resolved:
    fraction, retrain = 0.0, True
    if defense is not None:
        fraction = owned_fraction(defense, experiment.clean_fraction)
        retrain = experiment.retrain if defense.stage == "dataset" else True
    filled = dataclasses.replace(
        experiment, task=task.spec, attack=None, defense=None, clean_fraction=fraction, retrain=retrain
    )
    spec = filled.to_json() | {
        "attack": attack_json,
        "defense": None if defense is None else _method_json(defense),
        "resolved": {"recipe": dict(_recipe(task)), "data": data_digest(task), "contract": CONTRACT},
    }
    return Resolved(experiment, task, attack, defense, fraction, retrain, spec, stage_key(spec), base)


def check_fraction(clean_fraction: object) -> None:
    """Check a share of the training set; None stands for a defense's default.

    Raises:
        InputError: for anything but a number from 0 to 1.
    """
    if clean_fraction is None:
        return
    if isinstance(clean_fraction, bool) or not isinstance(clean_fraction, (int, float)):
        raise InputError(f"clean_fraction must be a number, got {shown(clean_fraction)}")
    if not 0 <= clean_fraction <= 1:
        raise InputError(f"clean_fraction must be >= 0 and <= 1, got {clean_fraction!r}")


def owned_fraction(defense: Defense, clean_fraction: float | None) -> float:
    """Share of the training set that the defender owns: 0 if the defense reads none; None takes its default.

    Raises:
        InputError: see :func:`check_fraction`.
    """
    check_fraction(clean_fraction)
    if "clean" not in defense.reads:
        return 0.0
    return defense.needs_clean_fraction if clean_fraction is None else clean_fraction


def _build_attack(method: MethodSpec | None, task: BaseTask) -> Attack | None:
    if method is None:
        return None
    cls = attacks.get(method.name, task.methods)
    attack = cls.build(method.settings)
    for kind in method.assets:
        if kind not in cls.asset_kinds:
            choices = ", ".join(cls.asset_kinds) or "none"
            raise InputError(f"{cls.name} has no asset {kind!r}.{nearest(kind, cls.asset_kinds)} It has: {choices}")
        if kind not in attack.assets_in_use():
            in_use = ", ".join(attack.assets_in_use()) or "none"
            raise InputError(f"{cls.name} does not use the asset {kind!r} with these hyper-parameters, but: {in_use}")
    return attack


def attack_key(experiment: Experiment, task: BaseTask) -> str:
    """Key of the attack (or benign) stage: 20 hexadecimal digits."""
    return resolve(experiment.undefended(), task).key


def defense_key(experiment: Experiment, task: BaseTask) -> str:
    """Key of the defense stage.

    Raises:
        InputError: if the experiment has no defense.
    """
    if experiment.defense is None:
        raise InputError("an experiment without a defense has no defense stage")
    return resolve(experiment, task).key


def stage_key(spec: Mapping[str, Any]) -> str:
    """Hash of a resolved spec. Names of recipes and files are only labels: fields and contents count instead."""
    hashed: dict[str, Any] = jsonable(spec)
    for method in (hashed["attack"], hashed["defense"]):
        if method is not None:
            method["settings"] |= method.get("files", {})
    hashed["task"] = {k: v for k, v in hashed["task"].items() if k not in ("recipe", "recipe_changes")}
    hashed["resolved"]["recipe"].pop("name", None)
    return hashlib.sha256(dump_canonical(hashed).encode()).hexdigest()[:20]


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


def _method_json(method: Method) -> dict[str, Any]:
    files = method.file_digests()
    more = {"files": files} if files else {}
    return {"name": method.name, "settings": jsonable(method.settings()), "code": method.code_digest()} | more
