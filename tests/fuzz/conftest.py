"""A store with tiny runs of three modalities, made once through the command line itself, in seconds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from fuzz_tools import call

TINY = (
    "--recipe",
    "smoke",
    "--recipe-set",
    "epochs=1",
    "--recipe-set",
    "min_steps=2",
    "--recipe-set",
    "precision=fp32",
)


@dataclass(frozen=True)
class Lab:
    """Keys of the runs in ``store``."""

    store: Path
    image: str
    benign: str
    repair: str
    audio: str
    text: str


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("BACKDOORLAB_STORE", "BACKDOORLAB_DEBUG", "BACKDOORLAB_DATA"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    store = tmp_path_factory.mktemp("fuzz") / "store"
    before = torch.get_num_threads()
    torch.set_num_threads(1)

    def key(*argv: object) -> str:
        reply = call(*argv, "--store", store, "--json")
        assert reply.code == 0, reply.err
        return str(json.loads(reply.out)["key"])

    small = ("--train-size", 100, "--test-size", 40, *TINY)
    image = key("attack", "badnets", *small)
    lab = Lab(
        store,
        image,
        key("attack", "none", *small),
        key("defend", "ft", "--run", image, "--set", "epochs=1"),
        key("attack", "badnets", "--dataset", "tone_words", *small),
        key("attack", "badnets", "--dataset", "templated_text", *small),
    )
    torch.set_num_threads(before)
    return lab
