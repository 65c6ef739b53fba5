"""Free Spoken Digit Dataset (Jackson et al.): digits spoken in English by six people.

The official split: recordings 0-4 of each speaker and digit are for testing, 5-49 for training. Clips are cut or
zero-padded to one second.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from backdoorlab.core.errors import ArtifactError
from backdoorlab.core.paths import entries, read_bytes
from backdoorlab.data.audio import common_rate, read_clips
from backdoorlab.data.sources import DatasetSource, DatasetSpec, datasets, find_file
from backdoorlab.data.split import Dataset, Split

_LENGTH = 8000
_TEST_RECORDINGS = 5
_CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# sha256 of the lines "<sha256>  ./recordings/<name>" of all 3,000 clips in the order of their names.
_DIGEST = "e0ed3f4c73a865c7a3c0f434146175a6af4e9514c452b0c587f4770e52fb8d7b"


@datasets.register
class Fsdd(DatasetSource):
    """3,000 clips at 8 kHz."""

    name = "fsdd"
    modalities = ("audio",)
    summary = "2,700 + 300 spoken digits, 10 classes, 8 kHz mono, 1 s (CC BY-SA 4.0)"
    obtain = "Clone github.com/Jakobovski/free-spoken-digit-dataset and call the folder fsdd."

    def load(self, spec: DatasetSpec, argument: str, roots: tuple[Path, ...], download: bool) -> Dataset:
        """See :meth:`DatasetSource.load`."""
        folder = find_file(roots, "fsdd/recordings", self)
        paths = [path for path in entries(folder) if path.suffix == ".wav"]
        _verify(paths, folder)
        rate, _ = common_rate(paths)
        clips = read_clips(paths, _LENGTH)
        parts = [path.stem.split("_") for path in paths]  # digit, speaker, index
        labels = torch.tensor([int(digit) for digit, _, _ in parts])
        is_test = torch.tensor([int(index) < _TEST_RECORDINGS for _, _, index in parts])
        whole = Split(clips, labels, _CLASSES)
        return Dataset("fsdd", "audio", whole[~is_test], whole[is_test], sample_rate=rate)


def _verify(paths: list[Path], folder: Path) -> None:
    lines = [f"{hashlib.sha256(read_bytes(path)).hexdigest()}  ./recordings/{path.name}\n" for path in paths]
    got = hashlib.sha256("".join(lines).encode()).hexdigest()
    if got != _DIGEST:
        raise ArtifactError(
            f"{folder}: its {len(paths)} clips are not the 3,000 published ones (sha256 of their sorted sha256 list is "
            f"{got}, expected {_DIGEST}). Fetch the set again, or load your own clips with folder:PATH"
        )
