"""What a card says of a training that broke down."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from benchmark_cases import BADNETS, TINY

from backdoorlab.benchmark import Experiment, Runner, Store
from backdoorlab.training.watch import Watch


@pytest.fixture
def breaks_down(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the n-th epochs that the watch judges, counted over all trainings, collapses."""

    def arrange(*epochs: int) -> None:
        count, judge = 0, Watch.judge

        def broken(watch: Watch, losses: list[float]) -> float | None:
            nonlocal count
            count += 1
            verdict = judge(watch, losses)
            return 99.0 if count in epochs else verdict

        monkeypatch.setattr(Watch, "judge", broken)

    return arrange


@pytest.mark.parametrize("attack", [BADNETS, None], ids=["attack", "benign"])
def test_a_card_carries_a_collapse_that_was_taken_back(
    attack: object, tmp_path: Path, breaks_down: Callable[..., None]
) -> None:
    breaks_down(3)
    runner = Runner(Store(tmp_path))
    card = runner.run(Experiment(task=TINY, attack=attack)).card
    assert card.status == "ok"
    (collapse,) = card.notes["collapses"]
    assert (collapse["epoch"], collapse["loss"]) == (3, 99.0)
    assert "collapsed in epoch 3" in card.notes["warnings"][0]
    log = runner.store.run(card.stage, card.key).log()
    assert log[-1] == collapse


def test_a_second_collapse_is_a_failed_run_without_numbers(tmp_path: Path, breaks_down: Callable[..., None]) -> None:
    breaks_down(3, 5)
    card = Runner(Store(tmp_path)).run(Experiment(task=TINY, attack=BADNETS)).card
    assert card.status == "failed"
    assert "for the second time" in str(card.reason)
    assert card.metrics.get("asr") is None
