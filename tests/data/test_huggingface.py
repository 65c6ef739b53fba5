"""The adapter for Hugging Face data sets, against a stand-in of the few calls that it makes."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from backdoorlab.core.errors import InputError, MissingExtra
from backdoorlab.data import load_dataset


class Table(list):
    """Rows with the interface of ``datasets.Dataset`` that is used."""

    def __init__(self, rows: list[dict[str, Any]], names: list[str] | None = None) -> None:
        super().__init__(rows)
        self.column_names = list(rows[0])
        self.features = {"label": types.SimpleNamespace(**({"names": names} if names else {}))}

    def __getitem__(self, key):  # type: ignore[override]
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module ``datasets`` that knows one data set, ``hub.found``."""
    module = types.ModuleType("datasets")
    module.load_from_disk = lambda folder: module.found  # type: ignore[attr-defined]
    module.load_dataset = lambda name, **options: module.found  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def _texts(count: int, column: str = "text", first: int = 0) -> Table:
    return Table([{column: f"text {i}", "label": first + i % 2} for i in range(count)], ["no", "yes"])


def test_without_the_library_the_error_names_the_pip_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"pip install 'backdoorlab\[hf\]'"):
        load_dataset("hf:imdb")


def test_texts(hub: types.ModuleType, tmp_path: Path):
    hub.found = {"train": _texts(6), "test": _texts(4)}
    data = load_dataset(f"hf:{tmp_path}")
    assert data.modality == "text" and data.train.classes == ("no", "yes")
    assert data.train.inputs[3] == "text 3" and data.test.labels.tolist() == [0, 1, 0, 1]
    with pytest.raises(InputError, match="is text and cannot be rescaled"):
        load_dataset(f"hf:{tmp_path}", size=16)


def test_pictures(hub: types.ModuleType, tmp_path: Path):
    def table(count: int) -> Table:
        return Table([{"img": Image.new("RGB", (9, 12), (i, 0, 0)), "label": i % 3} for i in range(count)])

    hub.found = {"train": table(6), "validation": table(3)}
    data = load_dataset(f"hf:{tmp_path}")
    assert data.train.inputs.shape == (6, 3, 12, 9) and data.train.inputs[:, 0, 0, 0].tolist() == list(range(6))
    assert data.train.classes == ("0", "1", "2")
    assert load_dataset(f"hf:{tmp_path}", size=8).test.inputs.shape == (3, 3, 8, 8)


def test_names_on_the_hub_are_fetched_only_when_asked(hub: types.ModuleType):
    hub.found = {"train": _texts(6), "test": _texts(4)}
    with pytest.raises(InputError, match="pass --download"):
        load_dataset("hf:someone/reviews")
    assert len(load_dataset("hf:someone/reviews", download=True).train) == 6


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"train": _texts(6)}, r"needs the splits 'train' and 'test' or 'validation', found \['train'\]"),
        ({"train": _texts(6, "review"), "test": _texts(4, "review")}, r"found \['review', 'label'\]"),
        ({"train": _texts(6), "test": _texts(4, first=-1)}, "labels must be integers from 0 on"),
    ],
)
def test_unsuitable_sets_are_refused(hub: types.ModuleType, tmp_path: Path, found: dict[str, Table], message: str):
    hub.found = found
    with pytest.raises(InputError, match=message):
        load_dataset(f"hf:{tmp_path}")


def test_the_library_s_own_errors_become_input_errors(hub: types.ModuleType, tmp_path: Path):
    def fail(folder: str) -> None:
        raise FileNotFoundError("no dataset_info.json")

    hub.load_from_disk = fail
    with pytest.raises(InputError, match="cannot be loaded: no dataset_info"):
        load_dataset(f"hf:{tmp_path}")
