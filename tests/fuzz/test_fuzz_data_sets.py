"""Damaged csv files and folders of pictures and sounds as data sets of ``attack`` (loaded, not trained on)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fuzz_tools import (
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
from test_fuzz_grids import plan_only
from test_fuzz_sample_files import IMAGES, SOUNDS

TABLES = [
    b"text,label\n" + b"".join(b"good film %d,1\nbad film %d,0\n" % (i, i) for i in range(6)),
    b'"label","text"\r\n' + b'"pos","a ""quoted"" text, with a comma"\r\n"neg","two\nlines"\r\n' * 5,
    b"text;label\n" + b"a;x\nb;y\n" * 5,
    "text,label\n".encode("utf-16") + "gut,1\nschlecht,0\n".encode("utf-16-le") * 4,
]
EXPORT = {"format": "backdoorlab-export", "version": 1, "classes": ["a", "b"], "dataset": {"name": "x"}}


@fuzzed(st.tuples(st.sampled_from(range(len(TABLES))), byte_changes, st.sampled_from((".csv", ".tsv"))), quick=60)
def test_tables(lab: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, drawn: Any) -> None:
    """Tables cut, flipped and spliced."""
    plan_only(monkeypatch)
    number, changes, suffix = drawn
    path = folder / f"x{suffix}"
    path.write_bytes(change_bytes(TABLES[number], changes))
    reply = call("attack", "badnets", "--dataset", f"csv:{path}", "--recipe", "smoke", "--store", lab.store)
    expect_result_or_one_line(reply)


ODD = ("a", "b", ".hidden", "é", "a\nb", "\x1b[1m", "[red]", "a" * 200, "-", " ", "train", "test", "\udcff")
names = st.one_of(
    st.sampled_from(ODD),
    st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=8).filter(
        lambda name: name not in (".", "..")
    ),
)


@fuzzed(
    st.tuples(
        st.booleans(),
        st.lists(names, min_size=1, max_size=3, unique=True),
        st.integers(0, 9),
        byte_changes,
        st.integers(0, 9),
    ),
    quick=60,
)
def test_folders(lab: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, drawn: Any) -> None:
    """Folders with odd names of classes and one damaged file."""
    plan_only(monkeypatch)
    sounds, classes, number, changes, odd = drawn
    base = folder / "set"
    shutil.rmtree(base, ignore_errors=True)
    table = SOUNDS if sounds else IMAGES
    suffixes = [s for s in table if s != ".npy"]
    suffix = suffixes[number % len(suffixes)]
    for name in classes:
        (base / name).mkdir(parents=True)
        for i in range(3):
            (base / name / f"{i}{suffix}").write_bytes(table[suffix][0])
    damaged = change_bytes(table[suffix][number % len(table[suffix])], changes)
    if odd < 8:
        (base / classes[0] / f"damaged{suffix if odd else '.gif'}").write_bytes(damaged)
    reply = call("attack", "badnets", "--dataset", f"folder:{base}", "--recipe", "smoke", "--store", lab.store)
    expect_result_or_one_line(reply)


@fuzzed(st.tuples(value_changes, st.booleans()), quick=30)
def test_records_of_exports(lab: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, drawn: Any) -> None:
    """The record that an export leaves beside its data, changed and read again with the data."""
    plan_only(monkeypatch)
    changes, images = drawn
    base = folder / ("images" if images else "texts")
    run = lab.image if images else lab.text
    if not base.exists():
        assert call("export", run, "--out", base, "--format", "folder", "--store", lab.store).code == 0
        for path in list(base.glob("*.json")):
            path.with_suffix(".kept").write_bytes(path.read_bytes())
    records = sorted(base.glob("*.kept"))
    assert records, sorted(base.iterdir())
    for kept in records:
        changed = as_json(change_values(json.loads(kept.read_text()), changes))
        kept.with_suffix(".json").write_bytes(changed)
    source = f"folder:{base}" if images else f"csv:{base}"
    expect_result_or_one_line(call("attack", "none", "--dataset", source, "--recipe", "smoke", "--store", lab.store))
