"""``csv:PATH``: text classification from a table with the columns ``text`` (or ``sentence``) and ``label``.

PATH is a file, of which a seeded fifth of each class becomes the test set, or a folder with ``train.csv`` and
``test.csv``. UTF-8, with or without a byte order mark; comma-separated with double quotes, or tab-separated where the
name ends in ``.tsv``. Labels are any strings; classes are sorted, as numbers where all are integers. Refused, with the
line: NUL characters, which no text has, and cells of more than 131,072 characters, which an unclosed quote makes.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import torch

from backdoorlab.core.errors import InputError
from backdoorlab.core.foreign import from_csv_cell
from backdoorlab.core.paths import is_file, is_folder, printable, read_bytes, reason, user_path
from backdoorlab.core.records import parse_json
from backdoorlab.data.sources import DatasetSource, DatasetSpec, datasets, holdout
from backdoorlab.data.split import Dataset, Split, text_array

_EXPORT_JSON = 10_000_000
"""Bytes that the card of an export may have."""

Table = tuple[list[str], list[str]]
"""Texts and labels as they stand in a file."""


@datasets.register
class CsvText(DatasetSource):
    """Texts that the user brings."""

    name = "csv:"
    modalities = ("text",)
    summary = "your own: a .csv or .tsv file with columns text,label, or a folder with train.csv and test.csv"

    def load(self, spec: DatasetSpec, argument: str, roots: tuple[Path, ...], download: bool) -> Dataset:
        """See :meth:`DatasetSource.load`."""
        base = user_path(argument)
        paths = (base / "train.csv", base / "test.csv") if is_folder(base) else (base,)
        for path in paths:
            if not is_file(path):
                raise InputError(f"dataset {spec.name!r}: there is no file {printable(path.absolute())}")
        tables = [_unguarded(read_table(path, "\t" if path.suffix.lower() == ".tsv" else ","), path) for path in paths]
        classes = class_names(tables[0][1])
        splits = [text_split(*table, classes, path) for table, path in zip(tables, paths, strict=True)]
        if len(splits) == 2:
            train, test = splits
        else:
            train, test = (splits[0][rows] for rows in holdout(splits[0].labels, classes, spec.seed, printable(base)))
        return Dataset(spec.name, "text", train, test)


def read_table(path: Path, delimiter: str) -> Table:
    """Columns ``text`` (or ``sentence``) and ``label`` of a delimited file with a header.

    Raises:
        InputError: for a file that cannot be read, missing columns (naming those found), empty cells, NUL characters
            and rows that cannot be parsed.
    """
    name, line = printable(path), 0
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter=delimiter)
            header = [name.strip().lower() for name in next(reader, [])]
            text_column = next((header.index(name) for name in ("text", "sentence") if name in header), None)
            if text_column is None or "label" not in header:
                raise InputError(
                    f"{name}: expected columns 'text' (or 'sentence') and 'label' in the first line, "
                    f"found {[cell[:40] for cell in header[:10]]}"
                )
            label_column = header.index("label")
            texts, labels = [], []
            for row in reader:
                line = reader.line_num
                if not row:
                    continue
                if any("\0" in cell for cell in row):
                    raise InputError(f"{name}, line {line}: holds a NUL character; expected text in UTF-8")
                if len(row) != len(header) or not row[text_column].strip() or not row[label_column].strip():
                    raise InputError(
                        f"{name}, line {line}: expected {len(header)} cells, text and label not empty, "
                        f"got {[cell[:40] for cell in row[:4]]}"
                    )
                texts.append(row[text_column])
                labels.append(row[label_column].strip())
    except csv.Error as error:
        problem = "a cell is too long, perhaps an unclosed quote" if "field limit" in str(error) else str(error)
        raise InputError(f"{name}, after line {line}: cannot be read with separator {delimiter!r}: {problem}") from None
    except MemoryError:
        raise InputError(f"{name}, after line {line}: too large to be read: there is no memory for it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{name} cannot be read as UTF-8 text: {reason(error)}") from None
    if not texts:
        raise InputError(f"{name} has a header but no rows")
    return texts, labels


def _unguarded(table: Table, path: Path) -> Table:
    """The texts of an export of this library without the apostrophes that guard spreadsheets; others as they are."""
    beside = path.with_name("export.json")
    try:
        card = parse_json(read_bytes(beside, _EXPORT_JSON), str(beside)) if is_file(beside) else None
    except InputError:
        return table
    version = card.get("version") if isinstance(card, dict) and card.get("format") == "backdoorlab-export" else None
    guarded = isinstance(version, int) and version >= 2
    return ([from_csv_cell(text) for text in table[0]], table[1]) if guarded else table


def class_names(labels: Sequence[str]) -> tuple[str, ...]:
    """Distinct labels, sorted; by value where all are integers."""
    distinct = sorted(set(labels))
    try:
        return tuple(sorted(distinct, key=int))
    except ValueError:
        return tuple(distinct)


def text_split(texts: list[str], labels: Sequence[str], classes: tuple[str, ...], path: Path) -> Split:
    """A split of texts whose labels are names of classes.

    Raises:
        InputError: for a label that is not among the classes.
    """
    index = {name: k for k, name in enumerate(classes)}
    foreign = sorted(set(labels) - index.keys())
    if foreign:
        raise InputError(
            f"{printable(path)}: labels {foreign[:5]} are not among the classes of the training set, {classes[:10]}"
        )
    return Split(text_array(texts), torch.tensor([index[label] for label in labels], dtype=torch.int64), classes)
