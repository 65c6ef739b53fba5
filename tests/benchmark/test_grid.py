from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from benchmark_cases import FT, TINY

from backdoorlab.benchmark import Grid, LocalEngine, MethodSpec, Runner, Store, plan, run_grid
from backdoorlab.benchmark import store as store_module
from backdoorlab.benchmark.store import StoreError
from backdoorlab.core.errors import InputError
from backdoorlab.tasks import Task
from backdoorlab.training.recipes import recipe_for

CONFIGS = Path(__file__).parents[2] / "configs"
GOOD = {
    "tasks": "[{dataset: digits, recipe: smoke}]",
    "attacks": "[none, badnets, {name: blended, settings: {poison_rate: 0.05}}]",
    "defenses": "[none, ft]",
    "seeds": "[0, 1]",
}


def write(folder: Path, **changes: str) -> Path:
    lines = [f"{key}: {value}" for key, value in (GOOD | changes).items() if value]
    (folder / "grid.yaml").write_text("\n".join(lines))
    return folder / "grid.yaml"


def test_plan_has_the_benign_and_undefended_rows(tmp_path: Path):
    grid = Grid.from_yaml(write(tmp_path))
    stages = plan(grid)
    assert grid.name == "grid"
    assert len(stages) == 2 * 3 * 2
    assert [s.label for s in stages[:4]] == [
        "digits / benign / seed 0",
        "digits / benign / ft / seed 0",
        "digits / badnets / seed 0",
        "digits / badnets / ft / seed 0",
    ]
    for stage in stages:
        assert (stage.parent is None) == (stage.experiment.defense is None)
        if stage.parent is not None:
            assert stage.parent < stage.index
            assert stages[stage.parent].experiment == stage.experiment.undefended()


def test_duplicates_are_planned_once(tmp_path: Path):
    assert len(plan(Grid.from_yaml(write(tmp_path, attacks="[badnets, badnets]", seeds="[0, 0]")))) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attacks": "[badnet]"}, r"unknown attack 'badnet'.*Did you mean 'badnets'"),
        ({"defenses": "[fft]"}, r"unknown defense 'fft'.*Did you mean 'ft'"),
        ({"defences": "[ft]"}, r"unknown key 'defences'.*Did you mean 'defenses'"),
        ({"attacks": "[{name: badnets, setings: {}}]"}, r"unknown key 'attacks\[0\].setings'.*Did you mean 'settings'"),
        ({"attacks": "[{name: badnets, settings: {sise: 3}}]"}, r"badnets has no hyper-parameter 'sise'.*'size'"),
        ({"attacks": "[{name: badnets, settings: {size: -3}}]"}, r"badnets: size must be >= 1, got -3"),
        ({"tasks": "[{dataset: digit}]"}, r"unknown dataset 'digit'.*Did you mean 'digits'"),
        ({"tasks": "[{dataset: digits, recipe: smok}]"}, r"unknown recipe 'smok'.*Did you mean 'smoke'"),
        ({"tasks": "[{dataset: digits, recipe_changes: {epoch: 3}}]"}, r"recipe has no field 'epoch'.*'epochs'"),
        ({"tasks": "[{dataset: digits, kind: clasifier}]"}, r"unknown kind of task 'clasifier'"),
        ({"tasks": "[{recipe: smoke}]"}, r"'tasks\[0\].dataset' is missing"),
        ({"attacks": "[]"}, r"'attacks' is empty"),
        ({"seeds": ""}, r"'seeds' is missing"),
        ({"seeds": "[a]"}, r"'seeds\[0\]'.*got 'a'"),
        ({"seeds": "[-1]"}, r"'seeds\[0\]'.*got -1"),
        ({"seeds": "[9223372036854775808]"}, "an integer of 19 digits; expected at most 64 bits"),
        ({"seeds": "[2024-01-01]"}, r"'seeds\[0\]'.*got '2024-01-01'"),
        ({"seeds": "[true]"}, r"'seeds\[0\]'.*got True"),
        ({"clean_fraction": "5"}, r"'clean_fraction'"),
        ({"name": "''"}, "'name'"),
        ({"name": "~"}, r"'name'.*got None"),
        ({"attacks": "[{name: badnets, settings: {rgb: 5}}]"}, "rgb must be a list of type int, got 5"),
        ({"attacks": "[{name: badnets, settings: {size: [[1]]}}]"}, r"size must be of type int, got \[\[1\]\]"),
        ({"attacks": "[5]"}, r"'attacks\[0\]'.*got 5"),
        ({"attacks": f"[{'badnets, ' * 2000}]", "seeds": f"[{'1, ' * 2000}]"}, "a grid of 8,004,000 stages"),
        (
            {"tasks": "[{dataset: digits, recipe_changes: {milestones: 5}}]"},
            "milestones must be a list of type int, got 5",
        ),
        ({"tasks": "[{dataset: digits, train_size: 0}]"}, "train_size must be at least 1, got 0"),
        ({"tasks": "[{dataset: digits, kind: diffusion, recipe_changes: {samples: 1}}]"}, "samples must be at least 2"),
        ({"tasks": "[{dataset: digits"}, "not valid YAML"),
    ],
)
def test_mistakes_are_named_with_the_file(tmp_path: Path, changes: dict[str, str], message: str):
    path = write(tmp_path, **changes)
    with pytest.raises(InputError, match=message) as caught:
        Grid.from_yaml(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("{epochs: 1.5}", "epochs must be of type int, got 1.5"),
        ("{epochs: true}", "epochs must be of type int, got True"),
        ("{epochs: -1}", "epochs must be at least 0, got -1"),
        ("{lr: ten}", "lr must be of type float, got 'ten'"),
        ("{lr: .nan}", "lr must be a finite number, got nan"),
        ("{augment: 7}", "augment must be true or false, got 7"),
        ("{compile: maybe}", "compile must be true or false, got 'maybe'"),
        ("{milestones: [1.5]}", "milestones must be of type int, got 1.5"),
        ("{milestones: [-1]}", r"milestones must be at least 0, got \(-1,\)"),
        ("{momentum: -1}", "momentum must be at least 0, got -1"),
        ("{weight_decay: -1}", "weight_decay must be at least 0, got -1"),
        ("{warmup: 7}", "warmup must be at most 1, got 7"),
        ("{optimizer: 5}", "optimizer must be of type str, got 5"),
        ("{momentum: 0}", "nesterov needs a momentum > 0"),
        ("{name: mine}", "recipe has no field 'name'"),
    ],
)
def test_recipe_changes_are_checked_as_on_the_command_line(tmp_path: Path, changes: str, message: str):
    path = write(tmp_path, tasks=f"[{{dataset: digits, recipe: smoke, recipe_changes: {changes}}}]")
    with pytest.raises(InputError, match=message):
        Grid.from_yaml(path)
    typed = {k: ",".join(map(str, v)) if isinstance(v, list) else str(v) for k, v in yaml.safe_load(changes).items()}
    with pytest.raises(InputError):
        recipe_for("image", "smoke", **dict(Task.recipe_changes(typed)))


