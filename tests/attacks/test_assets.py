"""What attacks make first: keys that no hyper-parameter can be missing from, and files of the user's in their place."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import json
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import backdoorlab.attacks
from attack_tools import bright_task, make
from backdoorlab.attacks import Attack, PoisoningAttack, attacks
from backdoorlab.attacks.common.assets import SELECTION, Asset, AssetMethod, asset
from backdoorlab.attacks.common.surrogate import clean_surrogate, surrogate_spec
from backdoorlab.attacks.image import narcissus
from backdoorlab.attacks.triggers.pixels import AdditiveTrigger
from backdoorlab.core.errors import BackdoorLabError, InputError, NotApplicable
from backdoorlab.core.method import param
from backdoorlab.data.sources import load_dataset
from backdoorlab.data.split import Split, content_digest
from backdoorlab.tasks import Task
from backdoorlab.training import Context
from backdoorlab.training.context import MemoryAssets, Tensors

OWN = [cls for cls in attacks if cls.asset_kinds and cls.__module__.startswith("backdoorlab.attacks.")]

CASES: list[tuple[str, dict[str, Any], str]] = [
    ("combat", {"epochs": 0.4}, "combat-generator"),
    ("dfst", {}, "dfst-style"),
    ("lba", {"size": 5}, "lba-patch"),
    ("lc", {}, "robust-surrogate"),
    ("lf", {}, "lf-pattern"),
    ("narcissus", {}, "narcissus-noise"),
    ("narcissus", {"surrogate": "own"}, "narcissus-noise"),
    ("narcissus", {}, "foreign-surrogate"),
    ("poisonink", {}, "poisonink-hider"),
    ("poisonink", {"palette": "random"}, "poisonink-hider"),
    ("ssba", {"bits": 3}, "ssba-encoder"),
    ("trojannn", {"shape": "square"}, "trojannn-picture"),
    ("tuap", {}, "tuap-perturbation"),
]
"""(attack, settings, kind of asset that it makes with them)."""


def methods_of(cls: type[Attack]) -> dict[str, AssetMethod[Any, Any]]:
    """Kind -> what makes it."""
    found = [value for base in cls.__mro__ for value in vars(base).values() if isinstance(value, AssetMethod)]
    return {method.kind: method for method in found}


class Reached(Exception):
    """Ends an attack where it asks for an asset."""


class UpTo:
    """Assets that make everything but one kind, whose key they keep."""

    def __init__(self, kind: str) -> None:
        self.kind, self.key = kind, ""

    def get(self, kind: str, spec: Mapping[str, Any], build: Callable[[], Tensors]) -> Tensors:
        if kind == self.kind:
            self.key = json.dumps(spec, sort_keys=True)
            raise Reached
        return build()


class Kept(MemoryAssets):
    """Assets by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[str, Tensors] = {}

    def get(self, kind: str, spec: Mapping[str, Any], build: Callable[[], Tensors]) -> Tensors:
        self.made[kind] = super().get(kind, spec, build)
        return self.made[kind]


def prepare(attack: Attack, task: Task, ctx: Context) -> None:
    """All that an attack does before it trains a victim."""
    trigger = attack.make_trigger(task, ctx)  # type: ignore[attr-defined]
    if isinstance(attack, PoisoningAttack):
        attack.poison(trigger, task, ctx)


def key_of(attack: Attack, kind: str) -> str:
    assets = UpTo(kind)
    with pytest.raises(Reached):
        prepare(attack, bright_task(), Context(assets=assets))
    return assets.key


def tensors_of(attack: Attack, kind: str) -> Tensors:
    assets = Kept()
    with contextlib.suppress(NotApplicable):  # a perturbation that is nothing, of a model this small
        prepare(attack, bright_task(), Context(assets=assets))
    return assets.made[kind]


@cache
def load_once(name: str, size: int) -> Any:
    return load_dataset(name, size=size)


