"""Where output goes: results to standard output, everything else to standard error."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.text import Text

T = TypeVar("T")

out = Console()
err = Console(stderr=True)


def complain(message: str, label: str = "error: ") -> None:
    """One message on standard error, never wrapped, so that paths in it can be copied."""
    err.print(Text.assemble((label, "bold red"), message), soft_wrap=True)


def print_json(value: Any) -> None:
    """One JSON value on standard output; what is not finite becomes null."""
    print(json.dumps(_finite(value), indent=2, allow_nan=False, ensure_ascii=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value


def number(value: Any, digits: int = 3) -> str:
    """A metric for a table: fixed digits, a dash for what does not apply."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


class Progress:
    """Shows progress on standard error: bars on a terminal, a line per longer stage elsewhere.

    Fulfils :class:`backdoorlab.training.context.Reporter`. The bar lives only while something is being tracked, so that
    results can be printed at any time.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._bar: Any = None
        self._told: set[str] = set()

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Iterate while showing how far along it is."""
        started, count = time.perf_counter(), 0
        task = self._open(label, total)
        try:
            for item in items:
                yield item
                count += 1
                if self._bar is not None:
                    self._bar.advance(task)
        finally:
            self._close(task)
            seconds = time.perf_counter() - started
            if not err.is_terminal and not self._depth and seconds >= 1:
                self.note(f"{label}: {count} steps in {seconds:.1f} s")

    def note(self, text: str) -> None:
        """Tell one line, once: a grid looks up the same attack for every defense."""
        if text in self._told:
            return
        self._told.add(text)
        (self._bar.console if self._bar is not None else err).print(Text(text, style="dim"), soft_wrap=True)

    def _open(self, label: str, total: int | None) -> Any:
        self._depth += 1
        if not err.is_terminal:
            return None
        if self._bar is None:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bars

            columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(),
                       TimeElapsedColumn(), TextColumn("[dim]left[/]"), TimeRemainingColumn())  # fmt: skip
            self._bar = Bars(*columns, console=err, transient=True)
            self._bar.start()
        return self._bar.add_task(label, total=total)

    def _close(self, task: Any) -> None:
        self._depth -= 1
        if self._bar is not None:
            self._bar.remove_task(task)
            if not self._depth:
                self._bar.stop()
                self._bar = None
