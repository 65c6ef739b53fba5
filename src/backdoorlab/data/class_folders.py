"""Samples written as one file each below one folder per class: the layout that ``folder:PATH`` reads.

Class names are foreign text (a column of a file, a name on a hub). What becomes of them here is a plain folder name:
nothing in it can point elsewhere, hide the folder or be refused by a file system. A folder name that differs from its
class, or an index in front, costs nothing; labels that change when the folder is read again would.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from torch import Tensor

from backdoorlab.core.errors import InputError

SUFFIXES = {"image": ".png", "audio": ".wav"}
"""Lossless single-sample files, by modality."""

_RESERVED = frozenset('<>:"/\\|?*')
_MAX_BYTES, _BLOCK = 120, 64


def folder_names(classes: Sequence[str]) -> tuple[str, ...]:
    """A safe folder name for each class, such that sorting the names gives the order of the classes.

    If the cleaned names are not distinct and sorted, with or without regard to case, each gets its index in front:
    ``("ship", "cat")`` becomes ``("0-ship", "1-cat")``.
    """
    cleaned = tuple(map(_clean, classes))
    folded = [name.casefold() for name in cleaned]
    if list(cleaned) == sorted(cleaned) and folded == sorted(set(folded)):
        return cleaned
    width = len(str(len(classes) - 1))
    return tuple(f"{k:0{width}d}-{name}" for k, name in enumerate(cleaned))


def sample_names(folders: Sequence[str], labels: Tensor, indices: Tensor, suffix: str) -> list[str]:
    """``CLASS/INDEX.png`` for each sample, with as many digits as the largest index, so that names sort as numbers."""
    width = len(str(int(indices.max()))) if len(indices) else 1
    return [f"{folders[k]}/{i:0{width}d}{suffix}" for k, i in zip(labels.tolist(), indices.tolist(), strict=True)]


def write_files(base: Path, names: Sequence[str], samples: Tensor, sample_rate: int = 0) -> Generator[str, None, None]:
    """Write one file per sample below ``base``, yielding each name when its file is there.

    Closing the generator stops the work: no thread writes afterwards.

    Args:
        base: made if it does not exist.
        names: relative paths, N.
        samples: uint8 [N,C,H,W] images with 1 or 3 channels, or int16 [N,L] sound.
        sample_rate: of sound, in Hz; 0 for images.

    Raises:
        InputError: for images of other than 1 or 3 channels.
    """
    if not sample_rate and samples.shape[1] not in (1, 3):
        raise InputError(f"a png holds 1 or 3 channels, these images have {samples.shape[1]}; use npz")
    for folder in sorted({name.rpartition("/")[0] for name in names}):
        (base / folder).mkdir(parents=True, exist_ok=True)

    def write(start: int) -> Sequence[str]:
        rows = samples[start : start + _BLOCK].cpu()
        arrays = (rows if sample_rate else rows.permute(0, 2, 3, 1)).contiguous().numpy()
        batch_names = names[start : start + _BLOCK]
        for name, array in zip(batch_names, arrays, strict=True):
            if sample_rate:
                _write_sound(base / name, array, sample_rate)
            else:
                _write_image(base / name, array)
        return batch_names

    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        for done in pool.map(write, range(0, len(names), _BLOCK)):
            yield from done
    finally:
        pool.shutdown(cancel_futures=True)


def _write_image(path: Path, pixels: np.ndarray) -> None:
    from PIL import Image

    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    image.save(path, "PNG", compress_level=1)  # four times as fast as the default at 224 px, and a fifth larger


def _write_sound(path: Path, wave: np.ndarray, rate: int) -> None:
    import soundfile

    soundfile.write(path, wave, rate, format="WAV", subtype="PCM_16")


def _clean(name: str) -> str:
    """The name without path separators, invisible and reserved characters; never empty, hidden or too long."""
    plain = "".join(c if c.isprintable() and c not in _RESERVED else "_" for c in name)
    short = plain.strip(" .").encode("utf-8", "replace")[:_MAX_BYTES].decode("utf-8", "ignore")
    return short.strip(" .") or "class"
