"""``hf:NAME``: a data set read through Hugging Face's ``datasets`` library, if that is installed.

NAME is a folder written by ``DatasetDict.save_to_disk`` (read as it is, offline) or, with ``--download``, a name on
the hub. It needs a split ``train`` and one called ``test`` or ``validation``, a column ``label`` of integers, and a
column ``text`` or ``sentence`` (text) or ``image`` or ``img`` (pictures). Code that a hub repository brings along is
never run. Pictures are decoded here, not by that library (see :mod:`.pictures`). Rows without a label (-1) or without
a text or picture are an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from backdoorlab.core.errors import InputError, MissingExtra
from backdoorlab.core.memory import expect_memory
from backdoorlab.core.paths import is_folder, printable, reason, user_path
from backdoorlab.data.images import one_form, to_array
from backdoorlab.data.pictures import open_picture, picture_form, without_remarks
from backdoorlab.data.sources import DatasetSource, DatasetSpec, datasets
from backdoorlab.data.split import Dataset, Inputs, Split, text_array

_TEXT, _IMAGE = ("text", "sentence"), ("image", "img")


@datasets.register
class HuggingFace(DatasetSource):
    """Text or image classification sets in Hugging Face's format."""

    name = "hf:"
    modalities = ("text", "image")
    summary = "a Hugging Face data set: a folder made by save_to_disk, or a hub name with --download"
    rescales = True

    def load(self, spec: DatasetSpec, argument: str, roots: tuple[Path, ...], download: bool) -> Dataset:
        """See :meth:`DatasetSource.load`."""
        try:
            import datasets as hub
        except ImportError:
            raise MissingExtra(f"dataset {spec.name!r}", "hf") from None
        folder = user_path(argument)
        try:
            if is_folder(folder):
                splits: Any = hub.load_from_disk(str(folder))
            elif download:
                splits = hub.load_dataset(argument, cache_dir=str(roots[-1] / "huggingface"), trust_remote_code=False)
            else:
                raise InputError(
                    f"dataset {spec.name!r}: there is no folder {printable(folder.absolute())}; to fetch {argument!r} "
                    "from the Hugging Face hub pass --download"
                )
            names = list(splits) if hasattr(splits, "keys") else []
            test_name = next((name for name in ("test", "validation") if name in names), None)
            if "train" not in names or test_name is None:
                raise InputError(f"{spec.name}: needs the splits 'train' and 'test' or 'validation', found {names}")
            return _convert(spec, (splits["train"], splits[test_name]), hub)
        except InputError:
            raise
        except Exception as error:  # the library raises many kinds for bad names, networks, files and columns
            raise InputError(f"dataset {spec.name!r} cannot be loaded: {reason(error)}") from error


def _convert(spec: DatasetSpec, tables: tuple[Any, Any], hub: Any) -> Dataset:
    columns = list(tables[0].column_names)
    column = next((name for name in (*_TEXT, *_IMAGE) if name in columns), None)
    if column is None or "label" not in columns:
        raise InputError(f"{spec.name}: needs a column 'label' and one of {(*_TEXT, *_IMAGE)}, found {columns}")
    missing = [name for name in (column, "label") if name not in tables[1].column_names]
    if missing:
        raise InputError(f"{spec.name}: the test part lacks the columns {missing}")
    if not all(len(table) for table in tables):
        raise InputError(f"{spec.name}: the training or the test part is empty")
    labels = [torch.as_tensor([*table["label"]]) for table in tables]
    lowest = min(int(part.min()) for part in labels)
    if any(part.is_floating_point() or part.dim() != 1 for part in labels) or lowest < 0:
        raise InputError(f"{spec.name}: labels must be integers from 0 on, found {labels[0].dtype} from {lowest}")
    train_names, test_names = (getattr(table.features["label"], "names", None) for table in tables)
    if train_names and test_names and list(train_names) != list(test_names):
        raise InputError(
            f"{spec.name}: training and test part number their classes differently: {train_names}, {test_names}"
        )
    classes = tuple(train_names or map(str, range(1 + max(int(part.max()) for part in labels))))
    parts: tuple[Inputs, ...]
    if column in _TEXT:
        if spec.size is not None:
            raise InputError(f"dataset {spec.name!r} is text and cannot be rescaled: leave size unset")
        modality, parts = "text", tuple(_texts(spec, table, column) for table in tables)
    else:
        modality, parts = "image", _pictures(spec, tables, column, hub)
    train, test = (Split(p, y.to(torch.int64), classes) for p, y in zip(parts, labels, strict=True))
    return Dataset(spec.name, modality, train, test)


def _texts(spec: DatasetSpec, table: Any, column: str) -> np.ndarray:
    texts = [*table[column]]
    row = next((i for i, text in enumerate(texts) if not isinstance(text, str) or not text.strip()), None)
    if row is not None:
        raise InputError(f"{spec.name}: row {row} has no text in column {column!r}, but {texts[row]!r}")
    return text_array(texts)


def _pictures(spec: DatasetSpec, tables: tuple[Any, Any], column: str, hub: Any) -> tuple[Inputs, ...]:
    """Pictures in one form: the same rule as for folders of images."""
    # Undecoded: the library would open them with every decoder that Pillow has, and fetch those that are addresses.
    plain = [table.cast_column(column, hub.Image(decode=False)) for table in tables]
    with without_remarks():
        headers = [picture_form(*_content(spec, row[column], i)) for table in plain for i, row in enumerate(table)]
    channels, height, width = one_form(headers, spec.size)
    parts = []
    for table in plain:
        expect_memory((len(table), channels, height, width), 1, "the pictures")
        images = np.empty((len(table), channels, height, width), np.uint8)
        with without_remarks():
            for i, row in enumerate(table):
                images[i] = to_array(open_picture(*_content(spec, row[column], i)), channels, height, width)
        parts.append(torch.from_numpy(images))
    return tuple(parts)


def _content(spec: DatasetSpec, cell: Any, row: int) -> tuple[bytes | Path, str]:
    """What an undecoded cell holds, bytes or the path of a local file, and what to call it."""
    name = f"{spec.name}, row {row}"
    if isinstance(cell, dict) and isinstance(cell.get("bytes"), bytes):
        return cell["bytes"], name
    if isinstance(cell, dict) and cell.get("path"):
        return Path(cell["path"]), f"{name} ({printable(cell['path'])})"
    raise InputError(f"{name} has no picture")
