"""Options that several commands share, and how their text becomes values."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from backdoorlab.core.errors import InputError
from backdoorlab.core.excerpt import brief
from backdoorlab.core.paths import exists, is_file, is_folder, user_path

if TYPE_CHECKING:
    import torch

    from backdoorlab.benchmark.store import Store

_LONGEST = 255
"""Bytes of one name in a path that file systems take."""


def seed_check(option: str) -> Callable[[int | None], int | None]:
    """Callback of a seed's option.

    Raises:
        InputError: for an integer that is no seed.
    """

    def check(value: int | None) -> int | None:
        from backdoorlab.core.settings import check_seed

        if value is not None:
            check_seed(option, value)
        return value

    return check


StoreOption = Annotated[
    str,
    typer.Option(
        "--store", help="Folder (or URL) of all results; default $BACKDOORLAB_STORE or ./runs.", metavar="DIR"
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, for scripts.")]
SeedOption = Annotated[
    int,
    typer.Option("--seed", help="Seed of everything random in the run.", metavar="SEED", callback=seed_check("--seed")),
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="Where models run: auto, cpu or cuda (cuda:1, ...).", metavar="DEVICE")
]
RootOption = Annotated[
    str | None,
    typer.Option("--root", help="Folder with data sets, searched before $BACKDOORLAB_DATA.", metavar="DIR"),
]
DownloadOption = Annotated[
    bool, typer.Option("--download", help="Download data sets that are missing; checksums are verified.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a hyper-parameter (NAME --help lists them); repeatable.", metavar="KEY=VALUE"),
]
HelpOption = Annotated[bool, typer.Option("--help", help="Show this page; with NAME, the page of the method.")]
OWN_HELP: dict[str, list[str]] = {"help_option_names": []}
"""Context settings of commands whose ``NAME --help`` shows the method's page."""


def output_folder(text: str | Path, option: str) -> Path:
    """A folder that the command writes to; it need not exist. Nothing is made here.

    Args:
        text: what the user wrote.
        option: its name, for messages.

    Raises:
        InputError: if it cannot be a folder that this user may write to: empty, an unknown user's home, a file, below
            a file, too long, or below a folder without permission to write.
    """
    path = _path_of(text, option)
    if _ask(option, exists, path) and not _ask(option, is_folder, path):
        raise InputError(f"{option}: {path} is a file; expected a folder (it is made if it does not exist)")
    _need_writable(path, option)
    return path


def output_file(text: str | Path, option: str) -> Path:
    """A file that the command writes; its folder need not exist. Nothing is made here.

    Raises:
        InputError: if there is a folder of that name, or its folder cannot be used; see :func:`output_folder`.
    """
    path = _path_of(text, option)
    if _ask(option, is_folder, path):
        raise InputError(f"{option}: {path} is a folder; expected the name of a file in it, such as {path}/out.png")
    if _ask(option, exists, path) and not _ask(option, is_file, path):
        raise InputError(f"{option}: {path} is neither a file nor a folder; expected a file (it need not exist)")
    _need_writable(path.parent, option)
    return path


def existing_folder(text: str, option: str) -> Path:
    """A folder that the command reads.

    Raises:
        InputError: if there is none.
    """
    path = _path_of(text, option)
    if not _ask(option, is_folder, path):
        raise InputError(f"{option}: no such folder: {text}")
    return path


def existing_file(text: str | Path, what: str) -> Path:
    """A file that the command reads.

    Args:
        text: what the user wrote.
        what: it is, for messages, such as "grid file".

    Raises:
        InputError: if there is none.
    """
    path = _path_of(text, what)
    if not _ask(what, is_file, path):
        raise InputError(f"no such {what}: {text}")
    return path


def _path_of(text: str | Path, option: str) -> Path:
    if not str(text).strip():
        raise InputError(f"{option}: expected a path, got nothing")
    try:
        path = user_path(text)
    except InputError as error:
        raise InputError(f"{option}: {error}") from None
    if any(len(os.fsencode(part)) > _LONGEST for part in path.parts):
        raise InputError(f"{option}: a name in the path has more than {_LONGEST} bytes: {brief(str(text))}")
    return path


def _need_writable(folder: Path, option: str) -> None:
    """The nearest folder that exists must be one, and let this user write."""
    parent = _nearest_folder(folder, option)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{option}: cannot write to {folder}: no permission to write in {parent}")


def _nearest_folder(folder: Path, option: str) -> Path:
    """The folder itself if it exists, else the nearest one above it that does."""
    parents = (folder.absolute(), *folder.absolute().parents)
    nearest = next(path for path in parents if _ask(option, exists, path))
    if not _ask(option, is_folder, nearest):
        raise InputError(f"{option}: cannot use {folder}: {nearest} is a file, not a folder")
    return nearest


def _ask(option: str, question: Callable[[Path], bool], path: Path) -> bool:
    """The answer of the file system; an error of it gets the option's name."""
    try:
        return question(path)
    except InputError as error:
        raise InputError(f"{option}: {error}") from None


def open_store(option: str) -> Store:
    """The store meant by --store: the option, else $BACKDOORLAB_STORE, else ./runs; a folder or a URL.

    A folder that does not exist yet, or may only be read, is no error here: results that are there can be read, and
    whatever has to be written fails before its work begins.

    Raises:
        InputError: if it cannot be a folder, or the URL cannot be used.
    """
    text = _store_name(option)
    if "://" in text and not text.startswith("file://"):
        from backdoorlab.benchmark.remote import RemoteStore

        return RemoteStore(text)
    path = _path_of(text.removeprefix("file://"), "--store")
    if _ask("--store", exists, path) and not _ask("--store", is_folder, path):
        raise InputError(f"--store: {path} is a file; expected a folder (it is made if it does not exist)")
    _nearest_folder(path, "--store")
    from backdoorlab.benchmark.store import Store

    return Store(path)


def existing_store(option: str) -> Store:
    """The same for commands that only read: a folder must be there.

    Raises:
        InputError: if there is none.
    """
    store = open_store(option)
    if hasattr(store, "url") or _ask("--store", is_folder, store.root):
        return store
    raise InputError(
        f"no store at {_store_name(option)}; expected --store DIR or $BACKDOORLAB_STORE to name a folder of results "
        "(`backdoorlab attack badnets` makes one)"
    )


def _store_name(option: str) -> str:
    return option or os.environ.get("BACKDOORLAB_STORE") or "runs"


def pairs(items: Sequence[str] | None, option: str = "--set", separator: str = "_") -> dict[str, str]:
    """``["size=5"]`` as ``{"size": "5"}``.

    Args:
        items: what the user wrote.
        option: its name, for messages.
        separator: what stands between the words of a name, "_" or "-"; users may write either.

    Raises:
        InputError: for an item without "=", without a name, or a name given twice.
    """
    values: dict[str, str] = {}
    for item in items or ():
        key, equals, value = item.partition("=")
        key = key.strip().replace("-", separator).replace("_", separator)
        if not equals or not key:
            form = "KIND=FILE such as clean-surrogate=m.safetensors" if separator == "-" else "KEY=VALUE such as size=5"
            raise InputError(f"{option}: expected {form}, got {item!r}")
        if key in values:
            raise InputError(f"{option}: {key} is given twice ({values[key]!r} and {value!r})")
        values[key] = value.strip()
    return values


def device_of(name: str) -> torch.device:
    """The device meant by --device.

    Raises:
        InputError: for an unknown one, or CUDA without a usable GPU.
    """
    from backdoorlab.training import session

    return session.device_of(name, "--device")
