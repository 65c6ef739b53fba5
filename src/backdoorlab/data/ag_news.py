"""AG News (Zhang, Zhao, LeCun 2015): topics of news items.

``ag_news/test.csv`` and ``ag_news/train.csv`` are the official files (class 1-4, title, description); a text is title
and description. Where only ``dev.tsv`` is present (10,000 lower-cased descriptions used by textual backdoor papers),
that is the training set: items that also occur in the test set are dropped from it, and the test texts are lower-cased
descriptions too, so that both parts look alike. The data set's note says when this happened.
"""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import torch

from backdoorlab.core.errors import InputError
from backdoorlab.core.paths import is_file, read_bytes
from backdoorlab.data.download import Remote, fetch_file, find_or_fetch, verify
from backdoorlab.data.sources import DatasetSource, DatasetSpec, datasets
from backdoorlab.data.split import Dataset, Split, text_array
from backdoorlab.data.sst2 import read_pairs

_BASE = "https://raw.githubusercontent.com/mhjabreel/CharCnn_Keras/master/data/ag_news_csv/"
_TRAIN = Remote(f"{_BASE}train.csv", "md5:b1a00f826fdfbd249f79597b59e1dc12", "ag_news", unpack=False)
_TEST = Remote(f"{_BASE}test.csv", "md5:d52ea96a97a2d943681189a97654912d", "ag_news", unpack=False)
_DEV = "sha256:2d37eda7abf2c817fa7983b7421021b80ca9d662a7d3ff50fe724ce3cf6b4cbd"
_CLASSES = ("World", "Sports", "Business", "Sci/Tech")
_REMEDY = "This is another edition of the set; load your own copy with csv:PATH instead"


@datasets.register
class AgNews(DatasetSource):
    """Four classes."""

    name = "ag_news"
    modalities = ("text",)
    summary = "120,000 + 7,600 news items, 4 topics (Zhang et al. 2015; non-commercial research)"
    download_url = _BASE

    def load(self, spec: DatasetSpec, argument: str, roots: tuple[Path, ...], download: bool) -> Dataset:
        """See :meth:`DatasetSource.load`."""
        folder = find_or_fetch(roots, "ag_news", self, (_TRAIN, _TEST), download)
        if download and not is_file(folder / "train.csv"):
            fetch_file(_TRAIN.url, _TRAIN.digest, folder / "train.csv")
        titles, bodies, test_labels = _official(folder / "test.csv", _TEST.digest)
        if is_file(folder / "train.csv"):
            test_texts = _joined(titles, bodies)
            heads, rest, train_labels = _official(folder / "train.csv", _TRAIN.digest)
            train_texts, note = _joined(heads, rest), ""
        elif is_file(folder / "dev.tsv"):
            test_texts = [body.lower() for body in bodies]
            train_texts, train_labels, dropped = _dev(folder / "dev.tsv", bodies)
            note = (
                f"train.csv is missing from {folder.name}/: trained on dev.tsv ({len(train_texts)} lower-cased "
                f"descriptions; {dropped} that occur in the test set were dropped), test texts are lower-cased "
                "descriptions. Not comparable with results on the official training set."
            )
        else:
            raise InputError(f"dataset 'ag_news': {folder} has neither train.csv (from {_TRAIN.url}) nor dev.tsv")
        train = Split(text_array(train_texts), torch.tensor(train_labels), _CLASSES)
        test = Split(text_array(test_texts), torch.tensor(test_labels), _CLASSES)
        return Dataset("ag_news", "text", train, test, note=note)


def _official(path: Path, digest: str) -> tuple[list[str], list[str], list[int]]:
    """Titles, descriptions and labels 0-3 of an official file, verified."""
    if not is_file(path):
        raise InputError(f"dataset 'ag_news': {path} is missing; it is published at {_BASE}{path.name}")
    data = read_bytes(path)
    verify(data, digest, path, _REMEDY)
    rows = list(csv.reader(io.StringIO(data.decode("utf-8"), newline="")))
    return [row[1] for row in rows], [row[2] for row in rows], [int(row[0]) - 1 for row in rows]


def _joined(titles: list[str], bodies: list[str]) -> list[str]:
    return [f"{title} {body}" for title, body in zip(titles, bodies, strict=True)]


def _dev(path: Path, test_texts: list[str]) -> tuple[list[str], list[int], int]:
    """Texts and labels of dev.tsv without the items of the test set, and how many those were."""
    texts, labels = read_pairs(path, _DEV)
    in_test = {_letters(text) for text in test_texts}
    kept = [(text, label) for text, label in zip(texts, labels, strict=True) if _letters(text) not in in_test]
    return [text for text, _ in kept], [label for _, label in kept], len(texts) - len(kept)


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())
