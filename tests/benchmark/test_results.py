from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from benchmark_cases import BADNETS, TINY
from scipy import stats

from backdoorlab.benchmark import Card, Experiment, MethodSpec, Results, Runner, Store, rows, table
from backdoorlab.benchmark.spec import stage_key
from backdoorlab.cli.main import run
from backdoorlab.core.errors import InputError
from backdoorlab.metrics import statistics


@pytest.fixture
def many(filled: Runner, tmp_path: Path) -> Store:
    """A store with the cards of five seeds: one real card, its seed and number changed and sealed anew."""
    store, source = Store(tmp_path), filled.store.runs("attack")[0].path / "card.json"
    for seed in range(5):
        content = json.loads(source.read_text())
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


def test_intervals_do_not_depend_on_the_blocks_they_are_drawn_in(monkeypatch: pytest.MonkeyPatch):
    values = [0.01 * i for i in range(37)]
    whole = statistics.bootstrap_ci(values)
    monkeypatch.setattr(statistics, "_BLOCK", 1000)
    assert statistics.bootstrap_ci(values) == whole


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


def _saved(store: Store, change: Callable[[dict], object]) -> None:
    """One more card, changed and sealed as if a run had written it."""
    content = json.loads((store.runs()[0].path / "card.json").read_text())
    content["spec"]["seed"] = 1000
    change(content)
    store.save(Card.model_validate(content | {"key": hashlib.sha256(repr(content).encode()).hexdigest()[:20]}))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c["spec"].update(seed=2**63), r"seed must be a 64-bit integer, got '9223372036854775808'"),
        (lambda c: c["spec"].update(seed="one"), r"seed must be a 64-bit integer, got 'one'"),
        (lambda c: c["spec"].update(seed=True), r"seed must be a 64-bit integer, got 'True'"),
        (lambda c: c["spec"].pop("seed"), r"lack 'seed'"),
        (lambda c: c["spec"].pop("task"), r"lack 'task'"),
        (lambda c: c["spec"]["task"].pop("dataset"), r"lack 'dataset'"),
        (lambda c: c["spec"].update(task=[]), r"cannot be tabulated"),
        (lambda c: c["spec"].update(attack="badnets"), r"cannot be tabulated"),
        (lambda c: c["spec"]["attack"].update(settings=[1]), r"cannot be tabulated"),
        (lambda c: c["spec"]["task"].update(model=7), r"model must be text, got '7'"),
        (lambda c: c["spec"]["attack"]["settings"].update(target=1e300), r"target must be a 64-bit integer"),
        (lambda c: c["spec"].update(clean_fraction="all"), r"clean_fraction must be a finite number"),
        (lambda c: c["metrics"].update(ACC=0.5), r"'acc' and 'ACC' differ in case alone"),
        (lambda c: c["metrics"].update(mine=1.0, Mine=2.0), r"differ in case alone"),
        (lambda c: c["metrics"].update(Seed=0.5), r"a metric cannot be called 'Seed'"),
        (lambda c: c["metrics"].update({"": 0.5}), r"a metric cannot be called ''"),
        (lambda c: c["metrics"].update(n=10**400), r"cannot be tabulated: int too large"),
    ],
)
def test_a_card_that_cannot_be_a_row_is_left_out(many: Store, change: Callable[[dict], object], reason: str):
    _saved(many, change)
    found = Results(many)
    assert len(found.rows()) == 5
    (refusal,) = found.refusals
    assert re.search(reason, refusal.reason) and "\n" not in refusal.reason
    assert found.table("asr", ("attack",))[0]["n"] == 5


def test_odd_metrics_of_single_cards_are_columns(many: Store):
    _saved(many, lambda c: c["metrics"].update({'a "quoted" one': 0.25, "größe": 2}))
    (row,) = [r for r in rows(many) if r["seed"] == 1000]
    assert row['a "quoted" one'] == 0.25 and row["größe"] == 2.0


