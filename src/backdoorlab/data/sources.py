"""Where data sets come from: one file per source, one door (:func:`load_dataset`) for all of them."""

from __future__ import annotations

import dataclasses
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import platformdirs
import torch

from backdoorlab.core.errors import InputError
from backdoorlab.core.registry import Registry
from backdoorlab.core.seeding import make_generator
from backdoorlab.data.split import Dataset, Split


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
        for key, low in (("size", 8), ("train_size", 1), ("test_size", 1)):
            value = getattr(self, key)
            if value is not None and value < low:
                raise InputError(f"{key} must be at least {low}, got {value}")


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
    return (*[Path(p).expanduser() for p in named if p], cache)


def find_file(roots: tuple[Path, ...], relative: str, source: DatasetSource) -> Path:
    """First existing ``root/relative``, or an error that says where it looked and how to get the data."""
    for root in roots:
        if (root / relative).exists():
            return root / relative
    how = f" Pass --download to fetch it from {source.download_url}." if source.download_url else ""
    raise InputError(
        f"dataset {source.name!r}: found no {relative} in {', '.join(map(str, roots))}. "
        f"Set --root or $BACKDOORLAB_DATA to the folder that holds it.{how}"
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
    spec = name if isinstance(name, DatasetSpec) else DatasetSpec(
        name=name, size=size, train_size=train_size, test_size=test_size, seed=seed)  # fmt: skip
    head, colon, argument = spec.name.partition(":")
    source = datasets.get(head + colon)()
    loaded = source.load(spec, argument, search_roots(root), download)
    train = balanced_subset(loaded.train, spec.train_size, spec.seed, f"{spec.name} training set")
    test = balanced_subset(loaded.test, spec.test_size, spec.seed, f"{spec.name} test set")
    return dataclasses.replace(loaded, name=spec.name, train=train, test=test)


def balanced_subset(split: Split, size: int | None, seed: int, what: str) -> Split:
    """A random subset of ``size`` samples with class counts as equal as the data allow, in the original order.

    Raises:
        InputError: if more samples are asked for than there are.
    """
    if size is None or size == len(split):
        return split
    if size > len(split):
        raise InputError(f"{what} has {len(split)} samples, {size} were asked for")
    order = torch.randperm(len(split), generator=make_generator(seed, "subset", what.rsplit(" ", 2)[-2]))
    # Rank of each sample within its class, in shuffled order: the smallest ranks are as balanced as can be.
    labels, rank = split.labels[order], torch.zeros(len(split), dtype=torch.int64)
    for k in range(split.num_classes):
        mine = labels == k
        rank[mine] = torch.arange(int(mine.sum()))
    chosen = order[torch.argsort(rank, stable=True)[:size]]
    return split[chosen.sort().values]
