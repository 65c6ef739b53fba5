from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from backdoorlab.benchmark import Experiment, MethodSpec, attack_key, defense_key, resolve
from backdoorlab.benchmark.grid import Grid
from backdoorlab.benchmark.spec import data_digest, task_spec
from backdoorlab.core.errors import InputError
from backdoorlab.core.method import Method
from backdoorlab.data.sources import DatasetSpec
from backdoorlab.data.split import Dataset, Split
from backdoorlab.tasks import Task, TaskSpec


def test_json_round_trip(digits_task: Task):
    spec = TaskSpec(recipe="smoke", recipe_changes=(("epochs", 2), ("milestones", (1, 2))))
    experiment = Experiment(
        task=spec,
        attack=MethodSpec("badnets", {"size": 2}),
        defense=MethodSpec("ft"),
        seed=3,
        clean_fraction=0.1,
        retrain=False,
    )
    again = Experiment.from_json(json.loads(json.dumps(experiment.to_json())))
    assert again.to_json() == experiment.to_json()
    full = resolve(experiment, digits_task).spec
    assert full["attack"]["settings"]["poison_rate"] == 0.1
    assert full["attack"]["settings"]["size"] == 2
    resolved_again = resolve(Experiment.from_json(json.loads(json.dumps(full))), digits_task)
    assert resolved_again.spec == full


def test_typos_are_named():
    with pytest.raises(InputError, match=r"experiment has no field 'sed'.*'seed'"):
        Experiment.from_json({"sed": 1})
    with pytest.raises(InputError, match=r"dataset has no field 'trainsize'.*'train_size'"):
        Experiment.from_json({"task": {"dataset": {"trainsize": 1}}})
    with pytest.raises(InputError, match="clean_fraction"):
        Experiment(clean_fraction=5)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64, True, "1", 1.0, None])
def test_seeds_are_bounded(seed: object):
    with pytest.raises(InputError, match=r"seed must be an integer from 0 to 9223372036854775807, got"):
        Experiment(seed=seed)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the seed of a dataset must be an integer from 0 to 9223372036854775807, got"):
        Experiment.from_json({"task": {"dataset": {"seed": seed}}})
    assert Experiment(seed=2**63 - 1).seed == 2**63 - 1


def test_changed_settings_are_those_of_the_user(digits_task: Task):
    experiment = Experiment(
        task=digits_task.spec,
        attack=MethodSpec("badnets", {"size": 2, "poison_rate": "0.1"}),
        defense=MethodSpec("ft", {"epochs": 7}),
    )
    assert resolve(experiment, digits_task).changed == {"attack": ["size"], "defense": ["epochs"]}
    assert resolve(Experiment(task=digits_task.spec), digits_task).changed == {}


def test_everything_that_follows_from_an_experiment_is_resolved_at_once(
    digits_task: Task, monkeypatch: pytest.MonkeyPatch
):
    built = []
    build = Method.build.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(Method, "build", classmethod(lambda cls, given: built.append(cls.name) or build(cls, given)))
    experiment = Experiment(
        task=digits_task.spec, attack=MethodSpec("dynamic", {"density": "0.04"}), defense=MethodSpec("ft"), seed=4
    )
    resolved = resolve(experiment, digits_task)
    assert built == ["input_aware", "ft"], "each method once"
    assert resolved.base is not None and resolved.base.base is None
    assert (resolved.stage, resolved.base.stage) == ("defense", "attack")
    assert (resolved.key, resolved.base.key) == (
        defense_key(experiment, digits_task),
        attack_key(experiment, digits_task),
    )
    assert resolved.attack is resolved.base.attack and resolved.attack.name == "input_aware"
    assert resolved.clean_fraction == 0.05 == resolved.spec["clean_fraction"]
    assert resolved.base.clean_fraction == 0.0
    assert resolve(Experiment(task=digits_task.spec), digits_task).stage == "benign"


def test_every_door_makes_the_same_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import backdoorlab as bl

    given = {"recipe_changes": {"min_steps": "1e2", "epochs": 1.0}, "recipe": "smoke", "train_size": 40, "data_seed": 3}
    expected = TaskSpec(
        dataset=DatasetSpec(train_size=40, seed=3),
        recipe="smoke",
        recipe_changes=(("epochs", 1), ("min_steps", 100)),
    )
    assert task_spec("digits", **given) == expected
    loaded = bl.load_task("digits", **given)
    assert dataclasses.replace(loaded.spec, model="auto") == expected
    (tmp_path / "g.yaml").write_text(
        f"{{tasks: [{json.dumps({'dataset': 'digits', **given})}], attacks: [none], defenses: [ft], seeds: [0]}}"
    )
    assert Grid.from_yaml(tmp_path / "g.yaml").tasks == (expected,)


