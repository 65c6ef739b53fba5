"""A user's own file in place of what an attack makes first: kept in the store, part of the key, checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from backdoorlab.attacks import attacks
from backdoorlab.benchmark import Experiment, MethodSpec, Runner, Store
from backdoorlab.benchmark.store import UserAssets
from backdoorlab.cli.main import run
from backdoorlab.core.errors import InputError
from backdoorlab.data.sources import DatasetSpec
from backdoorlab.tasks import TaskSpec
from backdoorlab.training.context import MemoryAssets

TASK = TaskSpec(
    dataset=DatasetSpec(name="digits", train_size=200, test_size=100),
    model="convnet3",
    recipe="smoke",
    recipe_changes=(("min_steps", 4), ("epochs", 1)),
)
WORDS = [
    "--train-size",
    "200",
    "--test-size",
    "100",
    "--model",
    "convnet3",
    "--recipe",
    "smoke",
    "--recipe-set",
    "min_steps=4",
    "--recipe-set",
    "epochs=1",
]


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(Store(tmp_path / "store"))


def pattern(path: Path, value: float, shape: tuple[int, ...] = (1, 16, 16), name: str = "v") -> Path:
    save_file({name: torch.full(shape, value)}, path)
    return path


def lf(**assets: str) -> Experiment:
    return Experiment(task=TASK, attack=MethodSpec("lf", {}, {k.replace("_", "-"): v for k, v in assets.items()}))


def test_the_file_is_what_the_attack_uses(runner: Runner, tmp_path: Path) -> None:
    key = runner.keep_asset("lf-pattern", pattern(tmp_path / "own.safetensors", 40 / 255))
    card = runner.run(lf(lf_pattern=key)).card
    assert card.status == "ok", card.reason
    assert f"--asset lf-pattern={key}" in card.command
    _, backdoor = runner.load_backdoor(card)
    assert torch.equal(backdoor.trigger.pattern, torch.full((1, 16, 16), 40.0))  # type: ignore[attr-defined]
    assert not (runner.store.root / "asset" / "clean-surrogate").exists(), "nothing had to be trained for it"
    again = Experiment.from_json(json.loads(json.dumps(card.spec)))
    assert again.attack is not None
    assert again.attack.assets == {"lf-pattern": key}
    repeated = runner.run(again)
    assert repeated.card.key == card.key and repeated.reused
    other = runner.keep_asset("lf-pattern", pattern(tmp_path / "other.safetensors", 20 / 255))
    assert other != key
    assert runner.resolve(lf(lf_pattern=other)).key != card.key, "another file is another run"


def test_what_is_built_from_a_file_is_not_confused_with_what_is_built_without() -> None:
    cache, made = MemoryAssets(), []

    def build() -> dict[str, torch.Tensor]:
        made.append(1)
        return {"v": torch.tensor(float(len(made)))}

    plain = cache.get("lf-pattern", {"steps": 1}, build)
    assets = UserAssets(cache, {"clean-surrogate": {"w": torch.ones(2)}})
    assert assets.get("lf-pattern", {"steps": 1}, build)["v"] != plain["v"]
    assert assets.get("lf-pattern", {"steps": 1}, build)["v"] == 2
    assert torch.equal(assets.get("clean-surrogate", {}, build)["w"], torch.ones(2))
    assert len(made) == 2


@pytest.mark.parametrize(
    ("shape", "name", "message"),
    [
        ((3, 16, 16), "v", r"'v' must have shape \(1, 16, 16\), got \(3, 16, 16\)"),
        ((1, 16, 16), "w", "lacks the tensor 'v'"),
    ],
)
def test_a_file_that_does_not_fit(
    runner: Runner, tmp_path: Path, shape: tuple[int, ...], name: str, message: str
) -> None:
    key = runner.keep_asset("lf-pattern", pattern(tmp_path / "own.safetensors", 0.1, shape, name))
    with pytest.raises(InputError, match=message):
        runner.run(lf(lf_pattern=key))
    assert not runner.store.runs("attack")


@pytest.mark.parametrize("name", ["lf", "trojannn", "narcissus"])
def test_a_surrogate_of_another_architecture(runner: Runner, tmp_path: Path, name: str) -> None:
    save_file({"conv.weight": torch.zeros(4, 1, 3, 3)}, tmp_path / "own.safetensors")
    key = runner.keep_asset("clean-surrogate", tmp_path / "own.safetensors")
    settings = {"poison_rate": 0.05} | ({"surrogate": "own"} if name == "narcissus" else {})
    experiment = Experiment(task=TASK, attack=MethodSpec(name, settings, {"clean-surrogate": key}))
    with pytest.raises(InputError, match=r"asset clean-surrogate (lacks|:)"):
        runner.run(experiment)


@pytest.mark.parametrize(
    ("name", "settings", "kind"),
    [
        ("narcissus", {}, "clean-surrogate"),
        ("narcissus", {"surrogate": "own"}, "foreign-surrogate"),
        ("lc", {}, "clean-surrogate"),
        ("lc", {"surrogate": "clean"}, "robust-surrogate"),
    ],
)
def test_a_file_that_would_not_be_used(
    runner: Runner, tmp_path: Path, name: str, settings: dict[str, object], kind: str
) -> None:
    key = runner.keep_asset(kind, pattern(tmp_path / "own.safetensors", 0.1))
    with pytest.raises(InputError, match=f"{name} does not use the asset '{kind}' with these hyper-parameters, but: "):
        runner.run(Experiment(task=TASK, attack=MethodSpec(name, {"poison_rate": 0.05, **settings}, {kind: key})))


def test_a_benign_run_of_ones_own_serves_as_surrogate(runner: Runner) -> None:
    benign = runner.run(Experiment(task=TASK)).card
    path = runner.store.run("benign", benign.key).path / "model.safetensors"
    card = runner.run(lf(clean_surrogate=runner.keep_asset("clean-surrogate", path))).card
    assert card.status == "ok"
    assert not (runner.store.root / "asset" / "clean-surrogate").exists()


def test_wrong_words_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, words = pattern(tmp_path / "own.safetensors", 0.1), tmp_path / "words.safetensors"
    words.write_text("no tensors")
    store = ["--store", str(tmp_path / "store")]
    for arguments, message in (
        (["lf", "--asset", f"lf-patern={good}"], "lf has no asset 'lf-patern'"),
        (["badnets", "--asset", f"lf-pattern={good}"], "badnets has no asset 'lf-pattern'"),
        (["lf", "--asset", f"lf-pattern={tmp_path}/nothing"], "no such file"),
        (["lf", "--asset", f"lf-pattern={words}"], "is not a safetensors file"),
        (["lf", "--asset", "lf-pattern"], "expected KIND=FILE"),
        (["none", "--asset", f"lf-pattern={good}"], "trains the benign model"),
    ):
        assert run(["attack", *arguments, *WORDS, *store]) == 2, arguments
        assert message in " ".join(capsys.readouterr().err.split()), arguments
    assert run(["attack", "lf", "--asset", f"lf_pattern={good}", *WORDS, *store, "--json"]) == 0
    made = Store(tmp_path / "store").find(json.loads(capsys.readouterr().out)["key"])
    assert "--asset lf-pattern=" in made.card().command


def test_aliases_are_the_same_attack(runner: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    assert attacks.get("dynamic") is attacks.get("input_aware")
    assert attacks.get("cl", "image") is attacks.get("lc", "image")
    assert "dynamic" not in attacks.names()
    keys = {runner.resolve(Experiment(task=TASK, attack=MethodSpec(name))).key for name in ("dynamic", "input_aware")}
    assert len(keys) == 1
    assert run(["list", "attacks", "--modality", "image", "--json"]) == 0
    listed = {row["name"]: row["aliases"] for row in json.loads(capsys.readouterr().out)}
    assert listed["input_aware"] == ["dynamic"]
    assert listed["lc"] == ["cl"]
    with pytest.raises(InputError, match="dynamik"):
        attacks.get("dynamik")
