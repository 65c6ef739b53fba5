from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from benchmark_cases import BADNETS, TINY
from scipy import stats

from backdoorlab.benchmark import Card, Experiment, MethodSpec, Results, Runner, Store, rows, table
from backdoorlab.benchmark.spec import stage_key
from backdoorlab.core.errors import InputError


@pytest.fixture
def many(filled: Runner, tmp_path: Path) -> Store:
    """A store with the cards of five seeds: one real card, its seed and number changed and sealed anew."""
    store, run = Store(tmp_path), filled.store.runs("attack")[0]
    for seed in range(5):
        content = json.loads((run.path / "card.json").read_text())
        content["spec"]["seed"] = seed
        content["metrics"]["asr"] = 0.5 + 0.1 * seed
        if seed == 4:
            content["metrics"]["ra"], content["null_reasons"]["ra"] = None, "for the test"
        store.save(Card.model_validate(content | {"key": stage_key(content["spec"])}))
    return store


def test_rows_are_flat(filled: Runner):
    first = [r for r in rows(filled.store) if r["clean_fraction"] in (0.0, 0.05) and r["seed"] == 0]  # others add more
    found = {(r["attack"], r["defense"]): r for r in first}
    assert {("benign", "none"), ("benign", "ft"), ("badnets", "none"), ("badnets", "ft")} <= set(found)
    row = found["badnets", "ft"]
    assert json.loads(row["defense_settings"]) == {"batch_size": 16, "epochs": 4}
    assert row["poison_rate"] == 0.1 and row["train_size"] == 400 and row["seed"] == 0
    assert row["parent"] == f"attack/{found['badnets', 'none']['key']}"
    assert found["benign", "none"]["asr"] is None
    assert found["badnets", "none"]["seconds"] > 0


def test_table_means_and_intervals(many: Store):
    (row,) = table(many, ("attack", "defense"), "asr")
    assert (row["attack"], row["defense"], row["n"], row["missing"]) == ("badnets", "none", 5, 0)
    assert row["mean"] == pytest.approx(0.7)
    values = ([0.5, 0.6, 0.7, 0.8, 0.9],)
    other = stats.bootstrap(values, lambda v, axis: v.mean(axis), n_resamples=20_000, method="percentile", rng=1)
    assert row["low"] == pytest.approx(other.confidence_interval.low, abs=0.01)
    assert row["high"] == pytest.approx(other.confidence_interval.high, abs=0.01)
    (lacking,) = table(many, ("attack",), "ra")
    assert (lacking["n"], lacking["missing"]) == (4, 1)
    one = table(many, ("seed",), "asr")
    assert [r["seed"] for r in one] == [0, 1, 2, 3, 4]
    assert {(r["n"], r["low"], r["high"]) for r in one} == {(1, None, None)}
    assert table(many, ("seed",), "auroc")[0]["mean"] is None


def test_torn_cards_are_listed_and_left_out(many: Store):
    runs = many.runs()
    (runs[0].path / "card.json").write_text('{"schema_version": 1')
    (runs[1].path / "card.json").unlink()
    shutil.copytree(runs[2].path, runs[2].path.with_name("not-a-key"))
    (many.root / "attack" / "stray.txt").write_text("")
    found = Results(many)
    assert len(found.rows()) == 3
    assert len(found.refusals) == 4
    assert all("\n" not in r.reason for r in found.refusals)


def test_wrong_columns_are_named(many: Store):
    with pytest.raises(InputError, match=r"unknown metric 'asrr'.*'asr'"):
        table(many, ("attack",), "asrr")
    with pytest.raises(InputError, match=r"cannot group by 'atack'.*'attack'"):
        table(many, ("atack",))
    with pytest.raises(InputError, match="group by at least one"):
        table(many, ())
    with pytest.raises(InputError, match="query failed"):
        Results(many).sql("SELEC 1")


def test_sql_and_empty_store(many: Store, tmp_path: Path):
    assert Results(many).sql("SELECT max(asr) AS top FROM runs WHERE attack = 'badnets'") == [
        {"top": pytest.approx(0.9)}
    ]
    assert len(Results(many).rows("seed < 2")) == 2
    empty = Results(Store(tmp_path / "empty"))
    assert empty.rows() == [] and empty.table("asr") == []


def test_methods_that_are_not_installed_are_still_shown(many: Store):
    run = many.runs()[0]
    content = json.loads((run.path / "card.json").read_text())
    content["spec"]["attack"] = {"name": "from_a_plugin", "settings": {"x": 1}, "code": "0"}
    many.save(Card.model_validate(content | {"key": stage_key(content["spec"])}))
    assert [r["attack_settings"] for r in rows(many) if r["attack"] == "from_a_plugin"] == ['{"x": 1}']


def test_settings_tell_variants_apart(filled: Runner, tmp_path: Path):
    runner = Runner(Store(tmp_path))
    runner.attack(Experiment(task=TINY, attack=BADNETS))
    runner.attack(Experiment(task=TINY, attack=MethodSpec("badnets", {"size": 3})))
    assert len(table(runner.store, ("attack", "attack_settings"))) == 2
    (mixed,) = table(runner.store, ("attack",))
    assert mixed["n"] == 2
