"""How a command line ends: signals, closed pipes, full or ASCII-only outputs, warnings. Exit codes are a contract."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import backdoorlab.benchmark.runner as runner
from backdoorlab.cli.main import run
from backdoorlab.core.errors import DataWarning

POSIX = pytest.mark.skipif(os.name != "posix", reason="signals and pipes of POSIX")
ARGV = [sys.executable, "-m", "backdoorlab"]


@POSIX
@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_signals(
    cli: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    number: signal.Signals,
    code: int,
    word: str,
) -> None:
    cleaned = []

    def stage(*_: object) -> None:
        try:
            os.kill(os.getpid(), number)
            threading.Event().wait(30)
        except KeyboardInterrupt:
            cleaned.append(True)
            raise

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(runner.Runner, "run", stage)
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # workers of pytest-xdist ignore it
    try:
        reply = cli("attack", "badnets", "--store", tmp_path)
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert reply.code == code
    assert reply.err == f"{word}; run the same command again to resume\n"
    assert cleaned, "what cleans up after Ctrl-C cleans up after SIGTERM too"
    assert signal.getsignal(signal.SIGTERM) is before


@POSIX
@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_while_training(tmp_path: Path, number: signal.Signals, code: int) -> None:
    argv = [
        "attack",
        "badnets",
        "--recipe",
        "reference",
        "--recipe-set",
        "epochs=10000",
        "--store",
        str(tmp_path / "s"),
    ]
    with subprocess.Popen([*ARGV, *argv], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            while not list(tmp_path.glob("s/.locks/attack-*")):  # it holds the lock of its stage
                assert process.poll() is None
                threading.Event().wait(0.1)
            threading.Event().wait(2)
            process.send_signal(number)
            _, told = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == code
    assert told.splitlines()[-1].endswith("run the same command again to resume")
    assert "Traceback" not in told
    assert not list(tmp_path.glob("s/*/.tmp-*"))
    assert not list(tmp_path.glob("s/attack/*"))


def test_in_another_thread_no_signal_handler_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(run(["--version"])))
    thread.start()
    thread.join()
    assert codes == [0]


@POSIX
@pytest.mark.parametrize(
    "argv", [("list", "attacks", "--json"), ("list", "attacks"), ("list", "attacks", "--markdown")]
)
def test_a_reader_that_has_gone_is_no_error(argv: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*ARGV, *argv], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no device that is always full")
@pytest.mark.parametrize("argv", [("list", "attacks", "--json"), ("list", "attacks")])
def test_a_full_output_is_one_line_and_exit_code_2(argv: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*ARGV, *argv], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "error: the system refused: No space left on device\n")


@pytest.mark.parametrize(
    "setting", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}]
)
@pytest.mark.parametrize(
    "argv", [("results",), ("results", "--json"), ("show", "{attack}"), ("attack", "wanet", "--help")]
)
def test_an_ascii_only_output(lab: Any, setting: dict[str, str], argv: tuple[str, ...]) -> None:
    words = [word.format(attack=lab.attack) for word in argv]
    words += [] if "--help" in words else ["--store", str(lab.store)]
    environment = {k: v for k, v in os.environ.items() if k not in ("LC_ALL", "LANG")} | setting
    done = subprocess.run([*ARGV, *words], capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.isascii()
    if "--json" in words:
        assert len(json.loads(done.stdout)) >= 3


def test_warnings_are_lines(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stage(*_: object) -> None:
        warnings.warn("two samples lie beside the class folders\x1b[31m", DataWarning, stacklevel=1)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner.Runner, "run", stage)
    reply = cli("attack", "badnets", "--store", tmp_path)
    assert reply.err.splitlines()[0] == "warning: two samples lie beside the class folders\\x1b[31m"


def test_notes_and_warnings_of_methods_are_seen(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, lab: Any, tmp_path: Path
) -> None:
    """While it runs as a note, later from the card: by the command itself, by bench and by show."""
    from backdoorlab.attacks.image.badnets import BadNets

    plain = BadNets.make_trigger

    def warning(self: Any, task: Any, ctx: Any) -> Any:
        ctx.warn("the patch is hardly seen in these data")
        ctx.reporter.note("drew a patch")
        return plain(self, task, ctx)

    monkeypatch.setattr(BadNets, "make_trigger", warning)
    grid = tmp_path / "grid.yaml"
    grid.write_text(
        "name: tiny\ntasks:\n- {dataset: digits, recipe: smoke, recipe_changes: {min_steps: 120}}\n"
        "attacks: [badnets]\ndefenses: [strip]\nseeds: [0]\n"
    )
    store = ("--store", tmp_path / "s")
    first = cli("attack", "badnets", *lab.fast, *store, "--json")
    assert "note: the patch is hardly seen in these data" in first.err
    assert "note: drew a patch" in first.err
    assert first.json["warnings"] == ["the patch is hardly seen in these data"]
    assert "warning: the patch is hardly seen" in cli("attack", "badnets", *lab.fast, *store).out
    assert "the patch is hardly seen" in cli("show", first.json["key"], *store).out
    bench = cli("bench", grid, *store)
    assert "the patch is hardly seen" in bench.err
