"""The adapter for Hugging Face data sets, against a stand-in of the few calls that it makes."""

from __future__ import annotations

import io
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

    def cast_column(self, column: str, feature: dict[str, bool]) -> Table:
        """The column undecoded; nothing else may be asked for."""
        assert feature == {"decode": False}
        return self


def _png(color: object, mode: str = "RGB") -> dict[str, object]:
    content = io.BytesIO()
    Image.new(mode, (9, 12), color).save(content, "PNG")
    return {"bytes": content.getvalue(), "path": None}


def _fetched(module: types.ModuleType, options: dict[str, Any]) -> Any:
    assert options["trust_remote_code"] is False
    return module.found


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module ``datasets`` that knows one data set, ``hub.found``."""
    module = types.ModuleType("datasets")
    module.load_from_disk = lambda folder: module.found  # type: ignore[attr-defined]
    module.load_dataset = lambda name, **options: _fetched(module, options)  # type: ignore[attr-defined]
    module.Image = lambda **options: options  # type: ignore[attr-defined]
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
        return Table([{"img": _png((i, 0, 0)), "label": i % 3} for i in range(count)])

    hub.found = {"train": table(6), "validation": table(3)}
    data = load_dataset(f"hf:{tmp_path}")
    assert data.train.inputs.shape == (6, 3, 12, 9) and data.train.inputs[:, 0, 0, 0].tolist() == list(range(6))
    assert data.train.classes == ("0", "1", "2")
    assert load_dataset(f"hf:{tmp_path}", size=8).test.inputs.shape == (3, 3, 8, 8)


def test_pictures_pass_through_the_same_door_as_files(hub: types.ModuleType, tmp_path: Path):
    def table(*cells: object) -> Table:
        return Table([{"image": cell, "label": i % 2} for i, cell in enumerate(cells)])

    hub.found = {"train": table(_png(40_000, "I;16"), _png(7, "L")), "test": table(_png(7, "L"))}
    assert load_dataset(f"hf:{tmp_path}").train.inputs.flatten(1)[:, 0].tolist() == [round(40_000 / 257), 7]
    eps = {"bytes": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 12\n%%EndComments\n", "path": None}
    Image.new("L", (9, 12)).save(tmp_path / "local.png")
    for cell, message in (
        (eps, "row 1: it is of none of the known formats"),
        ({"bytes": None, "path": "https://example.com/x.png"}, r"found no image file .*row 1 \(https"),
        ({"bytes": None, "path": None}, "row 1 has no picture"),
        (None, "row 1 has no picture"),
    ):
        hub.found = {
            "train": table({"bytes": None, "path": str(tmp_path / "local.png")}, cell),
            "test": table(_png(1, "L")),
        }
        with pytest.raises(InputError, match=message):
            load_dataset(f"hf:{tmp_path}")


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
        ({"train": _texts(6), "test": _texts(4, "body")}, r"the test part lacks the columns \['text'\]"),
        ({"train": _texts(6), "test": Table([{"text": None, "label": 0}])}, "row 0 has no text in column 'text'"),
        ({"train": _texts(6), "test": Table([{"text": "a", "label": None}])}, "cannot be loaded"),
        (
            {"train": _texts(6), "test": Table([{"text": "a", "label": 0}], ["yes", "no"])},
            "number their classes differ",
        ),
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
