"""Where data sets come from: one file per source, one function (:func:`load_dataset`) for all of them."""

from __future__ import annotations

import dataclasses
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import platformdirs
import torch
from torch import Tensor

from backdoorlab.core.errors import InputError
from backdoorlab.core.excerpt import shown
from backdoorlab.core.paths import exists, user_path
from backdoorlab.core.registry import Registry
from backdoorlab.core.seeding import make_generator
from backdoorlab.core.settings import check_seed
from backdoorlab.data.split import Dataset, Split

MAX_SIDE = 4096
"""Largest height and width, in pixels, to which pictures are rescaled."""


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """Which data to load; part of a run's specification.

    Attributes:
        name: "digits", "cifar10", "folder:PATH", "csv:PATH", ...
        size: height and width in pixels for sources that can rescale; None keeps the source's own size.
        train_size: use a class-balanced subset of so many training samples; None uses all.
        test_size: likewise for the test set.
        seed: of subsets, of the split of a folder without train/test parts, and of procedural sets.
    """

    name: str = "digits"
    size: int | None = None
    train_size: int | None = None
    test_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise InputError(f"the name of a dataset must be text, got {shown(self.name)}")
        check_seed("the seed of a dataset", self.seed)
        for key, low in (("size", 8), ("train_size", 1), ("test_size", 1)):
            value = getattr(self, key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise InputError(f"{key} must be an integer, got {shown(value)}")
            if value is not None and value < low:
                raise InputError(f"{key} must be at least {low}, got {shown(value)}")
        if self.size is not None and self.size > MAX_SIDE:
            raise InputError(f"size must be at most {MAX_SIDE} pixels, got {shown(self.size)}")


class DatasetSource(ABC):
    """One data set in its standard on-disk layout, or made from a seed.

    Subclasses state the class variables and write :meth:`load`. A source whose name ends in ":" takes the rest of the
    user's name as its argument (``folder:PATH``).
    """

    name: ClassVar[str]
    modalities: ClassVar[tuple[str, ...]]
    summary: ClassVar[str]
    """One line for ``list datasets``: classes, sizes, licence."""
    download_url: ClassVar[str] = ""
    """Where :option:`--download` fetches from; empty for sets that are embedded or brought by the user."""
    obtain: ClassVar[str] = ""
    """For sets that cannot be fetched automatically: where a person finds them and where they belong."""
    rescales: ClassVar[bool] = False
    """May ``DatasetSpec.size`` be given? Text and audio have no height and width."""

    @abstractmethod
    def load(self, spec: DatasetSpec, argument: str, roots: tuple[Path, ...], download: bool) -> Dataset:
        """Read the whole data set.

        Args:
            spec: what was asked for; subsets are taken by the caller, only ``size`` and ``seed`` matter here.
            argument: what follows the colon in the name, or "".
            roots: folders to look in, in this order.
            download: whether missing files may be fetched (into ``roots[-1]``).

        Raises:
            InputError: if files are missing (saying where it looked), damaged, or cannot be used.
        """


datasets: Registry[DatasetSource] = Registry("dataset", ("backdoorlab.data",), "backdoorlab.datasets")


def search_roots(root: str | Path | None) -> tuple[Path, ...]:
    """Folders in which data sets are looked for: ``root``, $BACKDOORLAB_DATA, the user's cache."""
    named = [root, os.environ.get("BACKDOORLAB_DATA")]
    cache = Path(platformdirs.user_cache_dir("backdoorlab")) / "data"
    return (*[user_path(p) for p in named if p], cache)


def find_file(roots: tuple[Path, ...], relative: str, source: DatasetSource) -> Path:
    """First existing ``root/relative``, or an error that says where it looked and how to get the data."""
    for root in roots:
        if exists(root / relative):
            return root / relative
    how = f" Pass --download to fetch it from {source.download_url}." if source.download_url else ""
    by_hand = f" {source.obtain}" if source.obtain else ""
    raise InputError(
        f"dataset {source.name!r}: found no {relative} in {', '.join(map(str, roots))}. "
        f"Set --root or $BACKDOORLAB_DATA to the folder that holds it.{how}{by_hand}"
    )


def load_dataset(
    name: str | DatasetSpec,
    *,
    root: str | Path | None = None,
    download: bool = False,
    size: int | None = None,
    train_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Load a data set by name.

    Args:
        name: "digits", "cifar10", "folder:PATH", ... or a whole :class:`DatasetSpec`.
        root: folder to look in first; then $BACKDOORLAB_DATA, then the user's cache.
        download: fetch missing files (checksummed) into the last of these.
        size: height and width in pixels, where the source can rescale.
        train_size: class-balanced subset of the training set.
        test_size: class-balanced subset of the test set.
        seed: of subsets and procedural sets.

    Raises:
        InputError: unknown name, files not found, bad files, or a subset larger than the set.
    """
    spec = (
        name
        if isinstance(name, DatasetSpec)
        else DatasetSpec(name=name, size=size, train_size=train_size, test_size=test_size, seed=seed)
    )
    head, colon, argument = spec.name.partition(":")
    source = datasets.get(head + colon)()
    if colon and not argument:
        raise InputError(f"dataset {spec.name!r} lacks what follows the colon, for example {head}:my-data")
    if spec.size is not None and not source.rescales:
        raise InputError(f"dataset {spec.name!r} cannot be rescaled: leave size unset (got {spec.size})")
    loaded = source.load(spec, argument, search_roots(root), download)
    rows = (
        subset_rows(loaded.train, spec.train_size, spec.seed, spec.name, "training"),
        subset_rows(loaded.test, spec.test_size, spec.seed, spec.name, "test"),
    )
    train, test = (
        split if row is None else split[row] for split, row in zip((loaded.train, loaded.test), rows, strict=True)
    )
    captions = loaded.captions
    if captions is not None:
        chosen = [c if r is None else tuple(c[i] for i in r.tolist()) for c, r in zip(captions, rows, strict=True)]
        captions = (chosen[0], chosen[1])
    return dataclasses.replace(loaded, name=spec.name, train=train, test=test, captions=captions)


def balanced_subset(split: Split, size: int | None, seed: int, what: str) -> Split:
    """A random subset of ``size`` samples with class counts as equal as the data allow, in the original order.

    Args:
        split: the whole set.
        size: number of samples wanted; None keeps all.
        seed: of the choice.
        what: for messages, "<name> training set" or "<name> test set".

    Raises:
        InputError: if more samples are asked for than there are.
    """
    name, part, _ = what.rsplit(" ", 2)
    rows = subset_rows(split, size, seed, name, part)
    return split if rows is None else split[rows]


def subset_rows(split: Split, size: int | None, seed: int, name: str, part: str) -> Tensor | None:
    """Rows (int64 [size], ascending) of :func:`balanced_subset`, or None where all are kept."""
    if size is None or size == len(split):
        return None
    if size > len(split):
        raise InputError(f"{name} {part} set has {len(split)} samples, {size} were asked for")
    order = torch.randperm(len(split), generator=make_generator(seed, "subset", part))
    # The smallest ranks within each class, in shuffled order, are as balanced as can be.
    rank = ranks_within_class(split.labels[order], split.num_classes)
    return order[torch.argsort(rank, stable=True)[:size]].sort().values


def ranks_within_class(labels: Tensor, num_classes: int) -> Tensor:
    """For each sample, how many samples of its class come before it: int64 [N]."""
    counts = torch.bincount(labels, minlength=num_classes)
    grouped = torch.argsort(labels, stable=True)
    rank = torch.empty_like(labels)
    rank[grouped] = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[grouped]]
    return rank


def holdout(
    labels: Tensor, classes: tuple[str, ...], seed: int, what: str, share: float = 0.2
) -> tuple[Tensor, Tensor]:
    """A seeded split into training and test rows that takes the same share of every class.

    Args:
        labels: int64 [N].
        classes: K names.
        seed: of the split.
        what: the data set's name, for messages.
        share: of each class that goes to the test set, rounded, at least one sample.

    Returns:
        Rows of the training and of the test set, ascending.

    Raises:
        InputError: if a class has fewer than two samples.
    """
    counts = torch.bincount(labels, minlength=len(classes))
    if int(counts.min()) < 2:
        k = int(counts.argmin())
        raise InputError(
            f"{what}: class {classes[k]!r} has {int(counts[k])} sample(s); to split off a test set each class needs at "
            "least 2 (or provide a train and a test part yourself)"
        )
    order = torch.randperm(len(labels), generator=make_generator(seed, "holdout"))
    rank = torch.empty_like(labels)
    rank[order] = ranks_within_class(labels[order], len(classes))
    is_test = rank < (counts * share).round().clamp(min=1).to(torch.int64)[labels]
    return (~is_test).nonzero().flatten(), is_test.nonzero().flatten()
