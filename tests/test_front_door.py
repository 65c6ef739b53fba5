"""``import backdoorlab as bl``: the ten lines of the README, its errors, and the examples in its docstrings."""

from __future__ import annotations

import doctest
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import backdoorlab as bl
from backdoorlab import api
from backdoorlab.attacks.result import Backdoor
from backdoorlab.benchmark import Experiment, MethodSpec, Runner, Store
from backdoorlab.core.errors import ArtifactError, BackdoorLabError, InputError
from backdoorlab.core.seeding import isolated_rng
from backdoorlab.tasks import Task, TaskSpec


@pytest.fixture(scope="module")
def task() -> Task:
    return bl.load_task("digits", recipe="smoke")


@pytest.fixture(scope="module")
def backdoor(task: Task) -> Backdoor:
    return bl.attacks.BadNets(poison_rate=0.05).plant(task, seed=0, device="cpu")


def test_import_is_light_and_offers_what_it_says() -> None:
    code = "import sys, backdoorlab as bl; assert 'torch' not in sys.modules; print(*dir(bl))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"load_task", "attacks", "defenses", "compare", "wrap", "load"} <= set(found.stdout.split())


def test_examples_in_the_docstrings_run() -> None:
    result = doctest.testmod(api)
    assert result.attempted > 8
    assert result.failed == 0


def test_plant_evaluate_repair_compare(task: Task, backdoor: Backdoor) -> None:
    seen = backdoor.evaluate()
    assert seen.acc is not None and seen.acc > 0.8
    assert "ACC" in repr(seen) and "360 clean" in repr(seen) and "<table>" in seen._repr_html_()
    repaired = bl.defenses.ANP(iterations=2).repair(backdoor.model, clean=task.clean_subset(0.05))
    assert repaired is not backdoor.model
    table = bl.compare(backdoor, repaired, again=backdoor.model)
    records = table.records()
    assert [r["model"] for r in records] == ["badnets", "anp", "again"]
    assert records[0]["der"] is None and records[2]["der"] == 0.5, "the same model is neither better nor worse"
    assert "DER" in repr(table)


def test_it_gives_the_bits_of_the_benchmark(backdoor: Backdoor, tmp_path: Path) -> None:
    attack = MethodSpec("badnets", {"poison_rate": 0.05})
    runner = Runner(Store(tmp_path))
    card = runner.run(Experiment(task=TaskSpec(recipe="smoke"), attack=attack)).card
    stored = runner.load_model(card).state_dict()
    assert all(torch.equal(v, backdoor.model.state_dict()[k].cpu()) for k, v in stored.items())
    assert backdoor.evaluate().asr == card.metrics["asr"]


def test_saved_and_loaded_it_is_the_same(backdoor: Backdoor, tmp_path: Path) -> None:
    where = backdoor.save(tmp_path / "victim")
    again = bl.load(where, device="cpu")
    assert again.evaluate().values == backdoor.evaluate().values
    assert again.title == "badnets"
    with pytest.raises(InputError, match="exists already"):
        backdoor.save(where)
    backdoor.save(where, force=True)
    (where / "note.txt").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        backdoor.save(where, force=True)
    (where / "note.txt").unlink()
    weights = where / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match="checksum"):
        bl.load(where)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        backdoor.save(tmp_path / "notes", force=True)
    assert (tmp_path / "notes" / "mine.txt").read_text() == "mine"


def test_defend_measures_every_stage(backdoor: Backdoor) -> None:
    shorts = {"ft": {"epochs": 1}, "ac": {}, "strip": {"overlays": 4}, "neural_cleanse": {"epochs": 1, "min_steps": 1}}
    found = {name: bl.defend(name, backdoor, retrain=False, device="cpu", **s) for name, s in shorts.items()}
    assert found["ft"].values["der"] is not None
    assert found["ac"].values["auroc"] is not None
    assert found["strip"].values["threshold"] is not None
    assert found["neural_cleanse"].values["verdict"] in ("clean", "backdoored")


def test_a_name_follows_the_modality_of_the_task() -> None:
    texts = bl.load_task("templated_text", recipe="smoke", recipe_changes={"epochs": 1, "min_steps": 0}, train_size=80)
    for planted in (
        bl.attack("badnets", texts, poison_rate=0.2, device="cpu"),
        bl.attacks.BadNets(poison_rate=0.2).plant(texts, device="cpu"),
    ):
        assert planted.model.modality.name == "text"
        assert planted.notes["poisoned"] == 16


def test_a_network_of_ones_own_can_be_wrapped(task: Task) -> None:
    with isolated_rng(0):
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
        )
    like = bl.wrap(net, like=task)
    assert (like.num_classes, like.modality) == (10, task.modality)
    assert isinstance(bl.defenses.CLP(u=1.0).repair(like), type(like))
    with isolated_rng(0):
        flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 5))
    rgb = bl.wrap(flat, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), size=8)
    assert rgb.num_classes == 5 and rgb.normalises
    with pytest.raises(InputError, match="cannot process such input"):
        bl.wrap(net, size=32)
    with pytest.raises(InputError, match="must return logits"):
        bl.wrap(nn.Identity(), size=8)
    with pytest.raises(InputError, match="one value or 3 each, got 2 and 1"):
        bl.wrap(net, mean=(0.1, 0.2), channels=3)


def test_mistakes_are_told_in_a_line(task: Task, backdoor: Backdoor) -> None:
    with pytest.raises(AttributeError, match="Did you mean 'badnets'"):
        bl.attacks.BadNetz  # noqa: B018
    with pytest.raises(AttributeError, match="no defense 'ANQ'"):
        bl.defenses.ANQ  # noqa: B018
    with pytest.raises(AttributeError):
        bl.no_such_thing  # noqa: B018
    with pytest.raises(InputError, match="no hyper-parameter"):
        bl.attack("badnets", task, poison_rat=0.1)
    with pytest.raises(InputError, match="unknown device 'tpu'"):
        bl.attack("badnets", task, device="tpu")
    with pytest.raises(BackdoorLabError, match="needs clean samples"):
        bl.defenses.ANP().repair(backdoor.model)
    with pytest.raises(InputError, match="in \\[0, 1\\]"):
        task.clean_subset(5)
    with pytest.raises(InputError, match="does not know its task"):
        Backdoor(backdoor.model, backdoor.trigger, backdoor.target_map, backdoor.poison).evaluate()
