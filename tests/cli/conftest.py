"""One store with a benign run, an attack and a repair, made once through the command line itself."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from backdoorlab.cli.main import run

FAST = ("--recipe", "smoke", "--recipe-set", "min_steps=120")
"""Even shorter than "smoke": enough for BadNets on digits."""


@dataclass(frozen=True)
class Reply:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def call(*argv: object) -> Reply:
    """One command line, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(a) for a in argv])
    return Reply(code, out.getvalue(), err.getvalue())


@dataclass(frozen=True)
class Lab:
    """Keys of the runs in ``store``."""

    store: Path
    benign: str
    attack: str
    repair: str
    attack_json: dict[str, Any]
    repair_json: dict[str, Any]
    fast: tuple[str, ...] = FAST


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("BACKDOORLAB_STORE", raising=False)
    monkeypatch.delenv("BACKDOORLAB_DEBUG", raising=False)


@pytest.fixture(scope="session")
def cli() -> Callable[..., Reply]:
    return call


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    store = tmp_path_factory.mktemp("cli-store")
    benign = call("attack", "none", *FAST, "--store", store, "--json")
    attack = call("attack", "badnets", *FAST, "--store", store, "--json")
    assert (benign.code, attack.code) == (0, 0), benign.err + attack.err
    repair = call(
        "defend",
        "ft",
        "--run",
        attack.json["key"],
        "--set",
        "epochs=100",
        "--set",
        "lr=0.2",
        "--store",
        store,
        "--json",
    )
    assert repair.code == 0, repair.err
    return Lab(store, benign.json["key"], attack.json["key"], repair.json["key"], attack.json, repair.json)
