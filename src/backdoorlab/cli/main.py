"""Entry point: assembles the commands and turns every error into one message and an exit code.

Exit codes: 0 done, 1 the work failed, 2 the input cannot be used, 130 interrupted (Ctrl-C), 143 terminated (SIGTERM).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

import backdoorlab
from backdoorlab.cli import attack, bench, defend, export, files, listing, quickstart, results, show, study
from backdoorlab.cli.console import abandon_output, complain, err, out, settle_output, tolerant_streams, warn
from backdoorlab.cli.helppage import without_types
from backdoorlab.core.errors import BackdoorLabError, DataWarning

INTERRUPTED, TERMINATED = 130, 143


class Terminated(KeyboardInterrupt):
    """SIGTERM: whatever cleans up after Ctrl-C cleans up after it too."""


class Stopped(Exception):
    """An interrupt or a closed pipe, under a name that typer does not treat on its own.

    Attributes:
        cause: the exception itself.
    """

    def __init__(self, cause: BaseException) -> None:
        super().__init__()
        self.cause = cause


class _Group(TyperGroup):
    def get_params(self, ctx: Any) -> list[Any]:
        """All parameters, ready to be shown."""
        return without_types(super().get_params(ctx))

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, BrokenPipeError) as error:
            raise Stopped(error) from error


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Backdoor attacks, defenses and fair benchmarks for image, text, audio, video and diffusion models.",
    epilog="Start with [bold]backdoorlab quickstart[/]: two minutes at most, nothing to download. Results go to "
    "$BACKDOORLAB_STORE or ./runs. Exit codes: 0 done, 1 the work failed, 2 the input cannot be used, 130 or 143 "
    "interrupted.",
)


def _version(show: bool) -> None:
    if show:
        out.print(f"backdoorlab {backdoorlab.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks of errors (or set BACKDOORLAB_DEBUG=1).")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    if debug:
        os.environ["BACKDOORLAB_DEBUG"] = "1"


for _module in (quickstart, listing, attack, defend, bench, study, results, show, export, files):
    _module.register(app)


def run(argv: list[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        argv: arguments without the program's name; None takes them from ``sys.argv``.
    """
    before = os.environ.get("BACKDOORLAB_DEBUG")
    tolerant_streams()
    try:
        with _sigterm_raises(), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = typer.main.get_command(app).main(
                sys.argv[1:] if argv is None else list(argv), prog_name="backdoorlab", standalone_mode=False
            )
            sys.stdout.flush()  # here, where a closed pipe or a full disk can still be reported
            return code if isinstance(code, int) else 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except (Stopped, KeyboardInterrupt, BrokenPipeError) as stop:
        return _stopped(stop.cause if isinstance(stop, Stopped) else stop)
    except BackdoorLabError as error:
        _traceback()
        complain(error)
        return error.exit_code
    except OSError as error:  # a full disk, a folder without permission, a name that is too long
        _traceback()
        where = error.filename if error.filename is not None else "the system refused"
        complain(f"{where}: {error.strerror or error}")
        return 2
    except Exception as error:
        usage = getattr(error, "format_message", None)
        if usage is not None:
            return _wrong_usage(error, usage())
        if not _traceback():
            complain(
                f"{type(error).__name__}: {_one_line(error)} (a bug, or a fault of the machine; "
                "`backdoorlab --debug ...` or BACKDOORLAB_DEBUG=1 shows the traceback)"
            )
        return 1
    finally:
        settle_output()
        if before is None:
            os.environ.pop("BACKDOORLAB_DEBUG", None)


def _stopped(cause: BaseException) -> int:
    if isinstance(cause, BrokenPipeError):
        abandon_output()
        return 0
    if isinstance(cause, Terminated):
        complain("terminated; run the same command again to resume", label="")
        return TERMINATED
    complain("interrupted; run the same command again to resume", label="")
    return INTERRUPTED


def _wrong_usage(error: Exception, message: str) -> int:
    """An unknown option or command, a missing argument: typer's message and how the command is used."""
    if type(error).__name__ != "NoArgsIsHelpError":  # that one has printed the help
        complain(" ".join(message.split()))
        ctx = getattr(error, "ctx", None)
        if ctx is not None:
            err.print(f"{' '.join(ctx.get_usage().split())}   (more: {ctx.command_path} --help)", soft_wrap=True)
    return int(getattr(error, "exit_code", 2))


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Within the block SIGTERM raises :class:`Terminated` in the main thread, as Ctrl-C raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets only the main thread install handlers
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if issubclass(category, DataWarning):
        warn(message)
    else:
        err.print(f"{filename}:{lineno}: {category.__name__}: {message}", style="dim", soft_wrap=True)


def _traceback() -> bool:
    debugging = os.environ.get("BACKDOORLAB_DEBUG", "") not in ("", "0")
    if debugging:
        err.print(traceback.format_exc(), soft_wrap=True)
    return debugging


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