def test_both_doors_read_a_recipe_alike(tmp_path: Path):
    given = "{lr: 1e-2, weight_decay: '1e-3', compile: 'no', augment: off, milestones: [1, 2], epochs: 1e1}"
    grid = Grid.from_yaml(write(tmp_path, tasks=f"[{{dataset: digits, recipe_changes: {given}}}]"))
    typed = {
        "lr": "1e-2",
        "weight_decay": "0.001",
        "compile": "false",
        "augment": "no",
        "milestones": "1,2",
        "epochs": "10",
    }
    assert grid.tasks[0].recipe_changes == tuple(sorted(Task.recipe_changes(typed)))
    assert dict(grid.tasks[0].recipe_changes) == {
        "lr": 0.01,
        "weight_decay": 0.001,
        "compile": False,
        "augment": False,
        "milestones": (1, 2),
        "epochs": 10,
    }
    assert [type(v) for k, v in grid.tasks[0].recipe_changes if k == "epochs"] == [int]


def test_aliases_are_the_methods_that_they_name(tmp_path: Path):
    named = [stage.label for stage in plan(Grid.from_yaml(write(tmp_path, attacks="[input_aware]")))]
    assert any("input_aware" in label for label in named)
    assert [s.label for s in plan(Grid.from_yaml(write(tmp_path, attacks="[dynamic]")))] == named
    assert [s.label for s in plan(Grid.from_yaml(write(tmp_path, attacks="[dynamic, input_aware]")))] == named
    made = Grid("made", (TINY,), (MethodSpec("dynamic"),), (FT,), (0,))
    assert [m.name for m in made.attacks] == ["input_aware"]


def test_an_alias_bomb_is_one_short_line(tmp_path: Path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    path = write(tmp_path, name="*a8")
    path.write_text("\n".join([*lines, path.read_text()]))
    with pytest.raises(InputError, match="more than 20,000 values") as caught:
        Grid.from_yaml(path)
    assert len(str(caught.value)) < 300 + len(str(path))


def test_missing_file_and_foreign_content(tmp_path: Path):
    with pytest.raises(InputError, match="there is no file"):
        Grid.from_yaml(tmp_path / "nothing.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(InputError, match="a grid is a mapping with name, tasks"):
        Grid.from_yaml(tmp_path / "list.yaml")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_grids_are_valid(path: Path):
    assert len(plan(Grid.from_yaml(path))) > 4


def small(*attacks: MethodSpec, seeds: tuple[int, ...] = (0,)) -> Grid:
    return Grid("small", (TINY,), attacks, (FT,), seeds)


def test_run_reuse_fresh_and_refusals(filled: Runner):
    greedy = MethodSpec("badnets", {"poison_rate": 1.0, "exclude_target": True})
    told = []
    report = run_grid(small(MethodSpec("badnets"), greedy), filled, on_card=lambda s, c, r: told.append((s.label, r)))
    assert sorted(report.cards) == [0, 1, 2, 3] and report.reused == {0, 1, 2, 3}
    assert [label for label, _ in told] == [s.label for s in plan(small(MethodSpec("badnets")))]
    assert [(s.index, why.split(";")[0]) for s, why in report.refused][1] == (
        5,
        "not run: the stage that it builds on was refused",
    )
    assert "largest possible rate" in report.refused[0][1]
    again = run_grid(small(), filled, resume=False)
    assert again.reused == set()
    assert again.cards[0].metrics == report.cards[0].metrics
    assert again.cards[0].created >= report.cards[0].created


def test_a_store_that_fills_up_stops_the_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module, "_write", full)
    with pytest.raises(StoreError, match="No space left"):
        run_grid(small(), Runner(Store(tmp_path)))


def test_worker_processes_give_the_same_cards(filled: Runner, tmp_path: Path):
    report = run_grid(small(MethodSpec("badnets")), Runner(Store(tmp_path)), engine=LocalEngine(("cpu", "cpu")))
    here = run_grid(small(MethodSpec("badnets")), filled)
    assert sorted(report.cards) == sorted(here.cards) and not report.refused
    for index, card in report.cards.items():
        assert card.key == here.cards[index].key
        assert card.metrics["acc"] == pytest.approx(here.cards[index].metrics["acc"], abs=0.05)