@cache
def pictures_in(folder: Path) -> Path:
    """Two folders of pictures, and one that is white below its middle."""
    draw = np.random.default_rng(0)
    for name in ("x", "y"):
        (folder / "classes" / name).mkdir(parents=True)
        for place in range(4):
            Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
                folder / "classes" / name / f"{place}.png"
            )
    Image.fromarray(np.repeat(np.arange(16, dtype=np.uint8) // 8 * 255, 16).reshape(16, 16)).save(folder / "mask.png")
    return folder


def another(attack: Attack, field: dataclasses.Field[Any], files: Path) -> Any:
    """A legal value that is not the field's."""
    value, choices = getattr(attack, field.name), field.metadata["choices"]
    if field.metadata["path"]:
        return str(files / {"mask": "mask.png", "style_images": "classes/x", "foreign": "classes"}[field.name])
    if choices:
        return next(choice for choice in choices if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 0.75
    return {"layer": "body.6", "rgb": (9, 8, 7)}[field.name]


@pytest.fixture(autouse=True)
def _foreign_data_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narcissus, "load_dataset", load_once)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures_in(tmp_path_factory.mktemp("pictures"))


@pytest.mark.parametrize("cls", OWN, ids=lambda cls: cls.name)
def test_every_asset_of_an_attack_is_made_by_the_helper(cls: type[Attack]) -> None:
    assert set(methods_of(cls)) == set(cls.asset_kinds) - {"clean-surrogate"}
    assert {kind for name, _, kind in CASES if name == cls.name} == set(methods_of(cls)), "checked below"


def test_no_attack_writes_a_key_by_hand() -> None:
    folder = Path(next(iter(backdoorlab.attacks.__path__)))
    calls = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "asset"
    }
    assert calls == {"common/assets.py", "common/surrogate.py"}


@pytest.mark.parametrize(("name", "settings", "kind"), CASES, ids=lambda value: str(value))
def test_a_hyper_parameter_is_in_the_key_or_has_no_influence(
    name: str, settings: dict[str, Any], kind: str, files: Path
) -> None:
    attack = make(name, **settings)
    method, key, same = methods_of(type(attack))[kind], key_of(attack, kind), {}
    closed = {*method.unread, *inspect.signature(method.build).parameters}
    for field in dataclasses.fields(attack):
        value = another(attack, field, files)
        try:
            changed = dataclasses.replace(attack, **{field.name: value})
        except InputError:  # narcissus, which knows all of the task and needs no foreign data
            assert (name, field.name, settings) == ("narcissus", "foreign", {"surrogate": "own"})
            continue
        if kind not in changed.assets_in_use():
            continue
        if key_of(changed, kind) == key:
            assert field.name in closed, f"{field.name} is neither in the key nor declared as unread"
            same[field.name] = value
    assert set(SELECTION) - {"poison_rate"} <= set(same)
    before, after = tensors_of(attack, kind), tensors_of(dataclasses.replace(attack, **same), kind)
    assert before.keys() == after.keys()
    for tensor in before:
        assert torch.equal(before[tensor], after[tensor]), f"{tensor} depends on one of {sorted(same)}"


@pytest.mark.parametrize(
    ("name", "settings", "field"),
    [("narcissus", {}, "foreign"), ("dfst", {}, "style_images"), ("trojannn", {}, "mask")],
    ids=lambda value: str(value),
)
def test_assets_of_a_user_s_pictures(name: str, settings: dict[str, Any], field: str, files: Path) -> None:
    attack = make(name, **settings)
    own = dataclasses.replace(attack, **{field: another(attack, type(attack).__dataclass_fields__[field], files)})
    kind = attack.asset_kinds[0]
    first, second = tensors_of(attack, kind), tensors_of(own, kind)
    assert any(not torch.equal(first[tensor], second[tensor]) for tensor in first)


def test_variants_that_make_nothing_first_use_no_asset() -> None:
    for attack in (
        make("lf", variant="random"),
        make("poisonink", variant="edge"),
        make("lc", steps=0),
        make("lc", eps=0.0, surrogate="clean"),
    ):
        assets = Kept()
        prepare(attack, bright_task(), Context(assets=assets))
        assert attack.assets_in_use() == () == tuple(assets.made)


# --- the helper itself ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Toy(PoisoningAttack):
    """Makes a pattern first."""

    name: ClassVar[str] = "toy"
    paper: ClassVar[str] = "none, for tests"
    year: ClassVar[int] = 2026
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    trigger_visibility: ClassVar[str] = "visible"
    asset_kinds: ClassVar[tuple[str, ...]] = ("toy-pattern", "toy-outer", "toy-loose", "toy-typo")

    level: float = param(3.0, "of the pattern")
    strength: float = param(1.0, "of the trigger")
    picture: str | None = param(None, "a file", path=True)
    side: int | None = param(None, "of the pattern")

    @asset("toy-pattern", unread=(*SELECTION, "strength"))
    def pattern(self, ctx: Context, images: Split, side: int, shift: Tensor, note: str = "usual") -> Tensors:
        """A square and a random number."""
        drawn = torch.rand(1, generator=ctx.generator("draw"))
        return {"v": torch.full((side, side), self.level + self.target) + shift, "drawn": drawn}

    @asset("toy-outer", unread=(*SELECTION, "target"))
    def outer(self, ctx: Context, task: Task) -> Tensors:
        """Made from the other."""
        return self.pattern(ctx, images=task.train, side=2, shift=torch.zeros(1)).tensors

    @asset("toy-loose", unread=("strength", "picture"))
    def loose(self, ctx: Context, how: str) -> Tensors:
        """Reads what it should not."""
        if how == "default":
            return {"v": torch.tensor(getattr(self, "strength", 1.0))}
        return {"v": torch.tensor(float(len(self.settings()) if how == "settings" else self.strength))}

    @asset("toy-typo", unread=("strenght",))
    def typo(self, ctx: Context) -> Tensors:
        """Declares what does not exist."""
        return {}

    @asset("toy-unknown")
    def unknown(self, ctx: Context) -> Tensors:
        """Of no declared kind."""
        return {}

    def make_trigger(self, task: Task, ctx: Context) -> AdditiveTrigger:
        """The pattern, one grey level for all."""
        found = self.pattern(ctx, images=task.train, side=2, shift=torch.zeros(1)).tensor("v", (2, 2))
        return AdditiveTrigger((self.strength * found.mean()).expand(task.train.inputs.shape[1:]).clone())


ZERO = torch.zeros(1)


def toy_key(attack: Toy, **arguments: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"images": bright_task().train, "side": 2, "shift": ZERO} | arguments
    return Toy.pattern.spec(attack, Context(), **given)


def test_a_key_holds_arguments_and_hyper_parameters_by_their_values() -> None:
    train = bright_task().train
    assert toy_key(Toy()) == {
        "images": content_digest(train.inputs, train.labels),
        "side": 2,
        "shift": content_digest(ZERO, torch.zeros(0, dtype=torch.int64)),
        "note": "usual",
        "target": 0,
        "level": 3.0,
        "picture": "",
    }
    for arguments in ({"side": 3}, {"shift": ZERO + 1}, {"note": "other"}, {"images": train[torch.arange(30)]}):
        assert toy_key(Toy(), **arguments) != toy_key(Toy())
    for attack in (Toy(target=1), Toy(level=4.0)):
        assert toy_key(attack) != toy_key(Toy())
    for attack in (Toy(poison_rate=0.2), Toy(cap_rate=True), Toy(strength=2.0), Toy(side=5)):
        assert toy_key(attack) == toy_key(Toy()), "unread, or an argument stands in its place"


def test_a_task_lies_in_the_key_under_its_name_or_entry_by_entry() -> None:
    task = bright_task()
    key = Toy.outer.spec(Toy(), Context(), task)
    assert key == surrogate_spec(task) | {"level": 3.0, "strength": 1.0, "picture": "", "side": None}
    attack = make("lf")
    assets = Kept()
    attack.make_trigger(task, Context(assets=assets))
    assert json.loads(key_of(attack, "lf-pattern"))["surrogate"] == json.loads(json.dumps(surrogate_spec(task)))


def test_a_new_hyper_parameter_is_part_of_the_key_unasked() -> None:
    @dataclass(frozen=True, kw_only=True)
    class More(Toy):
        added: int = param(1, "a later one")

    assert toy_key(More()) == toy_key(Toy()) | {"added": 1}
    assert toy_key(More(added=2)) != toy_key(More())


def test_reading_what_is_not_in_the_key_is_an_error_and_nothing_is_kept() -> None:
    message = r"toy: making the asset toy-loose reads the hyper-parameter 'strength', which is not part of its key"
    for how in ("plain", "default", "settings"):
        assets = Kept()
        with pytest.raises(BackdoorLabError, match=message if how != "settings" else "toy-loose reads"):
            Toy().loose(Context(assets=assets), how)
        assert assets.made == {}
    assert Toy().strength == 1.0, "the attack itself stays as it is"


def test_an_argument_closes_the_hyper_parameter_of_its_name() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Other(Toy):
        asset_kinds: ClassVar[tuple[str, ...]] = ("toy-size",)

        @asset("toy-size")
        def size(self, ctx: Context, side: int) -> Tensors:
            return {"v": torch.zeros(self.side or side)}

    with pytest.raises(BackdoorLabError, match="toy-size reads the hyper-parameter 'side'"):
        Other(side=4).size(Context(), side=2)


def test_an_asset_made_from_another_has_what_that_one_reads_in_its_key() -> None:
    with pytest.raises(BackdoorLabError, match="toy-outer reads the hyper-parameter 'target'"):
        Toy().outer(Context(), bright_task())


def test_declarations_that_name_nothing_are_errors() -> None:
    with pytest.raises(BackdoorLabError, match="toy: 'strenght', unread by the asset toy-typo, is no hyper-parameter"):
        Toy().typo(Context())
    with pytest.raises(BackdoorLabError, match="toy: the asset toy-unknown is not among the class's asset_kinds"):
        Toy().unknown(Context())


def test_variables_from_around_the_method_are_refused() -> None:
    """They would reach the tensors past the key."""
    hidden = 3.0

    with pytest.raises(TypeError, match="the asset toy-closed must not use the outer variable 'hidden'"):

        @asset("toy-closed")
        def build(self: Toy, ctx: Context) -> Tensors:
            return {"v": torch.tensor(hidden)}


def test_the_seed_follows_from_the_key() -> None:
    train = bright_task().train

    def drawn(attack: Toy, seed: int) -> float:
        return float(attack.pattern(Context(seed), images=train, side=2, shift=ZERO).tensor("drawn", (1,)))

    assert drawn(Toy(), 0) == drawn(Toy(), 1) == drawn(Toy(strength=2.0, poison_rate=0.3), 2)
    assert drawn(Toy(level=4.0), 0) != drawn(Toy(), 0)


def test_changed_code_is_another_asset_of_the_same_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    assets, train = Kept(), bright_task().train

    def pattern() -> Tensors:
        return Toy().pattern(Context(assets=assets), images=train, side=2, shift=ZERO).tensors

    first = pattern()
    assert pattern() is first
    monkeypatch.setattr(Toy, "code_digest", classmethod(lambda cls: "another"))
    second = pattern()
    assert second is not first
    assert torch.equal(first["drawn"], second["drawn"])


def test_an_attack_that_was_typed_in_makes_assets_too(monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {"Toy": Toy, "__name__": "typed_in"}
    exec("class Typed(Toy):\n    pass", names)
    monkeypatch.setitem(sys.modules, "typed_in", types.ModuleType("typed_in"))
    with pytest.raises(InputError, match="typed in, not read from a file"):
        names["Typed"].code_digest()
    assert names["Typed"]().pattern(Context(), images=bright_task().train, side=2, shift=ZERO).tensors


def test_a_file_is_in_the_key_by_its_content(tmp_path: Path) -> None:
    first, second = tmp_path / "a.bin", tmp_path / "b.bin"
    first.write_bytes(b"one")
    second.write_bytes(b"one")
    keys = [toy_key(Toy(picture=str(path))) for path in (first, second)]
    second.write_bytes(b"two")
    assert keys[0] == keys[1] != toy_key(Toy(picture=str(second)))
    with pytest.raises(InputError, match="found no file or folder"):
        toy_key(Toy(picture=str(tmp_path / "missing")))
    # What is not part of a key is not looked for.
    assert "picture" not in Toy.loose.spec(Toy(picture=str(tmp_path / "missing")), Context(), "plain")
    assert Toy(picture=str(first)).file_digests(only=()) == {}


def test_tensors_and_networks_are_checked() -> None:
    found = Asset("toy-pattern", {"v": torch.zeros(2, 2)})
    assert found.tensor("v", (2, 2)).dtype == torch.float32
    with pytest.raises(InputError, match=r"asset toy-pattern: 'v' must have shape \(3,\), got \(2, 2\)"):
        found.tensor("v", (3,))
    with pytest.raises(InputError, match="asset toy-pattern lacks the tensor 'weight'"):
        found.network(lambda: torch.nn.Linear(2, 2))
    filled = Asset("toy", {"weight": torch.eye(2), "bias": torch.ones(2)}).network(lambda: torch.nn.Linear(2, 2))
    assert not filled.training
    assert not any(p.requires_grad for p in filled.parameters())
    assert torch.equal(filled.weight, torch.eye(2))


def test_the_method_stays_documented_and_bound() -> None:
    assert Toy.pattern.__doc__ == "A square and a random number."
    assert list(inspect.signature(Toy.pattern).parameters)[:2] == ["self", "ctx"]
    trigger = Toy(level=2.0, strength=2.0).make_trigger(bright_task(), Context())
    assert float(trigger.pattern.flatten()[0]) == 4.0


def test_a_surrogate_is_made_once_for_all_who_build_on_it() -> None:
    class Counted(Kept):
        def __init__(self) -> None:
            super().__init__()
            self.built: list[str] = []

        def get(self, kind: str, spec: Mapping[str, Any], build: Callable[[], Tensors]) -> Tensors:
            def counted() -> Tensors:
                self.built.append(kind)
                return build()

            return super().get(kind, spec, counted)

    assets = Counted()
    ctx = Context(assets=assets)
    for name in ("lf", "trojannn", "lba"):
        make(name).make_trigger(bright_task(), ctx)
    clean_surrogate(bright_task(), ctx)
    assert sorted(assets.built) == ["clean-surrogate", "lba-patch", "lf-pattern", "trojannn-picture"]
