"""HSOL: hate speech and offensive language (Davidson et al. 2017); no official split, so a seeded one is made."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import torch

from backdoorlab.core.paths import read_bytes
from backdoorlab.data.download import verify
from backdoorlab.data.sources import DatasetSource, DatasetSpec, datasets, find_file, holdout
from backdoorlab.data.split import Dataset, Split, text_array

_DIGEST = "sha256:fcb8bc7c68120ae4af04a5b9acd58585513ede11e1548ebf36a5c2040b6f6281"
_CLASSES = ("hate speech", "offensive language", "neither")


@datasets.register
class Hsol(DatasetSource):
    """Tweets, three unbalanced classes."""

    name = "hsol"
    modalities = ("text",)
    summary = "24,783 tweets, 3 classes, split 4:1 by the seed (Davidson et al. 2017; MIT; offensive language)"
    obtain = (
        "It is data/labeled_data.csv of github.com/t-davidson/hate-speech-and-offensive-language; "
        "put it in a folder called hsol."
    )

    def load(self, spec: DatasetSpec, argument: str, roots: tuple[Path, ...], download: bool) -> Dataset:
        """See :meth:`DatasetSource.load`."""
        path = find_file(roots, "hsol/labeled_data.csv", self)
        data = read_bytes(path)
        verify(data, _DIGEST, path, "This is another edition of the set; load your own copy with csv:PATH instead")
        rows = list(csv.DictReader(io.StringIO(data.decode("utf-8"), newline="")))
        labels = torch.tensor([int(row["class"]) for row in rows])
        whole = Split(text_array([row["tweet"].strip() for row in rows]), labels, _CLASSES)
        train, test = (whole[part] for part in holdout(labels, _CLASSES, spec.seed, "hsol"))
        return Dataset("hsol", "text", train, test)
