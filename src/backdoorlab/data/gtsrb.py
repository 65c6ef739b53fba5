"""German Traffic Sign Recognition Benchmark (Houben et al. 2013) in the layout of the official archives.

The annotation files say which images belong to the set: a subset is a folder with shorter ones. Whole pictures are
rescaled; the region of interest is not cropped, as in the backdoor literature.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

import torch

from backdoorlab.core.errors import InputError
from backdoorlab.core.paths import is_file, read_bytes
from backdoorlab.data.download import Remote, find_or_fetch
from backdoorlab.data.images import read_images
from backdoorlab.data.sources import DatasetSource, DatasetSpec, datasets
from backdoorlab.data.split import Dataset, Split

_BASE = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/"
_REMOTES = (
    Remote(f"{_BASE}GTSRB-Training_fixed.zip", "md5:513f3c79a4c5141765e10e952eaa2478", "gtsrb"),
    Remote(f"{_BASE}GTSRB_Final_Test_Images.zip", "md5:c7e4e6327067d32654124b0fe9e82185", "gtsrb"),
    Remote(f"{_BASE}GTSRB_Final_Test_GT.zip", "md5:fe31e9c9270bbcd7b84b7f21a9d9d9e5", "gtsrb"),
)
_OFFICIAL = (26_640, 12_630)  # training (the repaired archive above) and test images
_SPEEDS = ("20", "30", "50", "60", "70", "80")
_SIGNS = (
    *(f"speed limit {v}" for v in _SPEEDS),
    "end of speed limit 80",
    "speed limit 100",
    "speed limit 120",
    "no passing",
    "no passing for trucks",
    "right of way at next crossing",
    "priority road",
    "yield",
    "stop",
    "no vehicles",
    "no trucks",
    "no entry",
    "general caution",
    "curve left",
    "curve right",
    "double curve",
    "bumpy road",
    "slippery road",
    "road narrows on the right",
    "road work",
    "traffic signals",
    "pedestrians",
    "children crossing",
    "bicycles crossing",
    "ice or snow",
    "wild animals",
    "end of all limits",
    "turn right ahead",
    "turn left ahead",
    "ahead only",
    "straight or right",
    "straight or left",
    "keep right",
    "keep left",
    "roundabout",
    "end of no passing",
    "end of no passing for trucks",
)


@datasets.register
class Gtsrb(DatasetSource):
    """43 classes of traffic signs, 32x32 unless ``size`` says otherwise."""

    name = "gtsrb"
    modalities = ("image",)
    summary = "26,640 + 12,630 traffic signs, 43 classes, RGB, 32x32 by default (Houben et al. 2013; research use)"
    download_url = _BASE
    rescales = True

    def load(self, spec: DatasetSpec, argument: str, roots: tuple[Path, ...], download: bool) -> Dataset:
        """See :meth:`DatasetSource.load`."""
        folder = find_or_fetch(roots, "gtsrb", self, _REMOTES, download)
        training = folder / "GTSRB" / "Training"
        train_rows: list[tuple[Path, int]] = []
        for k in range(len(_SIGNS)):
            class_rows = _annotation(training / f"{k:05d}" / f"GT-{k:05d}.csv", training / f"{k:05d}")
            if not class_rows or {label for _, label in class_rows} != {k}:
                raise InputError(f"{training / f'{k:05d}'}: its annotation must list images of class {k} and no other")
            train_rows += class_rows
        test_rows = _annotation(folder / "GT-final_test.csv", folder / "GTSRB" / "Final_Test" / "Images")
        train, test = (_split(rows, spec.size or 32) for rows in (train_rows, test_rows))
        note = ""
        if (len(train), len(test)) < _OFFICIAL:
            note = (
                f"a part of GTSRB: {len(train)} of {_OFFICIAL[0]} training, {len(test)} of {_OFFICIAL[1]} test images"
            )
        return Dataset("gtsrb", "image", train, test, mean=(0.0,) * 3, std=(1.0,) * 3, note=note)


def _annotation(path: Path, images: Path) -> list[tuple[Path, int]]:
    """(image file, class) pairs of one annotation file."""
    if not is_file(path):
        raise InputError(f"gtsrb: the annotation file {path} is missing")
    try:
        rows = list(csv.DictReader(io.StringIO(read_bytes(path).decode(), newline=""), delimiter=";"))
        pairs = [(images / row["Filename"], int(row["ClassId"])) for row in rows]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: expected columns Filename and ClassId separated by semicolons ({error})") from None
    missing = next((image for image, _ in pairs if not is_file(image)), None)
    if missing is not None:
        raise InputError(f"gtsrb: {path} lists {missing}, which does not exist")
    return pairs


def _split(rows: list[tuple[Path, int]], size: int) -> Split:
    images = read_images([path for path, _ in rows], 3, size, size)
    return Split(images, torch.tensor([label for _, label in rows], dtype=torch.int64), _SIGNS)
