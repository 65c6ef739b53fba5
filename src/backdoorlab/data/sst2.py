"""SST-2 and OLID as the tab-separated files that textual backdoor papers share (OpenBackdoor, Hidden Killer).

Both have ``train.tsv``, ``dev.tsv`` and ``test.tsv`` with the columns sentence and label. Training is on ``train``,
evaluation on ``test``; ``dev`` is left aside. Each file is compared with its known sha256: there are several editions
of these sets (GLUE's SST-2 has 67,349 phrases), whose results must not be mixed.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch

from backdoorlab.core.errors import InputError
from backdoorlab.core.paths import is_file, read_bytes
from backdoorlab.data.download import verify
from backdoorlab.data.sources import DatasetSource, DatasetSpec, datasets, find_file
from backdoorlab.data.split import Dataset, Split, text_array


def read_pairs(path: Path, digest: str) -> tuple[list[str], list[int]]:
    """Sentences and integer labels of a verified file whose lines are ``sentence TAB label`` under a header."""
    data = read_bytes(path)
    verify(data, digest, path, "This is another edition of the set; load your own copy with csv:PATH instead")
    rows = [line.rpartition("\t") for line in data.decode("utf-8").split("\n")[1:] if line.strip()]
    return [text.strip() for text, _, _ in rows], [int(label) for _, _, label in rows]


class TsvText(DatasetSource):
    """A folder with train.tsv and test.tsv."""

    modalities = ("text",)
    obtain = (
        "Both files are part of the Hidden Killer repository (github.com/thunlp/HiddenKiller, data/clean_data); "
        "put them in a folder of the data set's name."
    )

    train_digest: ClassVar[str]
    test_digest: ClassVar[str]
    classes: ClassVar[tuple[str, ...]]

    def load(self, spec: DatasetSpec, argument: str, roots: tuple[Path, ...], download: bool) -> Dataset:
        """See :meth:`DatasetSource.load`."""
        folder = find_file(roots, self.name, self)
        parts = []
        for file, digest in (("train.tsv", self.train_digest), ("test.tsv", self.test_digest)):
            if not is_file(folder / file):
                raise InputError(f"dataset {self.name!r}: {folder / file} is missing. {self.obtain}")
            texts, labels = read_pairs(folder / file, digest)
            parts.append(Split(text_array(texts), torch.tensor(labels), self.classes))
        return Dataset(self.name, "text", parts[0], parts[1])


@datasets.register
class Sst2(TsvText):
    """Stanford Sentiment Treebank (Socher et al. 2013), whole sentences, two classes."""

    name = "sst2"
    summary = "6,920 + 1,821 sentences of film reviews, negative or positive (Socher et al. 2013; no licence stated)"
    train_digest = "sha256:601d94f4671085e0b6ca7d96d8d1e92e469c02509f65bcc3a22a3ade32827151"
    test_digest = "sha256:3018cb76b1046d70c147e234cb8e6ffa8d83ae937cf6ce8199f1bf11aeb90a12"
    classes = ("negative", "positive")


@datasets.register
class Olid(TsvText):
    """OLID / OffensEval (Zampieri et al. 2019), sub-task A."""

    name = "olid"
    summary = "11,915 + 859 tweets, offensive or not (Zampieri et al. 2019; no licence stated; offensive language)"
    train_digest = "sha256:d431d5c1aebbaae506c45924b9f22d0d2ff5278e37d946681f80ee0d9afc2837"
    test_digest = "sha256:d68274569f59fe6ca493b85dd531a8aab31da5ef02bf797a631ce29d9da136f3"
    classes = ("not offensive", "offensive")
