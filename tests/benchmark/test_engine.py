"""A parallel bench that is told to stop, or killed, leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from backdoorlab.benchmark import Store

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals"),
]


def until(condition: Callable[[], bool], seconds: float = 120) -> bool:
    limit = time.monotonic() + seconds
    while not condition() and time.monotonic() < limit:
        time.sleep(0.1)
    return condition()


def at_work(store: Path) -> bool:
    """Do two workers hold the lock of a key, that is: train a model?"""
    return len(list((store / ".locks").glob("*.lock"))) >= 2


@pytest.mark.parametrize("moment", ["starting", "training"])
@pytest.mark.parametrize(
    ("sent", "code", "told"),
    [
        (signal.SIGTERM, 143, "terminated; run the same command again to resume"),
        (signal.SIGINT, 130, "interrupted; run the same command again to resume"),
        (signal.SIGKILL, -9, ""),
    ],
    ids=["SIGTERM", "SIGINT", "SIGKILL"],
)
def test_no_worker_outlives_the_bench(tmp_path: Path, moment: str, sent: int, code: int, told: str):
    store = tmp_path / "store"
    command = [sys.executable, str(Path(__file__).with_name("bench_driver.py")), str(store)]
    driver = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    seen: set[psutil.Process] = set()

    def workers() -> bool:
        seen.update(psutil.Process(driver.pid).children(recursive=True))
        return len([p for p in seen if "spawn_main" in " ".join(p.cmdline())]) >= 2

    try:
        assert until(lambda: driver.poll() is not None or workers()), "the workers did not start"
        if moment == "training":
            assert until(lambda: driver.poll() is not None or at_work(store)), "the workers did not begin"
        assert driver.poll() is None, driver.communicate()[1]
        workers()
        driver.send_signal(sent)
        heard = driver.communicate(timeout=60)[1]
        assert driver.returncode == code, heard
        assert told in heard and "Traceback" not in heard
        gone = until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in seen), 60)
        assert gone, f"left behind: {[p.cmdline() for p in seen if p.is_running()]}"
        assert Store(store).runs() == []
    finally:
        driver.kill()
        for process in seen:
            if process.is_running():
                process.kill()
