from __future__ import annotations

import dataclasses
import errno
import os
import pickle
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch
from benchmark_cases import FT
from filelock import FileLock

from backdoorlab.benchmark import Results, Runner, RunResult, Store, StoredRun
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
    store, key, other = Store(tmp_path), "a" * 20, "b" * 20
    for place in ("attack", "asset/surrogate"):
        (tmp_path / place / f".tmp-{key}-01234567").mkdir(parents=True)
        (tmp_path / place / f".tmp-{key}-01234567-old").mkdir(parents=True)
    (tmp_path / ".locks").mkdir()
    with FileLock(store._lock_path("attack", key)):
        assert store.clean() == 2
        assert (tmp_path / "attack" / f".tmp-{key}-01234567").exists()
    with Store(tmp_path).lock("defense", other):  # whoever writes anything cleans up
        assert list((tmp_path / "attack").iterdir()) == []


def snapshot(folder: Path) -> dict[str, tuple]:
    """Everything below a folder, links unfollowed: kind, size, time of the last change and content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found[str(path)] = (status.st_mode, status.st_size, status.st_mtime_ns, status.st_ino, content)
    return found


def test_reading_writes_nothing_and_removes_nothing(filled: Runner, tmp_path: Path):
    """Neither in a store nor in a folder that merely looks like one."""
    key, foreign, store = "c" * 20, tmp_path / "foreign", tmp_path / "store"
    (foreign / "anything" / ".tmp-mine").mkdir(parents=True)
    (foreign / "attack" / f".tmp-{key}-01234567").mkdir(parents=True)
    (foreign / "attack" / f".tmp-{key}-01234567" / "file").write_text("mine")
    shutil.copytree(filled.store.root, store)
    shutil.rmtree(store / ".locks")
    (store / "defense" / f".tmp-{key}-01234567").mkdir()
    before = snapshot(tmp_path)
    for root in (foreign, store, tmp_path / "absent"):
        opened = Store(root)
        Results(opened).rows()
        assert not opened.has("attack", key)
        for run in opened.runs():
            opened.find(run.key).verify()
        with pytest.raises(InputError):
            opened.find("0" * 20)
    run = filled.store.runs("attack")[0]
    assert Runner(Store(store)).load_model(run.id).num_classes == 10
    assert snapshot(tmp_path) == before


def test_cleaning_removes_only_what_a_writer_made(tmp_path: Path):
    """Not a foreign folder's temporary files, not a look-alike, nothing behind a link, no name taken as a pattern."""
    root, outside, key = tmp_path / "store", tmp_path / "outside", "d" * 20
    good = f".tmp-{key}-01234567"
    kept = [
        root / "mine" / good,
        root / "attack" / ".tmp-mine",
        root / "attack" / f".tmp-{key}",
        root / "attack" / f".tmp-{key}-01234567-other",
        root / "attack" / ".tmp-[a-f0-9]-01234567",
        root / "asset" / "Not A Kind" / good,
        root / "attack" / ("e" * 20) / good,
        outside / good,
        outside / "kind" / good,
    ]
    for folder in [*kept, root / "attack" / good]:
        folder.mkdir(parents=True)
    (root / "defense").symlink_to(outside)
    (root / "benign").mkdir()
    (root / "benign" / good).symlink_to(outside / "kind")
    (root / "asset" / "linked").symlink_to(outside / "kind")
    (root / "attack" / f".tmp-{key}-89abcdef").write_text("a file, no folder")
    with Store(root).lock("attack", key):
        pass
    assert not (root / "attack" / good).exists()
    assert all(folder.is_dir() for folder in kept)
    assert (root / "benign" / good).is_symlink() and (outside / "kind").is_dir()
    assert (root / "attack" / f".tmp-{key}-89abcdef").is_file()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_store_that_cannot_be_written_is_read(
    copy: StoredRun, monkeypatch: pytest.MonkeyPatch, number: int, tmp_path: Path
):
    """Everything that was run is told; what would have to be written fails before its work begins."""
    shutil.rmtree(tmp_path / "store" / ".locks")
    (tmp_path / "store" / "attack" / f".tmp-{'a' * 20}-01234567").mkdir()
    before = snapshot(tmp_path)

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    real_open = os.open

    def open_to_read(path: object, flags: int, *args: object, **kwargs: object) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            refuse()
        return real_open(path, flags, *args, **kwargs)  # type: ignore[arg-type]

    for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "utime", "chmod"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(os, "open", open_to_read)
    store = Store(tmp_path / "store")
    runner = Runner(store)
    assert Results(store).refusals == [] and len(store.runs()) >= 4
    spec = copy.card().experiment()
    attack, defense = runner.run(spec), runner.run(dataclasses.replace(spec, defense=FT, clean_fraction=None))
    assert attack.card.key == copy.key and attack.reused
    assert defense.card.status == "ok" and defense.reused
    assert runner.load_backdoor(copy)[1].model.num_classes == 10
    with pytest.raises(StoreError, match=r"cannot lock attack/[0-9a-f]+ in .*store: " + os.strerror(number)):
        runner.run(dataclasses.replace(spec, seed=12345))
    monkeypatch.undo()
    assert snapshot(tmp_path) == before


