"""Options that several commands share, and how their text becomes values."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from backdoorlab.core.errors import InputError, unknown

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda")

StoreOption = Annotated[
    str, typer.Option("--store", help="Folder of all results; default $BACKDOORLAB_STORE or ./runs.", metavar="DIR")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, for scripts.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="All randomness derives from it.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu or cuda (cuda:1, ...).", metavar="DEVICE")]
RootOption = Annotated[
    str | None,
    typer.Option("--root", help="Folder with data sets, searched before $BACKDOORLAB_DATA.", metavar="DIR"),
]
DownloadOption = Annotated[bool, typer.Option("--download", help="Fetch missing data (checksummed).")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a hyper-parameter; repeatable. See NAME --help.", metavar="KEY=VALUE"),
]
HelpOption = Annotated[bool, typer.Option("--help", help="Show this page, or with NAME that of the method.")]
OWN_HELP: dict[str, list[str]] = {"help_option_names": []}
"""Context settings of commands whose ``NAME --help`` shows the method's page."""


def store_path(given: str) -> Path:
    """The store's folder: the option, else $BACKDOORLAB_STORE, else ./runs.

    Raises:
        InputError: if the path exists and is no folder.
    """
    path = Path(given or os.environ.get("BACKDOORLAB_STORE") or "runs").expanduser()
    if path.exists() and not path.is_dir():
        raise InputError(f"--store: {path} is a file; expected a folder (it is made if it does not exist)")
    return path


def existing_store(given: str) -> Path:
    """The store's folder, for commands that only read it.

    Raises:
        InputError: if there is none.
    """
    path = store_path(given)
    if not path.exists():
        raise InputError(
            f"no store at {path}; expected --store DIR or $BACKDOORLAB_STORE to name a folder of results "
            "(`backdoorlab attack badnets` makes one)"
        )
    return path


def pairs(given: Sequence[str] | None, option: str = "--set", words: str = "_") -> dict[str, str]:
    """``["size=5"]`` as ``{"size": "5"}``.

    Args:
        given: what the user wrote.
        option: its name, for messages.
        words: what the names that are meant have between words, "_" or "-"; either is understood.

    Raises:
        InputError: for an item without "=", without a name, or a name given twice.
    """
    found: dict[str, str] = {}
    for item in given or ():
        key, equals, value = item.partition("=")
        key = key.strip().replace("-", words).replace("_", words)
        if not equals or not key:
            form = "KIND=FILE such as clean-surrogate=m.safetensors" if words == "-" else "KEY=VALUE such as size=5"
            raise InputError(f"{option}: expected {form}, got {item!r}")
        if key in found:
            raise InputError(f"{option}: {key} is given twice ({found[key]!r} and {value!r})")
        found[key] = value.strip()
    return found


def literal(text: str) -> float | int | str | bool:
    """A recipe value as the number or truth value that it looks like."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def device_of(given: str) -> torch.device:
    """The device meant by --device.

    Raises:
        InputError: for an unknown one, or CUDA without a usable GPU.
    """
    import torch

    kind, _, index = given.partition(":")
    if kind not in DEVICES or (index and (kind != "cuda" or not index.isdecimal())):
        raise unknown("device", given, DEVICES)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "auto":
        return torch.device("cuda" if count else "cpu")
    if kind == "cuda" and int(index or 0) >= count:
        raise InputError(f"--device {given}: this machine has {count or 'no'} usable CUDA devices; use cpu or auto")
    return torch.device(given)
