"""Damaged stores through every command that reads them: bytes changed, or values, with digests made good again."""

from __future__ import annotations

import contextlib
import hashlib
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
from test_fuzz_sample_files import picture

from backdoorlab.benchmark.card import record_digest

DOORS = (
    ("show", "{run}"),
    ("show", "{run}", "--json"),
    ("show", "{run}", "--figure", "f.png", "--force"),
    ("results",),
    ("results", "--json"),
    ("results", "--csv"),
    ("results", "--group-by", "attack", "--metric", "acc"),
    ("predict", "x.png", "--run", "{run}"),
    ("stamp", "x.png", "--run", "{run}", "--out", "o", "--force"),
    ("export", "{run}", "--out", "e"),
    ("defend", "ft", "--run", "{run}"),
    ("defend", "ac", "--run", "{run}"),
)
RUNS = ("image", "benign", "repair")


def open_door(lab: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, store: Path, run: str, door: int) -> None:
    plan_only(monkeypatch)
    if not (folder / "x.png").exists():
        (folder / "x.png").write_bytes(picture("PNG"))
    argv = [word.format(run=run) for word in DOORS[door]]
    expect_result_or_one_line(call(*argv, "--store", store))
    shutil.rmtree(folder / "e", ignore_errors=True)


def copied(lab: Any, folder: Path) -> Path:
    store = folder / "store"
    if not store.exists():
        shutil.copytree(lab.store, store)
    return store


def place_of(lab: Any, store: Path, which: str) -> Path:
    key = getattr(lab, which)
    return next(p for p in store.glob(f"*/{key}") if p.is_dir())


@fuzzed(
    st.tuples(st.sampled_from(RUNS), st.integers(0, 99), byte_changes, st.sampled_from(range(len(DOORS)))), quick=50
)
def test_damaged_files(lab: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, drawn: Any) -> None:
    """A file of an artifact cut, flipped or spliced."""
    which, number, changes, door = drawn
    store = copied(lab, folder)
    place = place_of(lab, store, which)
    files = sorted(place.iterdir())
    path = files[number % len(files)]
    before = path.read_bytes()
    path.write_bytes(change_bytes(before, changes))
    try:
        open_door(lab, folder, monkeypatch, store, place.name, door)
    finally:
        path.write_bytes(before)


def sealed(card: Any) -> bytes:
    """A card whose digest is right, if it can have one."""
    with contextlib.suppress(TypeError, ValueError, RecursionError):
        card["digest"] = record_digest(card)
    return as_json(card)


@fuzzed(st.tuples(st.sampled_from(RUNS), value_changes, st.sampled_from(range(len(DOORS))), st.booleans()), quick=50)
def test_other_cards(lab: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, drawn: Any) -> None:
    """Values of a card changed, with a right digest or without."""
    which, changes, door, resealed = drawn
    store = copied(lab, folder)
    place = place_of(lab, store, which)
    before = (place / "card.json").read_bytes()
    card = change_values(json.loads(before), changes)
    (place / "card.json").write_bytes(sealed(card) if resealed else as_json(card))
    try:
        open_door(lab, folder, monkeypatch, store, place.name, door)
    finally:
        (place / "card.json").write_bytes(before)


@fuzzed(st.tuples(st.sampled_from(RUNS), value_changes, st.sampled_from(range(len(DOORS)))), quick=50)
def test_other_records(lab: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, drawn: Any) -> None:
    """Values of record.json changed, and the card's digests with them."""
    which, changes, door = drawn
    store = copied(lab, folder)
    place = place_of(lab, store, which)
    before = {name: (place / name).read_bytes() for name in ("card.json", "record.json")}
    changed = as_json(change_values(json.loads(before["record.json"]), changes))
    card = json.loads(before["card.json"])
    card["digests"]["record.json"] = hashlib.sha256(changed).hexdigest()
    (place / "record.json").write_bytes(changed)
    (place / "card.json").write_bytes(sealed(card))
    try:
        open_door(lab, folder, monkeypatch, store, place.name, door)
    finally:
        for name, content in before.items():
            (place / name).write_bytes(content)


@fuzzed(st.tuples(st.integers(0, 99), st.integers(0, 99), st.integers(0, 99), st.integers(0, 9)), quick=30)
def test_other_tensors(lab: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, drawn: Any) -> None:
    """A tensor of an artifact dropped, renamed, or replaced by one of another shape or type, with right digests."""
    import torch
    from safetensors.torch import load, save

    number, tensor, what, pick = drawn
    store = copied(lab, folder)
    place = place_of(lab, store, RUNS[number % len(RUNS)])
    files = sorted(place.glob("*.safetensors"))
    path = files[number // 3 % len(files)]
    before = {name: (place / name).read_bytes() for name in ("card.json", path.name)}
    tensors = load(before[path.name])
    if not tensors:
        return
    name = sorted(tensors)[tensor % len(tensors)]
    value = tensors.pop(name)
    nan = torch.full_like(value, float("nan")) if value.is_floating_point() else ~value
    choices = (
        None,
        value[:0] if value.dim() else value[None],
        value[None],
        value.double(),
        value.to(torch.int64),
        nan,
        value.flatten(),
        torch.zeros(3, 3, 3),
        value.to(torch.bool),
    )
    chosen = choices[what % len(choices)]
    if chosen is not None:
        tensors[name if pick else "other"] = chosen.contiguous()
    changed = save(tensors)
    card = json.loads(before["card.json"])
    card["digests"][path.name] = hashlib.sha256(changed).hexdigest()
    path.write_bytes(changed)
    (place / "card.json").write_bytes(sealed(card))
    try:
        open_door(lab, folder, monkeypatch, store, place.name, (7, 8, 9, 2, 10)[pick % 5])
    finally:
        for name, content in before.items():
            (place / name).write_bytes(content)
