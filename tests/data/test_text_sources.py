"""Tables of texts that users bring, and the published ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from backdoorlab.core.errors import ArtifactError, InputError
from backdoorlab.data import load_dataset


def _file(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_csv_file_is_split_per_class(tmp_path: Path):
    rows = "".join(f'"text, {i}",{"ham" if i % 2 else "spam"}\r\n' for i in range(20))
    data = load_dataset(f"csv:{_file(tmp_path / 'mail.csv', 'text,label' + chr(10) + rows)}")
    assert data.modality == "text" and data.train.classes == ("ham", "spam")
    assert (len(data.train), len(data.test)) == (16, 4) and data.train.inputs.dtype == object
    for split in (data.train, data.test):
        for text, label in zip(split.inputs, split.labels.tolist(), strict=True):
            number = int(text.removeprefix("text, "))
            assert split.classes[label] == ("ham" if number % 2 else "spam")


def test_columns_may_be_anywhere_and_labels_are_sorted_by_value(tmp_path: Path):
    rows = "".join(f"x,{label},text {i} {label}\n" for label in (10, 9, 2) for i in range(5))
    data = load_dataset(f"csv:{_file(tmp_path / 't.csv', '﻿id,Label,Sentence' + chr(10) + rows)}")
    assert data.train.classes == ("2", "9", "10")
    assert all(text.endswith(data.train.classes[k]) for text, k in zip(data.train.inputs, data.train.labels))  # noqa: B905


def test_a_folder_with_two_files(tmp_path: Path):
    _file(tmp_path / "train.csv", "text,label\na,0\nb,1\n")
    _file(tmp_path / "test.csv", "text,label\nc,1\n")
    data = load_dataset(f"csv:{tmp_path}")
    assert data.train.inputs.tolist() == ["a", "b"] and data.test.labels.tolist() == [1]
    _file(tmp_path / "test.csv", "text,label\nc,2\n")
    with pytest.raises(InputError, match=r"labels \['2'\] are not among the classes"):
        load_dataset(f"csv:{tmp_path}")


def test_tab_separated_files(tmp_path: Path):
    rows = "".join(f"one, two {i}\t{i % 2}\n" for i in range(10))
    data = load_dataset(f"csv:{_file(tmp_path / 't.tsv', 'sentence' + chr(9) + 'label' + chr(10) + rows)}")
    assert data.train.inputs[0].startswith("one, two")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("review,stars\na,1\n", r"expected columns 'text' \(or 'sentence'\) and 'label'.*\['review', 'stars'\]"),
        ("", "expected columns"),
        ("text,label\n", "no rows"),
        ("text,label\na,0\nb\n", "line 3: expected 2 cells"),
        ("text,label\na,0\n  ,1\n", "line 3"),
        ("text,label\na,0\nb,1,2\n", "line 3"),
        ("text,label\na,0\nb,1\nc,1\n", "class '0' has 1 sample"),
        (b"text,label\n\xff\xfe,0\n", "cannot be read as UTF-8"),
        ("text,label\na,0\nb\0c,1\n", "line 3: holds a NUL character"),
        ("text,label\na,0\nb,1\0\n", "line 3: holds a NUL character"),
        ("text,label\na,0\nb,1\n" + "x" * 10_000_000 + ",1\n", "after line 3: .* a cell is too long"),
        ('text,label\na,0\n"b,1\n' + "c,1\n" * 50_000, "a cell is too long, perhaps an unclosed quote"),
        ("x" * 200_000 + ",label\na,0\n", "a cell is too long"),
    ],
)
def test_bad_tables_are_named(tmp_path: Path, content: str | bytes, message: str):
    with pytest.raises(InputError, match=message):
        load_dataset(f"csv:{_file(tmp_path / 'bad.csv', content)}")


def test_a_table_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = _file(tmp_path / "t.csv", "text,label\n")

    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"t\.csv cannot be read.*Permission denied"):
        load_dataset(f"csv:{path}")
    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(InputError, match=r"t\.csv cannot be used: Permission denied"):
        load_dataset(f"csv:{path}")


def test_a_byte_order_mark_changes_nothing(tmp_path: Path):
    content = "text,label\n" + "".join(f"w{i},{i % 2}\n" for i in range(8))
    plain, marked = (_file(tmp_path / f"{k}.csv", mark + content) for k, mark in enumerate(("", "\ufeff")))
    first, second = load_dataset(f"csv:{plain}"), load_dataset(f"csv:{marked}")
    assert list(first.train.inputs) == list(second.train.inputs)


def test_a_missing_table_is_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"no file .*none\.csv"):
        load_dataset(f"csv:{tmp_path}/none.csv")


@pytest.mark.parametrize("name", ["sst2", "olid"])
def test_other_editions_are_refused(tmp_path: Path, name: str):
    (tmp_path / name).mkdir()
    _file(tmp_path / name / "train.tsv", "sentence\tlabel\nfine\t1\n")
    with pytest.raises(ArtifactError, match=r"train\.tsv: its sha256 is .* csv:PATH"):
        load_dataset(name, root=tmp_path)
    (tmp_path / name / "train.tsv").unlink()
    with pytest.raises(InputError, match=r"train\.tsv is missing"):
        load_dataset(name, root=tmp_path)


@pytest.mark.parametrize(("name", "file"), [("hsol", "labeled_data.csv"), ("ag_news", "test.csv")])
def test_other_editions_of_csv_sets_are_refused(tmp_path: Path, name: str, file: str):
    (tmp_path / name).mkdir()
    _file(tmp_path / name / file, '"1","a","b"\n')
    with pytest.raises(ArtifactError, match="the published file's is"):
        load_dataset(name, root=tmp_path)


# Real files -----------------------------------------------------------------------------------------------------------


def _words(texts: np.ndarray) -> int:
    return sum(len(text.split()) for text in texts)


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "train", "test"),
    [
        ("sst2", [3310, 3610], [912, 909]),
        ("olid", [7961, 3954], [619, 240]),
        ("hsol", [1144, 15352, 3330], [286, 3838, 833]),
    ],
)
def test_real_sets_have_their_known_counts(data_root: Path, name: str, train: list[int], test: list[int]):
    data = load_dataset(name, root=data_root)
    assert torch.bincount(data.train.labels).tolist() == train
    assert torch.bincount(data.test.labels).tolist() == test
    for split in (data.train, data.test):
        assert all(text and text == text.strip() for text in split.inputs)
    assert _words(data.train.inputs) > 10 * len(data.train)


@pytest.mark.realdata
def test_real_sst2_first_rows(data_root: Path):
    data = load_dataset("sst2", root=data_root)
    assert data.train.inputs[0].startswith("a stirring , funny and finally transporting")
    assert data.train.classes[int(data.train.labels[0])] == "positive"
    assert data.test.inputs[0] == "no movement , no yuks , not much of anything ."
    assert int(data.test.labels[0]) == 0


@pytest.mark.realdata
def test_real_ag_news_says_what_it_was_trained_on(data_root: Path, tmp_path: Path):
    if (data_root / "ag_news/train.csv").exists():
        pytest.skip("the official training set is present")
    data = load_dataset("ag_news", root=data_root)
    assert torch.bincount(data.test.labels).tolist() == [1900] * 4
    assert len(data.train) == 9992 and "8 that occur in the test set were dropped" in data.note
    assert all(text == text.lower() for text in data.test.inputs[:100])
    (tmp_path / "ag_news").mkdir()
    shutil.copy(data_root / "ag_news/test.csv", tmp_path / "ag_news")
    with pytest.raises(InputError, match=r"has neither train\.csv"):
        load_dataset("ag_news", root=tmp_path)


@pytest.mark.realdata
def test_a_tampered_real_file_is_refused(data_root: Path, tmp_path: Path):
    shutil.copytree(data_root / "sst2", tmp_path / "sst2")
    path = tmp_path / "sst2/test.tsv"
    path.write_bytes(path.read_bytes().replace(b"\t0\r\n", b"\t1\r\n", 1))
    with pytest.raises(ArtifactError, match=r"test\.tsv: its sha256"):
        load_dataset("sst2", root=tmp_path)


@pytest.mark.realdata
def test_real_gtsrb_matches_its_annotation(data_root: Path):
    from PIL import Image

    data = load_dataset("gtsrb", root=data_root)
    rows = (data_root / "gtsrb/GT-final_test.csv").read_text().splitlines()[1:]
    assert data.test.labels.tolist() == [int(row.split(";")[-1]) for row in rows]
    assert len(set(data.train.labels.tolist())) == 43
    with Image.open(data_root / "gtsrb/GTSRB/Final_Test/Images" / rows[5].split(";")[0]) as image:
        assert np.array_equal(np.asarray(image).transpose(2, 0, 1), data.test.inputs[5].numpy())
