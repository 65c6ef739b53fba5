"""What a grid will cost: what is stored costs nothing, and the rest is scaled from what is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from backdoorlab.benchmark import Grid, LocalEngine, MethodSpec, Runner, Store, plan, run_grid
from backdoorlab.benchmark import planner as planner_module
from backdoorlab.benchmark.planner import Budget, Cost, Forecast, forecast
from backdoorlab.core.errors import InputError
from backdoorlab.tasks import TaskSpec

TRAINING = 100.0


@pytest.fixture
def grid() -> Grid:
    task = TaskSpec(recipe="smoke", recipe_changes=(("min_steps", 30),))
    return Grid("tiny", (task,), (MethodSpec("badnets"),), (MethodSpec("clp"), MethodSpec("strip")), (0,))


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.setattr(planner_module, "time_training", lambda task, device: TRAINING)
    return Runner(Store(tmp_path / "store"))


def by_label(forecasted: Forecast) -> dict[str, Cost]:
    return {cost.stage.label: cost for cost in forecasted.costs}


def test_nothing_known_is_assumed_from_the_kind(grid: Grid, runner: Runner) -> None:
    costs = forecast(plan(grid), runner)
    assert {cost.basis for cost in costs.costs} == {"assumed"}
    named = by_label(costs)
    assert named["digits / benign / seed 0"].seconds == TRAINING
    assert named["digits / badnets / clp / seed 0"].seconds == pytest.approx(0.3 * TRAINING)
    assert named["digits / badnets / strip / seed 0"].megabytes < named["digits / badnets / seed 0"].megabytes
    assert costs.seconds == pytest.approx(2 * TRAINING * (1 + 0.3 + 0.1))


def test_what_ran_is_stored_and_says_what_the_rest_costs(grid: Grid, runner: Runner) -> None:
    run_grid(grid, runner)
    again = forecast(plan(grid), runner)
    assert {cost.basis for cost in again.costs} == {"stored"}
    assert again.seconds == again.megabytes == 0
    other_seed = Grid(grid.name, grid.tasks, grid.attacks, grid.defenses, (1,))
    assert {cost.basis for cost in forecast(plan(other_seed), runner).costs} == {"same setting"}
    task = TaskSpec(recipe="smoke", recipe_changes=(("min_steps", 40),))
    elsewhere = by_label(forecast(plan(Grid("other", (task,), grid.attacks, grid.defenses, (0,))), runner))
    benign = runner.store.runs("benign")[0].card()
    planted = runner.store.runs("attack")[0].card()
    ratio = sum(planted.seconds.values()) / sum(benign.seconds.values())
    assert elsewhere["digits / badnets / seed 0"].basis == "other data"
    assert elsewhere["digits / badnets / seed 0"].seconds == pytest.approx(ratio * TRAINING)


def test_a_stage_that_cannot_be_run_is_said(grid: Grid, runner: Runner) -> None:
    impossible = Grid("x", grid.tasks, (MethodSpec("badnets", {"size": 99}),), grid.defenses, (0,))
    costs = [cost for cost in forecast(plan(impossible), runner).costs if cost.seconds is None]
    assert all("99" in cost.basis for cost in costs)


def test_a_budget_begins_nothing_that_would_end_too_late(grid: Grid, runner: Runner) -> None:
    """The benign model fits, the attack does not, hence neither do its defenses; the next call does the rest."""
    stages = plan(grid)
    seconds = {"digits / benign / seed 0": 1.0, "digits / benign / clp / seed 0": 1.0}
    costs = Forecast(tuple(Cost(stage, seconds.get(stage.label, 1e6), 0.0, "assumed") for stage in stages))
    budget = Budget(costs, 1000.0)
    report = run_grid(grid, runner, engine=LocalEngine(admit=budget))
    assert {stages[i].label for i in report.cards} == set(seconds)
    assert budget.postponed == {s.index for s in stages} - set(report.cards)
    rest = run_grid(grid, runner)
    assert len(rest.cards) == len(stages)
    assert rest.reused == set(report.cards)


def test_several_devices_cannot_leave_stages_out() -> None:
    with pytest.raises(InputError, match="one device only, got 2"):
        LocalEngine(("cpu", "cpu"), lambda stage: True)


@pytest.mark.parametrize("name", ["gpu-core", "gpu-more", "cifar10-cpu", "modalities-cpu", "quick"])
def test_the_grids_that_come_along_are_valid(name: str) -> None:
    grid = Grid.from_yaml(Path(__file__).parents[2] / "configs" / f"{name}.yaml")
    assert grid.name == name
    stages: list[Any] = plan(grid)
    assert len(stages) > 10