def test_keys_change_exactly_with_the_spec(digits_task: Task):
    base = Experiment(task=digits_task.spec, attack=MethodSpec("badnets"), defense=MethodSpec("ft"))
    key, own = attack_key(base, digits_task), defense_key(base, digits_task)
    change = dataclasses.replace
    # Writing a default out, or asking for what the method asks for anyway, changes nothing.
    same = change(base, attack=MethodSpec("badnets", {"poison_rate": "0.1"}), clean_fraction=0.05)
    assert (attack_key(same, digits_task), defense_key(same, digits_task)) == (key, own)
    assert defense_key(change(base, retrain=False), digits_task) == own  # ft never retrains
    # A defense's settings leave the attack's key alone.
    other = change(base, defense=MethodSpec("ft", {"epochs": 5}))
    assert attack_key(other, digits_task) == key
    assert defense_key(other, digits_task) != own
    assert defense_key(change(base, clean_fraction=0.1), digits_task) != own
    assert defense_key(change(base, attack=None), digits_task) != own
    for attack in (None, MethodSpec("badnets", {"size": 3}), MethodSpec("blended")):
        assert attack_key(change(base, attack=attack), digits_task) != key
    assert attack_key(change(base, seed=1), digits_task) != key


def test_keys_follow_recipe_fields_not_names(digits_task: Task):
    base = Experiment(task=digits_task.spec, attack=MethodSpec("badnets"))
    key = attack_key(base, digits_task)
    renamed = dataclasses.replace(digits_task, recipe=dataclasses.replace(digits_task.recipe, name="other"))
    assert attack_key(base, renamed) == key
    longer = dataclasses.replace(digits_task, recipe=dataclasses.replace(digits_task.recipe, epochs=4))
    assert attack_key(base, longer) != key


def test_key_follows_the_data_and_the_method_file(digits_task: Task, monkeypatch: pytest.MonkeyPatch):
    base = Experiment(task=digits_task.spec, attack=MethodSpec("badnets"))
    key = attack_key(base, digits_task)
    pixels = digits_task.train.inputs.clone()
    pixels[7, 0, 3, 3] ^= 1
    train = Split(pixels, digits_task.train.labels, digits_task.train.classes)
    touched = dataclasses.replace(digits_task, dataset=dataclasses.replace(digits_task.dataset, train=train))
    assert data_digest(touched) != data_digest(digits_task)
    assert attack_key(base, touched) != key
    from backdoorlab.attacks.image.badnets import BadNets

    monkeypatch.setattr(BadNets, "code_digest", classmethod(lambda cls: "0" * 16))
    assert attack_key(base, digits_task) != key


def test_text_data_have_a_digest(digits_task: Task):
    import numpy as np

    def task(*words: str) -> Task:
        split = Split(np.array(words, dtype=object), torch.tensor([0, 1]), ("a", "b"))
        return dataclasses.replace(digits_task, dataset=Dataset("t", "text", split, split))

    assert data_digest(task("ab", "c")) == data_digest(task("ab", "c"))
    assert data_digest(task("ab", "c")) != data_digest(task("a", "bc"))


def test_key_follows_the_content_of_the_users_files_not_their_names(digits_task: Task, tmp_path: Path):
    def key(attack: str, **settings: object) -> str:
        return attack_key(Experiment(task=digits_task.spec, attack=MethodSpec(attack, settings)), digits_task)

    one, two = tmp_path / "one.png", tmp_path / "two.png"
    one.write_bytes(b"1")
    two.write_bytes(b"1")
    before = key("badnets", patch=str(one))
    assert before == key("badnets", patch=str(two)) != key("badnets")
    two.write_bytes(b"2")
    assert key("badnets", patch=str(two)) != before == key("badnets", patch=str(one))
    folder = key("refool", reflections=str(tmp_path))
    two.rename(tmp_path / "three.png")
    renamed = key("refool", reflections=str(tmp_path))
    assert renamed != folder, "reflections are dealt by name"
    files = [str(one), str(one), str(one), str(tmp_path / "three.png")]
    assert key("adap_patch", patches=files) != key("adap_patch", patches=files[::-1])
    with pytest.raises(InputError, match=r"badnets: found no file or folder .*two.png' for patch"):
        key("badnets", patch=str(two))
    named = Experiment(task=digits_task.spec, attack=MethodSpec("badnets", {"patch": str(one)}))
    assert attack_key(Experiment.from_json(resolve(named, digits_task).spec), digits_task) == before
