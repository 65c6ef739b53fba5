"""Damaged and hostile grids through ``bench`` (planned, not run), and odd options through ``attack``."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from fuzz_tools import (
    NASTY,
    as_json,
    byte_changes,
    call,
    change_bytes,
    change_values,
    expect_result_or_one_line,
    fuzzed,
    value_changes,
)
from hypothesis import strategies as st

from backdoorlab import benchmark
from backdoorlab.benchmark import GridReport, Runner

CONFIGS = Path(__file__).parents[2] / "configs"
GRIDS = [yaml.safe_load(path.read_text()) for path in sorted(CONFIGS.glob("*.yaml"))]
GRIDS.append(
    {
        "name": "full",
        "seeds": [0, 1],
        "clean_fraction": 0.1,
        "retrain": False,
        "tasks": [
            {
                "dataset": "digits",
                "size": 16,
                "train_size": 100,
                "test_size": 50,
                "data_seed": 1,
                "model": "auto",
                "recipe": "smoke",
                "kind": "classifier",
                "recipe_changes": {"lr": 0.1, "milestones": [1, 2]},
            },
            {"dataset": "digits", "kind": "diffusion", "recipe": "smoke", "recipe_changes": {"steps": 5}},
        ],
        "attacks": ["none", "badnets", "dynamic", "baddiffusion", {"name": "badnets", "settings": {"rgb": [1, 2, 3]}}],
        "defenses": ["none", "ft", {"name": "anp", "settings": {"iterations": 5}}],
    }
)
RAW = (
    *("2024-01-01", "2024-01-01 10:00:00", "!!python/object:os.system x", "!!binary aGk=", "!!set {a, b}", "&a [*a]"),
    *("*nothing", "0x" + "f" * 100, "9" * 5000, "-" + "9" * 5000, "1:30", "1e-2", ".inf", ".nan", "<<", "=", "~", "'"),
    *('"', "|", "{", "[", "- - -", "? x", "%", "@x", "`x", "\t", "\x07", '"\\ud800"', '"\\0"', "[" * 200, "{a: " * 200),
    *("!!int x", "!x y", "&x y", "{<<: [1]}", "{<<: {a: 1}}", "{1: 2}", "{[1]: 2}", "{a: 1, a: 2}", "null", "", "# x"),
    *("\u2028", "\x85", "1_0", "0o17", "+", "-", ".", "e5"),
)
"""YAML that is no plain value, to stand where a value stood."""


def plan_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """``bench`` ends when its plan is made, ``attack`` when its data are loaded and its methods built."""

    def no_stage(*args: object, **kwargs: object) -> None:
        raise typer.Exit(0)

    monkeypatch.setattr(benchmark, "run_grid", lambda *args, **kwargs: GridReport(), raising=False)
    monkeypatch.setattr(Runner, "_execute", no_stage)


def bench(lab: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    plan_only(monkeypatch)
    (folder / "grid.yaml").write_bytes(content)
    expect_result_or_one_line(call("bench", folder / "grid.yaml", "--store", lab.store))


@fuzzed(st.tuples(st.sampled_from(range(len(GRIDS))), value_changes), quick=80)
def test_other_values(lab: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, drawn: Any) -> None:
    """Values of a grid replaced, dropped, doubled, renamed, swapped, nested."""
    bench(lab, folder, monkeypatch, as_json(change_values(GRIDS[drawn[0]], drawn[1])))


@fuzzed(
    st.tuples(st.sampled_from(range(len(GRIDS))), st.integers(0, 2**16 - 1), st.sampled_from(RAW), st.booleans()),
    quick=80,
)
def test_odd_yaml(lab: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, drawn: Any) -> None:
    """A value of a grid replaced by a date, a tag, an alias, a bracket, ..."""
    number, place, raw, flow = drawn
    marked = change_values(GRIDS[number], [("set", place, 0)])
    # The place of the change is the one value (or key) that became null.
    text = yaml.safe_dump(marked, default_flow_style=flow, width=10_000).replace("null", raw, 1)
    bench(lab, folder, monkeypatch, text.encode())


@fuzzed(st.tuples(st.integers(0, 9), byte_changes), quick=40)
def test_damaged_bytes(lab: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, drawn: Any) -> None:
    """Grid files cut, flipped and spliced."""
    files = sorted(CONFIGS.glob("*.yaml"))
    bench(lab, folder, monkeypatch, change_bytes(files[drawn[0] % len(files)].read_bytes(), drawn[1]))


FIELDS = ("lr", "epochs", "augment", "milestones", "optimizer", "momentum", "clip", "name", "steps", "epoch", "", "é")
OPTIONS = (
    "--set",
    "--recipe-set",
    "--poison-rate",
    "--target",
    "--seed",
    "--data-seed",
    "--train-size",
    "--test-size",
    "--size",
    "--model",
    "--recipe",
    "--dataset",
    "--kind",
    "--asset",
    "--device",
    "--root",
)


@fuzzed(
    st.tuples(
        st.sampled_from(("badnets", "dynamic", "none", "wanet", "baddiffusion", "adap_patch", "\x1b[1m")),
        st.lists(st.tuples(st.sampled_from(OPTIONS), st.sampled_from(FIELDS), st.sampled_from(NASTY)), max_size=3),
    ),
    quick=60,
)
def test_options_of_attack(lab: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, drawn: Any) -> None:
    """Odd values of options; data are loaded, nothing is trained."""
    plan_only(monkeypatch)
    name, options = drawn
    argv: list[str] = []
    for option, field, value in options:
        text = str(value).replace("\x00", "\\0")  # no system passes NUL characters to a program
        text = text.encode("utf-8", "ignore").decode() if "\ud800" in text else text
        argv += [option, f"{field}={text}" if option.endswith(("set", "asset")) else text]
    expect_result_or_one_line(call("attack", name, "--train-size=100", *argv, "--store", lab.store))


def test_every_raw_value_was_meant(tmp_path: Path) -> None:
    """The raw values are what they are here for: most are refused or odd in plain YAML, and none is there twice."""
    assert len(set(RAW)) == len(RAW)
    refused = 0
    for raw in RAW:
        try:
            yaml.safe_load(io.StringIO(f"a: {raw}"))
        except Exception:
            refused += 1
    assert refused > 10
