"""Tiny ImageNet (Stanford CS231n): 200 ImageNet classes at 64x64; its labelled validation part serves as test set."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from backdoorlab.core.errors import InputError
from backdoorlab.core.paths import entries, is_file, is_folder, read_bytes
from backdoorlab.data.download import Remote, find_or_fetch
from backdoorlab.data.images import read_images
from backdoorlab.data.sources import DatasetSource, DatasetSpec, datasets
from backdoorlab.data.split import Dataset, Split

_FOLDER = "tiny-imagenet-200"
_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"


@datasets.register
class TinyImageNet(DatasetSource):
    """Classes in the order of their WordNet numbers, named by their first synonym."""

    name = "tiny_imagenet"
    modalities = ("image",)
    summary = "100,000 + 10,000 photographs, 200 classes, RGB, 64x64 (ImageNet terms: non-commercial research)"
    download_url = _URL
    rescales = True

    def load(self, spec: DatasetSpec, argument: str, roots: tuple[Path, ...], download: bool) -> Dataset:
        """See :meth:`DatasetSource.load`."""
        remote = Remote(_URL, "md5:90528d7ca1a48142e341f4ef8d21d0de")
        folder = find_or_fetch(roots, _FOLDER, self, (remote,), download)
        wnids = sorted(_lines(folder / "wnids.txt"))
        names = dict(line.split("\t", 1) for line in _lines(folder / "words.txt") if "\t" in line)
        classes = _class_names(wnids, names)
        training = [(p, k) for k, wnid in enumerate(wnids) for p in _class_files(folder / "train" / wnid / "images")]
        validation = _validation(folder / "val", {wnid: k for k, wnid in enumerate(wnids)})
        train, test = (_split(rows, classes, spec.size or 64) for rows in (training, validation))
        mean, std = (0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)
        return Dataset("tiny_imagenet", "image", train, test, flip=True, mean=mean, std=std)


def _lines(path: Path) -> list[str]:
    if not is_file(path):
        raise InputError(f"tiny_imagenet: {path} is missing")
    try:
        return [line for line in read_bytes(path).decode().splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"tiny_imagenet: {path} is not UTF-8 text: {error}") from None


def _class_names(wnids: list[str], names: dict[str, str]) -> tuple[str, ...]:
    first = [names.get(wnid, wnid).split(",")[0].strip() for wnid in wnids]
    counts = Counter(first)  # "crane" the bird and "crane" the machine
    return tuple(f"{name} ({wnid})" if counts[name] > 1 else name for name, wnid in zip(first, wnids, strict=True))


def _split(rows: list[tuple[Path, int]], classes: tuple[str, ...], size: int) -> Split:
    images = read_images([path for path, _ in rows], 3, size, size)
    return Split(images, torch.tensor([k for _, k in rows], dtype=torch.int64), classes)


def _class_files(folder: Path) -> list[Path]:
    files = [path for path in entries(folder) if path.suffix == ".JPEG"] if is_folder(folder) else []
    if not files:
        raise InputError(f"tiny_imagenet: found no .JPEG files in {folder}")
    return files


def _validation(folder: Path, index: dict[str, int]) -> list[tuple[Path, int]]:
    """(image file, class) pairs from ``val_annotations.txt``: file name, WordNet number, box, separated by tabs."""
    rows = []
    for line in _lines(folder / "val_annotations.txt"):
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        path = folder / "images" / name
        if wnid not in index or not is_file(path):
            raise InputError(f"{folder / 'val_annotations.txt'}: no such image or class in line {line!r}")
        rows.append((path, index[wnid]))
    return rows
