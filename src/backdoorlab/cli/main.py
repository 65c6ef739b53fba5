"""Entry point: assembles the commands and turns every error into one message and an exit code.

Exit codes: 0 done, 1 the work failed, 2 the input cannot be used, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import backdoorlab
from backdoorlab.cli import attack, bench, defend, export, files, listing, quickstart, results, show
from backdoorlab.cli.console import complain, err, out
from backdoorlab.core.errors import BackdoorLabError

INTERRUPTED = 130


class Interrupted(Exception):
    """Ctrl-C, under a name that typer does not treat on its own."""


class _Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted from None


app = typer.Typer(
    cls=_Group, no_args_is_help=True, rich_markup_mode="rich", add_completion=False, pretty_exceptions_enable=False,
    help="Backdoor attacks, defenses and fair benchmarks for image, text, audio, video and diffusion models.",
    epilog="Start with [bold]backdoorlab quickstart[/]: two minutes at most, nothing to download. Results go to "
    "$BACKDOORLAB_STORE or ./runs. Exit codes: 0 done, 1 the work failed, 2 the input cannot be used.",
)  # fmt: skip


def _version(asked: bool) -> None:
    if asked:
        out.print(f"backdoorlab {backdoorlab.__version__}", highlight=False)
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


for _module in (quickstart, listing, attack, defend, bench, results, show, export, files):
    _module.register(app)


def run(argv: list[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        argv: arguments without the program's name; None takes them from ``sys.argv``.
    """
    before = os.environ.get("BACKDOORLAB_DEBUG")
    try:
        typer.main.get_command(app).main(sys.argv[1:] if argv is None else list(argv), prog_name="backdoorlab")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Interrupted:
        complain("interrupted; run the same command again to resume", label="")
        return INTERRUPTED
    except BackdoorLabError as error:
        _traceback()
        complain(str(error))
        return error.exit_code
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
        return 0
    except Exception as error:
        if not _traceback():
            complain(
                f"{type(error).__name__}: {_one_line(error)} (a bug, or a fault of the machine; "
                "`backdoorlab --debug ...` or BACKDOORLAB_DEBUG=1 shows the traceback)"
            )
        return 1
    finally:
        if before is None:
            os.environ.pop("BACKDOORLAB_DEBUG", None)
    return 0


def _traceback() -> bool:
    wanted = os.environ.get("BACKDOORLAB_DEBUG", "") not in ("", "0")
    if wanted:
        err.print(traceback.format_exc(), markup=False, highlight=False, soft_wrap=True)
    return wanted


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
