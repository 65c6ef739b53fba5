"""``hf:NAME``: a data set read through Hugging Face's ``datasets`` library, if that is installed.

NAME is a folder written by ``DatasetDict.save_to_disk`` (read as it is, offline) or, with ``--download``, a name on
the hub. It needs a split ``train`` and one called ``test`` or ``validation``, a column ``label`` of integers, and a
column ``text`` or ``sentence`` (text) or ``image`` or ``img`` (pictures). Code that a hub repository brings along is
never run. Rows without a label (-1) are an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from backdoorlab.core.errors import InputError, MissingExtra
from backdoorlab.data.images import is_grey, to_array
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
        folder = Path(argument).expanduser()
        try:
            if folder.is_dir():
                found: Any = hub.load_from_disk(str(folder))
            elif download:
                found = hub.load_dataset(argument, cache_dir=str(roots[-1] / "huggingface"), trust_remote_code=False)
            else:
                raise InputError(
                    f"dataset {spec.name!r}: there is no folder {folder.absolute()}; to fetch {argument!r} from the "
                    "Hugging Face hub pass --download"
                )
        except InputError:
            raise
        except Exception as error:  # the library raises many kinds for bad names, networks and files
            raise InputError(f"dataset {spec.name!r} cannot be loaded: {error}") from error
        names = list(found) if hasattr(found, "keys") else []
        held = next((name for name in ("test", "validation") if name in names), None)
        if "train" not in names or held is None:
            raise InputError(f"{spec.name}: needs the splits 'train' and 'test' or 'validation', found {names}")
        tables = (found["train"], found[held])
        return _convert(spec, tables)


def _convert(spec: DatasetSpec, tables: tuple[Any, Any]) -> Dataset:
    columns = list(tables[0].column_names)
    column = next((name for name in (*_TEXT, *_IMAGE) if name in columns), None)
    if column is None or "label" not in columns:
        raise InputError(f"{spec.name}: needs a column 'label' and one of {(*_TEXT, *_IMAGE)}, found {columns}")
    labels = [torch.as_tensor([*table["label"]]) for table in tables]
    lowest = min(int(part.min()) for part in labels)
    if labels[0].is_floating_point() or lowest < 0:
        raise InputError(f"{spec.name}: labels must be integers from 0 on, found {labels[0].dtype} from {lowest}")
    named = getattr(tables[0].features["label"], "names", None)
    classes = tuple(named or map(str, range(1 + max(int(part.max()) for part in labels))))
    parts: tuple[Inputs, ...]
    if column in _TEXT:
        if spec.size is not None:
            raise InputError(f"dataset {spec.name!r} is text and cannot be rescaled: leave size unset")
        modality, parts = "text", tuple(text_array([str(text) for text in table[column]]) for table in tables)
    else:
        modality, parts = "image", _pictures(spec, tables, column)
    train, test = (Split(p, y.to(torch.int64), classes) for p, y in zip(parts, labels, strict=True))
    return Dataset(spec.name, modality, train, test)


def _pictures(spec: DatasetSpec, tables: tuple[Any, Any], column: str) -> tuple[Inputs, ...]:
    """Pictures in one form: the same rule as for folders of images."""
    forms = {(is_grey(row[column]), *row[column].size) for table in tables for row in table}
    channels = 1 if all(grey for grey, _, _ in forms) else 3
    sizes = {(height, width) for _, width, height in forms}
    if spec.size is not None:
        sizes = {(spec.size, spec.size)}
    height, width = sizes.pop() if len(sizes) == 1 else (32, 32)
    parts = []
    for table in tables:
        images = np.empty((len(table), channels, height, width), np.uint8)
        for i, row in enumerate(table):
            images[i] = to_array(row[column], channels, height, width)
        parts.append(torch.from_numpy(images))
    return tuple(parts)
