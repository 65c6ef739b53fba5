"""Small files that stand for gigabytes are refused in one line, without taking the memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fuzz_tools import Reply, expect_result_or_one_line

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to limit a process's memory"),
]


def test_bombs(lab: Any, tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("bombs_driver.py")), str(lab.store)]
    ended = subprocess.run(
        [*command, lab.image, lab.audio, lab.text, str(tmp_path)], capture_output=True, text=True, timeout=280
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    wrong = []
    for name, (code, err) in found.items():
        try:
            assert code == 2
            expect_result_or_one_line(Reply(code, "", err))
        except AssertionError:
            wrong.append(f"{name}: {code} {err[-300:]}")
    assert not wrong, "\n".join(wrong)
