from __future__ import annotations

import json
import secrets
from pathlib import Path

import fsspec
import numpy as np
import pytest

from backdoorlab.benchmark import Results, Runner, Store
from backdoorlab.benchmark.remote import RemoteStore, open_store
from backdoorlab.benchmark.store import StoreError
from backdoorlab.cli.main import run
from backdoorlab.core.errors import ArtifactError


@pytest.fixture
def url() -> str:
    return f"memory://bucket-{secrets.token_hex(4)}/runs"


def test_two_machines_share_results(filled: Runner, url: str, tmp_path: Path):
    run = filled.store.runs("attack")[0]
    here, there = RemoteStore(url, tmp_path / "here"), RemoteStore(url, tmp_path / "there")
    assert there.runs() == [] and not there.has("attack", run.key)
    here.save(run.card(), run.all_tensors(), run.record(), run.log())
    assert there.has("attack", run.key)
    found = there.find(run.key[:10])
    assert found.verify() == run.card()
    assert Runner(there).load_model(found.id).num_classes == 10


def test_unfinished_and_tampered_uploads(filled: Runner, url: str, tmp_path: Path):
    run = filled.store.runs("attack")[0]
    here, there = RemoteStore(url, tmp_path / "here"), RemoteStore(url, tmp_path / "there")
    here.save(run.card(), run.all_tensors(), run.record(), run.log())
    files, place = here.files, f"{here.base}/attack/{run.key}"
    card = files.cat_file(f"{place}/card.json")
    files.rm(f"{place}/card.json")
    assert not there.has("attack", run.key)
    files.pipe_file(f"{place}/card.json", card)
    files.pipe_file(f"{place}/model.safetensors", b"something else")
    with pytest.raises(ArtifactError, match="checksum mismatch"):
        there.has("attack", run.key)
    assert list((tmp_path / "there" / "attack").iterdir()) == []


def test_a_broken_upload_does_not_hide_the_other_runs(filled: Runner, url: str, tmp_path: Path):
    here, there = RemoteStore(url, tmp_path / "here"), RemoteStore(url, tmp_path / "there")
    runs = [filled.store.runs("attack")[0], filled.store.runs("benign")[0]]
    for stored in runs:
        here.save(stored.card(), stored.all_tensors(), stored.record(), stored.log())
    here.files.pipe_file(f"{here.base}/attack/{runs[0].key}/model.safetensors", b"something else")
    found = Results(there)
    assert [row["key"] for row in found.rows()] == [runs[1].key]
    (refusal,) = found.refusals
    assert "checksum mismatch" in refusal.reason


def test_every_command_takes_a_url(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """And none writes a folder that is called like the URL."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BACKDOORLAB_STORE", url)

    def told(*command: str) -> object:
        assert run([*command, "--json"]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    tiny = ("--recipe", "smoke", "--train-size", "100", "--test-size", "50", "--recipe-set", "epochs=1")
    made = told("attack", "badnets", *tiny, "--recipe-set", "min_steps=2", "--device", "cpu")
    key = made["key"]  # type: ignore[index]
    files = fsspec.filesystem("memory")
    assert files.exists(f"/{url.removeprefix('memory://')}/attack/{key}/card.json")
    (row,) = told("results")  # type: ignore[misc]
    assert row["key"] == key
    assert told("show", key)["key"] == key  # type: ignore[index]
    defended = told("defend", "clp", "--run", key, "--device", "cpu")
    assert files.exists(f"/{url.removeprefix('memory://')}/defense/{defended['key']}/card.json")  # type: ignore[index]
    np.save("one.npy", np.zeros((1, 1, 16, 16), dtype=np.uint8))
    assert len(told("predict", "--run", key, "one.npy", "--device", "cpu")) == 1  # type: ignore[arg-type]
    assert len(told("stamp", "--run", key, "one.npy", "--out", "stamped")) == 1  # type: ignore[arg-type]
    told("export", key, "--out", "exported", "--format", "npz")
    changes = "recipe_changes: {epochs: 1, min_steps: 2}"
    Path("grid.yaml").write_text(
        f"tasks: [{{dataset: digits, recipe: smoke, train_size: 100, test_size: 50, {changes}}}]\n"
        "attacks: [badnets]\ndefenses: [clp]\nseeds: [0]\n"
    )
    summary = told("bench", "grid.yaml", "--device", "cpu")
    assert summary["stages"] == 4 and summary["reused"] == 2  # type: ignore[index]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "exported", "grid.yaml", "one.npy", "stamped"]


def test_a_url_that_cannot_be_used_is_told_in_one_line(capsys: pytest.CaptureFixture[str]):
    for command in (["results"], ["show", "ab"], ["predict", "--run", "ab", "x.png"], ["attack", "badnets"]):
        assert run([*command, "--store", "nonsense://x"]) == 2
        assert "cannot use nonsense://x as a store" in capsys.readouterr().err


def test_the_right_kind_of_store(tmp_path: Path):
    assert type(open_store(tmp_path / "a")) is Store
    assert type(open_store(f"file://{tmp_path}/a")) is Store
    assert "memory" in fsspec.available_protocols()
    with pytest.raises(StoreError, match="cannot use nonsense://x as a store"):
        open_store("nonsense://x")
