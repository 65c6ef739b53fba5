from __future__ import annotations

import collections
import os
import subprocess
import sys
from pathlib import Path

import pytest

from backdoorlab.benchmark import Results, Store

STAGES = 2 * 2 * (1 + 3)
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


def drive(folder: Path, *arguments: str) -> str:
    command = [sys.executable, str(Path(__file__).with_name("kill_driver.py")), str(folder / "store"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def whole_and_once(folder: Path) -> None:
    """All cards are there, every file verifies, nothing was finished twice, nothing is left lying about."""
    store = Store(folder / "store")
    runs = store.runs()
    assert len(runs) == STAGES
    assert {run.verify().status for run in runs} == {"ok"}
    assert Results(store).refusals == []
    finished = collections.Counter((folder / "log.txt").read_text().split())
    assert set(finished) <= {run.id for run in runs}
    assert set(finished.values()) == {1}, finished
    assert list(store.root.glob("**/.tmp-*")) == []


def test_kills_then_two_processes_at_once(tmp_path: Path):
    killed = [k.split(":") for k in drive(tmp_path, "0", "3").split()]
    assert all(signal == "9" for _, signal, _, _ in killed)
    assert sum(int(finished) for _, _, finished, _ in killed) > 0, "no worker got far enough to lose anything"
    whole_and_once(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_many_kills(tmp_path: Path, seed: str):
    drive(tmp_path, seed, "10")
    whole_and_once(tmp_path)
