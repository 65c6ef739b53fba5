"""Where output goes: results to standard output, everything else to standard error.

This is the one place that prints text which others wrote (cards, class names, file names, error messages). Nothing here
interprets markup, and whatever reaches a console goes through :func:`~backdoorlab.core.foreign.visible`; commands call
:func:`shown` or :func:`visible` where they put such text into a line or a table, so that widths are right too.
"""

from __future__ import annotations

import codecs
import csv
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from backdoorlab.core.foreign import csv_cell, json_safe, visible

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

T = TypeVar("T")

_PLAIN = {"–": "-", "—": "-", "·": "-", "…": "...", "×": "x", "∞": "inf", "≥": ">=", "≤": "<=", "−": "-", "µ": "u"}
"""Characters in texts of this library, and what stands for them in encodings that lack them."""


class SafeConsole(Console):
    """A console that interprets no markup in strings and prints no control character that a text brought along."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Segments of a renderable, with harmful characters of their texts made visible."""
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(visible(text, keep="\n"), style)

    def on_broken_pipe(self) -> None:
        """The reader of our output, such as ``head``, has gone: the entry point ends quietly."""
        raise BrokenPipeError


out = SafeConsole(markup=False, emoji=False, highlight=False)
err = SafeConsole(markup=False, emoji=False, highlight=False, stderr=True)


def shown(text: object, style: str | Style = "") -> Text:
    """Foreign text for a line or a table's cell: on one line, nothing in it obeyed or hidden."""
    return Text(visible(text), style=style)


def complain(message: object, label: str = "error: ", style: str = "bold red") -> None:
    """One message on standard error, never wrapped, so that paths in it can be copied."""
    err.print(Text.assemble((label, style), visible(message)), soft_wrap=True)


def warn(message: object) -> None:
    """Something that the user should know, on standard error."""
    complain(message, label="warning: ", style="bold yellow")


def print_json(value: Any) -> None:
    """One JSON value on standard output; what is not finite becomes null, strings are what they are."""
    text = json_safe(json.dumps(_finite(value), indent=2, allow_nan=False, ensure_ascii=False))
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(_finite(value), indent=2, allow_nan=False)
    print(text)


def print_csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Comma-separated values on standard output; text that a spreadsheet takes for a formula gets an apostrophe."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    for row in (columns, *rows):
        writer.writerow([visible(csv_cell(v), keep="\n") if isinstance(v, str) else v for v in row])


def tolerant_streams() -> None:
    """Let standard output and error write what their encoding lacks as a similar plain character or an escape."""
    codecs.register_error("backdoorlab.plain", _plainer)
    if sys.stdout is None:  # closed by the caller
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None and stream.errors in ("strict", "surrogateescape", "backslashreplace"):
            reconfigure(errors="backdoorlab.plain")


def abandon_output() -> None:
    """Point standard output at nothing, after its reader has gone; otherwise Python complains when it exits."""
    try:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)
    except (OSError, ValueError):  # not a stream of the system, as in tests
        pass


def settle_output() -> None:
    """Write what is still buffered; if that fails, drop it, or Python fails once more when it exits."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        abandon_output()


def _plainer(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    plain = (_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in characters)
    return "".join(plain), error.end


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

    Fulfils :class:`backdoorlab.training.context.Reporter`. The bar is shown only while something is being tracked, so
    that results can be printed at any time.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._bar: Bars | None = None
        self._noted: set[str] = set()

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Iterate while showing how far along it is."""
        started, count = time.perf_counter(), 0
        task = self._open(label, total)
        try:
            for item in items:
                yield item
                count += 1
                if self._bar is not None and task is not None:
                    self._bar.advance(task)
        finally:
            self._close(task)
            seconds = time.perf_counter() - started
            if not err.is_terminal and not self._depth and seconds >= 1:
                self._print(shown(f"{label}: {count} steps in {seconds:.1f} s", "dim"))

    def note(self, text: str) -> None:
        """Print one line, once: a grid looks up the same attack for every defense."""
        if text not in self._noted:
            self._noted.add(text)
            self._print(Text.assemble(("note: ", "bold yellow"), visible(text)))

    def _print(self, line: Text) -> None:
        (self._bar.console if self._bar is not None else err).print(line, soft_wrap=True)

    def _open(self, label: str, total: int | None) -> TaskID | None:
        self._depth += 1
        if not err.is_terminal:
            return None
        if self._bar is None:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bars

            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("[dim]left[/]"),
                TimeRemainingColumn(),
            )
            self._bar = Bars(*columns, console=err, transient=True)
            self._bar.start()
        return self._bar.add_task(visible(label), total=total)

    def _close(self, task: TaskID | None) -> None:
        self._depth -= 1
        if self._bar is not None and task is not None:
            self._bar.remove_task(task)
            if not self._depth:
                self._bar.stop()
                self._bar = None
