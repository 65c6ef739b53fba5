from __future__ import annotations

import errno
import pickle
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from backdoorlab.benchmark import Runner, Store, StoredRun
from backdoorlab.benchmark import store as store_module
from backdoorlab.benchmark.store import StoreError
from backdoorlab.core.errors import ArtifactError, InputError
from backdoorlab.training import Context


@pytest.fixture
def copy(filled: Runner, tmp_path: Path) -> StoredRun:
    """A private copy of a whole attack artifact."""
    shutil.copytree(filled.store.root, tmp_path / "store")
    return Store(tmp_path / "store").runs("attack")[0]


def refused(run: StoredRun, file: str, message: str) -> None:
    with pytest.raises(ArtifactError, match=message) as caught:
        run.verify()
    assert "\n" not in str(caught.value)
    assert str(run.path / file) in str(caught.value)


def test_whole_artifact_verifies(copy: StoredRun):
    card = copy.verify()
    assert {"model.safetensors", "trigger.safetensors", "poison.safetensors", "record.json", "log.jsonl"} == set(
        card.digests
    )
    assert len(copy.log()) == 10


def test_truncated(copy: StoredRun):
    path = copy.path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(copy, "model.safetensors", "checksum mismatch")
    (copy.path / "card.json").write_bytes((copy.path / "card.json").read_bytes()[:100])
    refused(copy, "card.json", "not a valid result card")


def test_tampered_weights_and_numbers(copy: StoredRun):
    content = bytearray((copy.path / "poison.safetensors").read_bytes())
    content[-1] ^= 1
    (copy.path / "poison.safetensors").write_bytes(content)
    refused(copy, "poison.safetensors", "checksum mismatch")
    text = (copy.path / "card.json").read_text()
    (copy.path / "card.json").write_text(re.sub('"asr": [0-9.]+', '"asr": 0.123', text, count=1))
    refused(copy, "card.json", "does not match its own digest")


def test_missing_unknown_and_foreign_files(copy: StoredRun):
    with (copy.path / "extra.pkl").open("wb") as file:
        pickle.dump([1], file)
    refused(copy, "extra.pkl", "a file that the artifact's card does not list")
    (copy.path / "extra.pkl").unlink()
    (copy.path / "log.jsonl").rename(copy.path.parent / "log.jsonl")
    refused(copy, "log.jsonl", "missing, although")
    (copy.path / "log.jsonl").symlink_to(copy.path.parent / "log.jsonl")
    refused(copy, "log.jsonl", "a link")


def test_a_pickle_in_place_of_weights_is_never_opened(copy: StoredRun, monkeypatch: pytest.MonkeyPatch):
    """Even with digests that fit: a forger who rewrites the whole card still cannot make anyone unpickle."""
    path = copy.path / "model.safetensors"
    torch.save({"weight": torch.zeros(1)}, path)
    monkeypatch.setattr(StoredRun, "read", lambda run, name: (run.path / name).read_bytes())
    monkeypatch.setattr(pickle, "loads", lambda *a: pytest.fail("unpickled"))
    with pytest.raises(ArtifactError, match=r"model\.safetensors: not a safetensors file"):
        copy.tensors("model")


def test_moved_folder_is_refused(copy: StoredRun):
    other = copy.path.with_name("0" * 20)
    copy.path.rename(other)
    with pytest.raises(ArtifactError, match=rf"belongs to attack/{copy.key}"):
        StoredRun("attack", "0" * 20, other).card()


def test_full_disk_leaves_nothing(copy: StoredRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store, card, written = Store(tmp_path / "new"), copy.card(), []

    def write(path: Path, content: bytes) -> None:
        written.append(path.name)
        if len(written) == 2:
            path.write_bytes(content[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_bytes(content)

    monkeypatch.setattr(store_module, "_write", write)
    with pytest.raises(StoreError, match=r"cannot write .*No space left on device"):
        store.save(card, copy.all_tensors(), copy.record())
    assert len(written) == 2
    assert list((store.root / "attack").iterdir()) == []
    monkeypatch.undo()
    assert store.save(card, copy.all_tensors(), copy.record()).verify().metrics == card.metrics


def test_unwritable_store(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot use .*file.* as a store"):
        Store(tmp_path / "file")


def test_find(filled: Runner):
    store = filled.store
    run = store.runs("attack")[0]
    for name in (
        run.key,
        run.key[:12],
        run.key[:12].upper(),
        run.id,
        f"attack/{run.key[:8]}",
        run.path,
        f"{run.path}/",
    ):
        assert store.find(name).id == run.id
    with pytest.raises(InputError, match="no such artifact"):
        store.find("asset/0123")
    with pytest.raises(InputError, match=r"no run 'zzzz'.*backdoorlab results"):
        store.find("zzzz")
    typo = run.key[:-1] + ("0" if run.key[-1] != "0" else "1")
    with pytest.raises(InputError, match=f"Did you mean '{run.key}'"):
        store.find(typo)


def test_find_ambiguous(filled: Runner, tmp_path: Path):
    source = filled.store.runs("attack")[0].path
    for key in ("ab" + "0" * 18, "ab" + "1" * 18):
        shutil.copytree(source, tmp_path / "attack" / key)
    with pytest.raises(InputError, match=r"'ab' stands for 2 runs: attack/ab0+, attack/ab1+"):
        Store(tmp_path).find("ab")
    with pytest.raises(InputError, match="no runs in"):
        Store(tmp_path / "empty").find("ab")


def test_leftovers_of_the_dead_are_removed_and_of_the_living_kept(tmp_path: Path):
    store, key = Store(tmp_path), "a" * 20
    for place in ("attack", "asset/surrogate"):
        (tmp_path / place / f".tmp-{key}-0123").mkdir(parents=True)
    with FileLock(store._lock_path("attack", key)):
        assert store.clean() == 1
        assert (tmp_path / "attack" / f".tmp-{key}-0123").exists()
    assert Store(tmp_path).runs() == []
    assert not (tmp_path / "attack" / f".tmp-{key}-0123").exists()


def test_assets_are_made_once_even_by_two_at_once(tmp_path: Path):
    made, results = [], []

    def build(ctx: Context) -> dict[str, torch.Tensor]:
        made.append(ctx.seed)
        return {"w": torch.randn(3, generator=ctx.generator("w"))}

    def work() -> None:
        ctx = Context(seed=1, assets=Store(tmp_path).assets())
        results.append(ctx.asset("clean surrogate", {"epochs": 2}, build)["w"])

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert torch.equal(results[0], results[2])
    other = Context(assets=Store(tmp_path).assets()).asset("clean surrogate", {"epochs": 3}, build)["w"]
    assert len(made) == 2 and not torch.equal(other, results[0])
    assert len(list((tmp_path / "asset" / "clean-surrogate").iterdir())) == 2
    assert Store(tmp_path).runs() == []  # assets are not runs
