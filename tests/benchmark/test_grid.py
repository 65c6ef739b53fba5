from __future__ import annotations

from pathlib import Path

import pytest
from benchmark_cases import FT, TINY

from backdoorlab.benchmark import Grid, LocalEngine, MethodSpec, Runner, Store, plan, run_grid
from backdoorlab.benchmark import store as store_module
from backdoorlab.benchmark.store import StoreError
from backdoorlab.core.errors import InputError

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
        "digits / benign / seed 0", "digits / benign / ft / seed 0",
        "digits / badnets / seed 0", "digits / badnets / ft / seed 0",
    ]  # fmt: skip
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
        ({"tasks": "[{dataset: digits, recipe_changes: {epoch: 3}}]"}, r"recipe field 'epoch'.*'epochs'"),
        ({"tasks": "[{dataset: digits, kind: clasifier}]"}, r"unknown kind of task 'clasifier'"),
        ({"tasks": "[{recipe: smoke}]"}, r"'tasks\[0\].dataset' is missing"),
        ({"attacks": "[]"}, r"'attacks' is empty"),
        ({"seeds": ""}, r"'seeds' is missing"),
        ({"seeds": "[a]"}, r"'seeds\[0\]'.*got 'a'"),
        ({"seeds": "[-1]"}, r"'seeds\[0\]'.*got -1"),
        ({"clean_fraction": "5"}, r"'clean_fraction'"),
        ({"tasks": "[{dataset: digits"}, "not valid YAML"),
    ],
)
def test_mistakes_are_named_with_the_file(tmp_path: Path, changes: dict[str, str], message: str):
    path = write(tmp_path, **changes)
    with pytest.raises(InputError, match=message) as caught:
        Grid.from_yaml(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_missing_file_and_foreign_content(tmp_path: Path):
    with pytest.raises(InputError, match="cannot be read"):
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
        "not run: what it stands on was refused",
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
