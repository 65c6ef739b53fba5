"""``folder:PATH``: a tree with one folder of images or sound clips per class.

``PATH/train/CLASS/...`` and ``PATH/test/CLASS/...`` (or ``val``) where there are such folders, else ``PATH/CLASS/...``,
of which a seeded fifth of each class becomes the test set. Files may lie deeper below their class folder; links are
followed. Hidden files and folders and notes (.txt, .csv, .json, .md, .xml) are skipped; anything else is an error:
files of an unknown kind, folders that cannot be read, links that lead nowhere.

Images: grey only if all are, else RGB; ``size`` squared if given, else their own size if they share one, else 32x32;
nothing is cropped. Clips: mono, one sampling rate; cut or padded to the 95th percentile of their lengths.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch

from backdoorlab.core.errors import DataWarning, InputError
from backdoorlab.core.paths import entries, files_below, is_folder, printable, user_path
from backdoorlab.data.audio import common_rate, read_clips
from backdoorlab.data.images import common_form, read_images
from backdoorlab.data.sources import DatasetSource, DatasetSpec, datasets, holdout
from backdoorlab.data.split import Dataset, Inputs, Split

_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".webp")
_AUDIO = (".wav", ".flac")
_NOTES = (".txt", ".csv", ".json", ".md", ".xml", ".db", ".ini")

Tree = dict[str, list[Path]]
"""Class name to its files, both sorted."""


@datasets.register
class Folder(DatasetSource):
    """Pictures or clips that the user brings."""

    name = "folder:"
    modalities = ("image", "audio")
    summary = "your own: PATH/[train|test/]CLASS/*.png, .jpg, .wav, ...; other image sizes become 32x32 unless --size"
    rescales = True

    def load(self, spec: DatasetSpec, argument: str, roots: tuple[Path, ...], download: bool) -> Dataset:
        """See :meth:`DatasetSource.load`."""
        base = user_path(argument)
        if not is_folder(base):
            raise InputError(f"dataset {spec.name!r}: there is no folder {printable(base.absolute())}")
        trees = [class_tree(part) for part in _parts(base)]
        if len(trees) == 2 and trees[0].keys() != trees[1].keys():
            unmatched = sorted(trees[0].keys() ^ trees[1].keys())
            raise InputError(
                f"{printable(base)}: training and test part must have the same class folders; only one has {unmatched}"
            )
        classes = tuple(trees[0])
        files = [[path for paths in tree.values() for path in paths] for tree in trees]
        labels = [
            torch.repeat_interleave(torch.arange(len(classes)), torch.tensor([len(paths) for paths in tree.values()]))
            for tree in trees
        ]
        all_files = [path for part in files for path in part]
        sounds = [path for path in all_files if path.suffix.lower() in _AUDIO]
        if sounds and len(sounds) < len(all_files):
            picture = next(path for path in all_files if path.suffix.lower() in _IMAGES)
            raise InputError(
                f"{printable(base)} mixes images and audio, for example {printable(picture)} and {printable(sounds[0])}"
            )
        # One pass over all files, whichever part they are in: both parts get one form.
        inputs, rate = _read_audio(all_files, spec) if sounds else _read_images(all_files, spec)
        if len(trees) == 2:
            cut = len(files[0])
            train, test = Split(inputs[:cut], labels[0], classes), Split(inputs[cut:], labels[1], classes)
        else:
            whole = Split(inputs, labels[0], classes)
            train, test = (whole[rows] for rows in holdout(labels[0], classes, spec.seed, printable(base)))
        return Dataset(spec.name, "audio" if sounds else "image", train, test, sample_rate=rate)


def class_tree(folder: Path) -> Tree:
    """The class folders below ``folder`` and the image or audio files in each.

    Raises:
        InputError: if there are none, one is empty, a file is of an unknown kind, something cannot be read, or the name
            of a class is not UTF-8.

    Warns:
        DataWarning: if samples lie beside the class folders, where they belong to no class.
    """
    inside = entries(folder)
    subfolders = [path for path in inside if is_folder(path)]
    if not subfolders:
        raise InputError(
            f"{printable(folder)} has no class folders; expected one folder per class with its files inside"
        )
    stray = [path for path in inside if path not in subfolders and path.suffix.lower() in (*_IMAGES, *_AUDIO)]
    if stray:
        warnings.warn(
            f"{len(stray)} file(s) beside the class folders belong to no class and are left out, for example "
            f"{printable(stray[0])}",
            DataWarning,
            stacklevel=2,
        )
    tree: Tree = {}
    for sub in subfolders:
        try:
            sub.name.encode()
        except UnicodeEncodeError:
            raise InputError(f"the name of class folder {printable(sub)} is not UTF-8; rename it") from None
        tree[sub.name] = []
        for path in files_below(sub):
            suffix = path.suffix.lower()
            if suffix in (*_IMAGES, *_AUDIO):
                tree[sub.name].append(path)
            elif suffix not in _NOTES:
                raise InputError(f"{printable(path)}: unknown kind of file; known are {', '.join((*_IMAGES, *_AUDIO))}")
        if not tree[sub.name]:
            raise InputError(f"class folder {printable(sub)} holds no image or audio files")
    return tree


def _parts(base: Path) -> tuple[Path, ...]:
    """The folder itself, or its training and test part."""
    train, tests = base / "train", [base / name for name in ("test", "val") if is_folder(base / name)]
    if is_folder(train) and tests:
        return train, tests[0]
    if is_folder(train) or tests:
        present, missing = ("train", "test nor val") if is_folder(train) else (tests[0].name, "train")
        raise InputError(
            f"{printable(base)} has a folder {present!r} but no {missing}; provide both, or name "
            f"{printable(base / present)} to have it split 4:1"
        )
    return (base,)


def _read_images(paths: list[Path], spec: DatasetSpec) -> tuple[Inputs, int]:
    return read_images(paths, *common_form(paths, spec.size)), 0


def _read_audio(paths: list[Path], spec: DatasetSpec) -> tuple[Inputs, int]:
    if spec.size is not None:
        raise InputError(f"dataset {spec.name!r} is audio and cannot be rescaled: leave size unset (got {spec.size})")
    rate, lengths = common_rate(paths)
    return read_clips(paths, int(np.ceil(np.percentile(lengths, 95)))), rate
