"""``backdoorlab study``: plan, table, figures, interruption, and what cannot be used."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backdoorlab.benchmark.studies import abl

WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "no name": ((), "Expected NAME, one of: abl, linf"),
    "unknown study": (("ab",), "Did you mean 'abl'?"),
    "unknown part": (("abl", "--parts", "rates"), "Did you mean 'rate'?"),
    "part of the other study": (("linf", "--parts", "isolation"), "one of: defense, norms, pruning"),
    "no parts": (("abl", "--parts", ","), "--parts: expected names"),
    "no attacks": (("abl", "--attacks", ""), "--attacks: expected names"),
    "unknown attack": (("abl", "--attacks", "badnets,blend"), "Did you mean 'blended'?"),
    "attack on other data": (("abl", "--attacks", "blended", "--dataset", "templated_text"), "blended"),
    "defense for other data": (("linf", "--attacks", "badnets", "--dataset", "templated_text"), "linf"),
    "unknown setting": (("abl", "--set", "gama=1"), "Did you mean 'gamma'?"),
    "setting out of range": (("abl", "--set", "gamma=-1"), "must be >= 0"),
    "unknown data": (("abl", "--dataset", "cifar"), "cifar10"),
    "unknown recipe": (("abl", "--recipe", "fats"), "Did you mean 'fast'?"),
    "negative seed": (("abl", "--seed", "-1"), "--seed"),
    "two formats": (("abl", "--json", "--csv"), "--json and --csv exclude each other"),
    "out is a file": (("abl", "--out", "{file}"), "is a file; expected a folder"),
    "figure is there": (("abl", "--parts", "rate", "--out", "{figures}"), "isolation-rate.png exists"),
    "figure is a folder": (("abl", "--parts", "turning", "--out", "{figures}", "--force"), "is a folder"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_leaves_nothing(
    case: str, cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "figures/turning-epoch.png").mkdir(parents=True)
    (tmp_path / "figures/isolation-rate.png").write_bytes(b"mine")
    (tmp_path / "file").write_text("x")
    argv, hint = WRONG[case]
    reply = cli("study", *(word.format(file="file", figures="figures") for word in argv))
    assert reply.code == 2, f"{reply.code}: {reply.out}{reply.err}"
    assert hint in " ".join(reply.err.split()), reply.err
    assert reply.err.count("error:") == 1 and "Traceback" not in reply.err
    assert not (tmp_path / "runs").exists(), "a refused command must not leave a store behind"
    assert (tmp_path / "figures/isolation-rate.png").read_bytes() == b"mine"


def test_plan_table_figures_and_resume(
    lab: Any, cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(abl, "LOSSES", {"LGA": abl.LOSSES["LGA"]})
    monkeypatch.setattr(abl, "WATCHED", 0.1)
    store = shutil.copytree(lab.store, tmp_path / "store")
    words = ("study", "abl", "--attacks", "badnets", "--parts", "isolation", *lab.fast, "--store", store)
    planned = cli(*words, "--plan", "--json")
    assert planned.code == 0, planned.err
    assert [(c["cell"], c["done"]) for c in planned.json["cells"]] == [("undefended", True), ("LGA", False)]
    assert (planned.json["distinct"], planned.json["done"]) == (2, 1)
    assert "2 cells; 1 of 2 are done" in cli(*words, "--plan").out

    with monkeypatch.context() as patch:
        patch.setattr(abl, "measure_isolation", _interrupted)
        stopped = cli(*words)
    assert stopped.code == 130
    assert "run the same command again to resume" in stopped.err

    first = cli(*words, "--out", tmp_path / "figures", "--json")
    assert first.code == 0, first.err
    assert [c["reused"] for c in first.json["cells"]] == [True, False]
    drawn = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert drawn == sorted(abl.FIGURES["isolation"])

    again = cli(*words, "--csv")
    lines = again.out.splitlines()
    assert len(lines) == 3 and lines[0].startswith("attack,cell,status,acc,asr")
    table = cli(*words).out
    assert "undefended" in table and "at 1 %" in table
    refused = cli(*words, "--out", tmp_path / "figures")
    assert refused.code == 2 and "exists (and 3 more)" in refused.err
    assert cli(*words, "--out", tmp_path / "figures", "--force").code == 0


def test_a_failed_cell_is_told_and_gives_exit_code_1(
    lab: Any, cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(site: Any, settings: Any) -> Any:
        raise RuntimeError("no luck")

    monkeypatch.setattr(abl, "LOSSES", {"LGA": {"gamma": 0.123}})
    monkeypatch.setattr(abl, "measure_isolation", broken)
    store = shutil.copytree(lab.store, tmp_path / "store")
    reply = cli("study", "abl", "--attacks", "badnets", "--parts", "isolation", *lab.fast, "--store", store)
    assert reply.code == 1
    assert "failed badnets / LGA: RuntimeError: no luck" in reply.err


def _interrupted(site: Any, settings: Any) -> Any:
    raise KeyboardInterrupt
