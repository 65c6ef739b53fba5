"""Seed, device and progress as plain values, for callers who do not want to make a context themselves."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from tqdm.auto import tqdm

from backdoorlab.core.errors import InputError, unknown
from backdoorlab.training.context import Context, Reporter, Silent

T = TypeVar("T")

DEVICES = ("auto", "cpu", "cuda")


class Bars:
    """Progress bars by tqdm: on terminals and, as widgets, in notebooks. Fulfils :class:`Reporter`."""

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Iterate while showing how far along it is."""
        yield from tqdm(items, desc=label, total=total, leave=False)

    def note(self, text: str) -> None:
        """Tell one line, above the bars."""
        tqdm.write(text, file=sys.stderr)


def device_of(given: str | torch.device, name: str = "device") -> torch.device:
    """The device meant by "auto", "cpu", "cuda" or "cuda:1".

    Args:
        given: what the user wrote.
        name: of the argument or option, for messages.

    Raises:
        InputError: for an unknown one, or CUDA without a usable GPU.
    """
    if isinstance(given, torch.device):
        return given
    kind, _, index = given.partition(":")
    if kind not in DEVICES or (index and (kind != "cuda" or not index.isdecimal())):
        raise unknown("device", given, DEVICES)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "auto":
        return torch.device("cuda" if count else "cpu")
    if kind == "cuda" and int(index or 0) >= count:
        raise InputError(f"{name} {given}: this machine has {count or 'no'} usable CUDA devices; use cpu or auto")
    return torch.device(given)


def session(
    seed: int = 0, device: str | torch.device = "auto", progress: bool | None = None, stage: str = ""
) -> Context:
    """A context.

    Args:
        seed: all randomness derives from it.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        progress: show bars; None shows them on a terminal and in a notebook.
        stage: of a run, such as "attack"; its seed derives from it, as in the benchmark, so that a notebook and the
            command line give the same bits.

    Raises:
        InputError: for a device that there is not.
    """
    shown = _interactive() if progress is None else progress
    reporter: Reporter = Bars() if shown else Silent()
    context = Context(seed, device_of(device), reporter)
    return context.child(stage) if stage else context


def _interactive() -> bool:
    return sys.stderr.isatty() or "ipykernel" in sys.modules