def test_a_finished_run_is_told_while_another_holds_its_lock(copy: StoredRun, monkeypatch: pytest.MonkeyPatch):
    store = Store(copy.path.parent.parent)
    (store.root / ".locks").mkdir(exist_ok=True)
    runner, experiment = Runner(store), copy.card().experiment()
    with FileLock(store._lock_path("attack", copy.key)):
        assert runner.run(experiment) == RunResult(copy.card(), reused=True)

    def foreign(self: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(FileLock, "_acquire", foreign)
    assert runner.run(experiment) == RunResult(copy.card(), reused=True)
    assert Results(store).refusals == []
    assert store.clean() == 0
    with pytest.raises(StoreError, match=r"cannot lock attack/.*Permission denied"):
        runner.run(experiment, fresh=True)


def test_litter_of_file_browsers_is_no_part_of_an_artifact(copy: StoredRun):
    store = Store(copy.path.parent.parent)
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._card.json"):
        (copy.path / name).write_bytes(b"litter")
        (copy.path.parent / name).write_bytes(b"litter")
        (store.root / name).write_bytes(b"litter")
    assert copy.verify().key == copy.key
    assert Results(store).refusals == []
    (copy.path / "notes.txt").write_text("mine")
    refused(copy, "notes.txt", "a file that the artifact's card does not list")


def test_a_run_that_cannot_be_read_does_not_hide_the_others(copy: StoredRun, monkeypatch: pytest.MonkeyPatch):
    store, listdir = Store(copy.path.parent.parent), os.listdir
    whole = len(store.runs())
    (store.root / "attack" / ("0" * 20)).symlink_to("nowhere")
    (store.root / "attack" / ("1" * 20)).mkdir()
    os.mkfifo(store.root / "attack" / ("1" * 20) / "card.json")

    def closed(path: object) -> list[str]:
        if str(path) == str(copy.path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return listdir(path)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "listdir", closed)
    found = Results(store)
    assert len(found.rows()) == whole - 1
    reasons = sorted(refusal.reason for refusal in found.refusals)
    expected = ("cannot be read (Permission denied)", "missing", "not a file")
    assert len(reasons) == 3 and all("\n" not in reason for reason in reasons)
    assert all(any(words in reason for reason in reasons) for words in expected)


def test_what_stands_in_its_place_survives_a_failed_replacement(copy: StoredRun, monkeypatch: pytest.MonkeyPatch):
    store, card, rename = Store(copy.path.parent.parent), copy.card(), Path.rename

    def full(self: Path, target: Path) -> Path:
        if self.name.startswith(".tmp-") and not self.name.endswith("-old"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(StoreError, match="No space left on device"):
        store.save(card, copy.all_tensors(), copy.record())
    assert copy.verify() == card
    assert [p.name for p in copy.path.parent.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, r"record\.json: lacks 'model'"),
        ({"model": {"kind": "classifier", "num_classes": 10}}, r"record of a classifier lacks 'arch'"),
        ({"model": {"kind": "no such"}}, r"unknown kind of model 'no such'"),
        ({"target_map": {"mode": "all-to-one"}}, r"record\.json: a field is missing or of another type"),
        ({"model": "image"}, r"record\.json: "),
        ({"trigger": []}, r"record\.json: a field is missing or of another type"),
    ],
)
def test_a_record_with_missing_or_mistyped_fields(copy: StoredRun, change: dict, message: str):
    store = Store(copy.path.parent.parent)
    record = {k: v for k, v in (copy.record() | change).items() if v is not None}
    store.save(copy.card(), copy.all_tensors(), record)
    with pytest.raises(ArtifactError, match=message) as caught:
        Runner(store).load_backdoor(copy)
    assert "\n" not in str(caught.value) and str(copy.path) in str(caught.value)
    store.save(copy.card(), copy.all_tensors(), [record])  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match=r"record\.json: does not hold JSON objects"):
        copy.record()


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