def test_settings_are_those_that_differ_from_the_latest_defaults(many: Store):
    """A default that changed between two runs tells them apart, as a setting of the user's would."""
    for seed, size, changed in ((2000, 3, []), (2001, 5, []), (2002, 3, ["size"])):

        def change(card: dict, seed: int = seed, size: int = size, changed: list = changed) -> None:
            card["spec"]["seed"] = seed
            card["spec"]["attack"]["settings"] = {"size": size, "rate": 0.1}
            card["modality"], card["changed"] = "other", {"attack": changed}

        _saved(many, change)
    found = {r["seed"]: r["attack_settings"] for r in rows(many) if r["modality"] == "other"}
    assert found == {2000: '{"size": 3}', 2001: "{}", 2002: '{"size": 3}'}


def test_tables_do_not_load_torch(many: Store):
    code = (
        "import sys; from backdoorlab.cli.main import run; store, key = sys.argv[1:];"
        "kinds = ([], ['--json'], ['--csv'], ['--metric', 'asr']);"
        "codes = [run(['results', '--store', store, *more]) for more in kinds];"
        "codes += [run(['show', key, '--store', store])];"
        "print(codes, [m for m in ('torch', 'scipy', 'timm') if m in sys.modules], file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, str(many.root), many.runs()[0].key]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert ended.stderr.splitlines()[-1] == "[0, 0, 0, 0, 0] []", ended.stderr


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
    content = json.loads((many.runs()[0].path / "card.json").read_text())
    content["spec"]["attack"] = {"name": "from_a_plugin", "settings": {"x": 1, "y": 2}, "code": "0"}
    content["changed"] = {"attack": ["x"]}
    many.save(Card.model_validate(content | {"key": stage_key(content["spec"])}))
    assert [r["attack_settings"] for r in rows(many) if r["attack"] == "from_a_plugin"] == ['{"x": 1}']


def test_settings_tell_variants_apart(filled: Runner, tmp_path: Path):
    runner = Runner(Store(tmp_path))
    runner.run(Experiment(task=TINY, attack=BADNETS))
    runner.run(Experiment(task=TINY, attack=MethodSpec("badnets", {"size": 3})))
    assert len(table(runner.store, ("attack", "attack_settings"))) == 2
    (mixed,) = table(runner.store, ("attack",))
    assert mixed["n"] == 2


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("results", "--metric", ""), "unknown metric ''"),
        (("results", "--group-by", ","), "--group-by: expected column names"),
        (("results", "--json", "--csv"), "--json and --csv exclude each other"),
        (("list", "attacks", "--json", "--markdown"), "--json and --markdown exclude each other"),
        (("attack", "badnets", "--seed", "9223372036854775808"), "--seed"),
        (("attack", "badnets", "--data-seed", "9223372036854775808"), "--data-seed"),
        (("quickstart", "--seed", "9223372036854775808"), "--seed"),
    ],
)
def test_options_that_make_no_sense(
    many: Store, command: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
):
    where = () if command[0] == "list" else ("--store", str(many.root))
    assert run([*command, *where]) == 2
    told = capsys.readouterr()
    assert message in told.err and told.out == ""


def test_a_large_table_is_as_wide_as_its_content(many: Store, capsys: pytest.CaptureFixture[str], monkeypatch):
    """Columns of plain text hold the same cells as the table that is fitted to a window."""
    monkeypatch.setattr("backdoorlab.cli.results._MANY", 2)
    assert run(["results", "--store", str(many.root)]) == 0
    title, head, *lines = capsys.readouterr().out.splitlines()
    assert "dataset: digits" in title and head.split()[:4] == ["key", "attack", "defense", "seed"]
    assert len(lines) == 5 and len({len(line) for line in (head, *lines)}) == 1
    wanted = [[r["key"][:8], "badnets", "none", str(r["seed"])] for r in rows(many)]
    assert [line.split()[:4] for line in lines] == wanted


def test_a_card_without_a_task_is_shown_in_one_line(many: Store, capsys: pytest.CaptureFixture[str]):
    _saved(many, lambda c: c["spec"].pop("task"))
    (bad,) = Results(many).refusals
    assert run(["show", Path(bad.path).name, "--store", str(many.root)]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and "card.json: lacks 'task'" in told[0]
