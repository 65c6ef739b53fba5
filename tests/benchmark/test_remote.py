from __future__ import annotations

import secrets
from pathlib import Path

import fsspec
import pytest

from backdoorlab.benchmark import Runner, Store
from backdoorlab.benchmark.remote import RemoteStore, open_store
from backdoorlab.benchmark.store import StoreError
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


def test_the_right_kind_of_store(tmp_path: Path):
    assert type(open_store(tmp_path / "a")) is Store
    assert type(open_store(f"file://{tmp_path}/a")) is Store
    assert "memory" in fsspec.available_protocols()
    with pytest.raises(StoreError, match="cannot use nonsense://x as a store"):
        open_store("nonsense://x")
