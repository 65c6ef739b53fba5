"""The artifact store: a folder of ``stage/key/`` folders, each whole or absent, each verified before it is believed.

    <root>/attack/<key>/    card.json record.json model.safetensors trigger.safetensors poison.safetensors log.jsonl
    <root>/benign/<key>/    <root>/defense/<key>/    <root>/asset/<kind>/<key>/
    <root>/.locks/          one lock file per key, held while it is computed

An artifact is written into a temporary folder beside its place, every file is flushed to the disk, and the folder is
renamed: a crash at any moment leaves the whole artifact or none. ``card.json`` lists the sha256 of all other files and
carries one of its own. Reading checks them, and refuses whatever a writer of this module would not have written
(unknown files, links, pickles, other schema versions) with one line that names the file. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from backdoorlab.benchmark.card import Card
from backdoorlab.benchmark.meter import Meter, asset_card
from backdoorlab.core.errors import ArtifactError, InputError, nearest
from backdoorlab.training.context import Assets, Reporter, Silent

STAGES = ("benign", "attack", "defense")
Tensors = Mapping[str, Tensor]

_NAME = re.compile(r"[a-z][a-z0-9_-]*\.(safetensors|json|jsonl)")
_KEY = re.compile(r"[0-9a-f]{20}")


class StoreError(InputError):
    """The store cannot be written: no permission, no space, not a folder."""


@dataclass(frozen=True)
class StoredRun:
    """One artifact. Everything that is read is checked against the card's digests first.

    Attributes:
        stage: "benign", "attack", "defense" or "asset/<kind>".
        key: hash of the resolved spec.
        path: the artifact's folder.
    """

    stage: str
    key: str
    path: Path

    @property
    def id(self) -> str:
        """Such as "attack/0123456789abcdef0123"."""
        return f"{self.stage}/{self.key}"

    def card(self) -> Card:
        """The verified card; the listed files must be there and no others.

        Raises:
            ArtifactError: missing, truncated, tampered with, foreign.
        """
        where = self.path / "card.json"
        card = Card.from_json(_read(where), str(where))
        if card.digest != card.own_digest():
            raise ArtifactError(f"{where}: its content does not match its own digest; it was changed after the run")
        if card.key != self.key or card.stage != self.stage.split("/")[0]:
            raise ArtifactError(f"{where}: belongs to {card.id}, not to {self.id}; the folder was moved or renamed")
        present = {entry.name for entry in os.scandir(self.path)}
        for name in sorted(present - {"card.json", *card.digests}):
            raise ArtifactError(f"{self.path / name}: a file that the artifact's card does not list")
        for name in card.digests:
            if not _NAME.fullmatch(name):
                raise ArtifactError(f"{where}: lists a file {name!r} of a kind that artifacts do not have")
            if name not in present:
                raise ArtifactError(f"{self.path / name}: missing, although the artifact's card lists it")
        return card

    def read(self, name: str) -> bytes:
        """Verified content of one file."""
        card, where = self.card(), self.path / name
        if name not in card.digests:
            has = ", ".join(card.digests) or "no files"
            raise ArtifactError(f"{self.id} has no {name} (status: {card.status}); it has {has}")
        content = _read(where)
        if hashlib.sha256(content).hexdigest() != card.digests[name]:
            raise ArtifactError(f"{where}: checksum mismatch; the file is truncated or was changed after the run")
        return content

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Tensors of ``name``.safetensors, on the CPU."""
        try:
            return load_tensors(self.read(f"{name}.safetensors"))
        except SafetensorError as error:
            raise ArtifactError(f"{self.path / name}.safetensors: not a safetensors file ({error})") from None

    def all_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Every safetensors file by name without suffix."""
        names = [n.removesuffix(".safetensors") for n in self.card().digests if n.endswith(".safetensors")]
        return {name: self.tensors(name) for name in names}

    def record(self) -> dict[str, Any]:
        """What is needed, besides tensors, to rebuild the result."""
        return dict(json.loads(self.read("record.json")))

    def log(self) -> list[dict[str, Any]]:
        """One record per epoch (or event); empty if the stage has no log."""
        if "log.jsonl" not in self.card().digests:
            return []
        return [json.loads(line) for line in self.read("log.jsonl").splitlines()]

    def verify(self) -> Card:
        """Check every file; the card."""
        card = self.card()
        for name in card.digests:
            self.read(name)
        return card


class Store:
    """A folder of artifacts that any number of processes may use at once."""

    def __init__(self, root: str | Path) -> None:
        """Open or make the store.

        Raises:
            StoreError: if the folder cannot be made or written.
        """
        self.root = Path(root).expanduser().absolute()
        try:
            (self.root / ".locks").mkdir(parents=True, exist_ok=True)
            probe = self.root / ".locks" / f".probe-{secrets.token_hex(4)}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise StoreError(f"cannot use {self.root} as a store: {error.strerror or error}") from None
        self.clean()

    def run(self, stage: str, key: str) -> StoredRun:
        """The artifact's handle, whether or not it exists."""
        return StoredRun(stage, key, self.root / stage / key)

    def has(self, stage: str, key: str) -> bool:
        """Is there such an artifact?"""
        return (self.root / stage / key / "card.json").exists()

    def runs(self, *stages: str) -> list[StoredRun]:
        """Handles of all runs (assets are not runs), unverified, oldest first."""
        found = []
        for stage in stages or STAGES:
            folder = self.root / stage
            names = [e.name for e in os.scandir(folder) if not e.name.startswith(".")] if folder.is_dir() else []
            found += [StoredRun(stage, name, folder / name) for name in names]
        return sorted(found, key=lambda run: (run.path.stat().st_mtime_ns, run.id))

    def find(self, name: str | Path) -> StoredRun:
        """A run by the beginning of its key, by stage/key, or by the path of its folder.

        Raises:
            InputError: if no run, or more than one, is meant.
        """
        text = str(name).rstrip("/")
        path = Path(text).expanduser()
        if (path / "card.json").is_file():
            path = path.resolve()
            return StoredRun(path.parent.name, path.name, path)
        stage, _, prefix = text.rpartition("/")
        if stage and stage not in STAGES:
            raise InputError(
                f"{text}: no such artifact; a run is given as a key, stage/key ({'/'.join(STAGES)}) or a path"
            )
        runs = self.runs(*[stage] if stage else [])
        matches = [run for run in runs if prefix and run.key.startswith(prefix.lower())]
        if len(matches) == 1:
            return matches[0]
        if matches:
            shown = ", ".join(run.id for run in matches[:8]) + (", ..." if len(matches) > 8 else "")
            raise InputError(f"{text!r} stands for {len(matches)} runs: {shown}. Give more digits.")
        if not runs:
            raise InputError(f"{text!r}: no runs in {self.root}. Make one with `backdoorlab attack`.")
        hint = nearest(prefix, [run.key for run in runs]) or f" The latest is {runs[-1].id}."
        raise InputError(f"no run {text!r} in {self.root}.{hint} `backdoorlab results` lists all {len(runs)}.")

    def save(
        self,
        card: Card,
        tensors: Mapping[str, Tensors] | None = None,
        record: Mapping[str, Any] | None = None,
        log: list[dict[str, Any]] | None = None,
        *,
        stage: str | None = None,
    ) -> StoredRun:
        """Write an artifact; the caller holds its :meth:`lock`. An older one of the same key is replaced.

        Args:
            card: digests are filled in here.
            tensors: by file name without suffix; empty ones are written as well.
            record: becomes record.json.
            log: becomes log.jsonl.
            stage: if it is not the card's ("asset/<kind>").

        Raises:
            StoreError: if it cannot be written; nothing is left behind.
        """
        run = self.run(stage or card.stage, card.key)
        files = {f"{name}.safetensors": save_tensors(_plain(t)) for name, t in (tensors or {}).items()}
        if record is not None:
            files["record.json"] = _json(record, indent=2)
        if log:
            files["log.jsonl"] = b"".join(map(_json, log))
        sealed = card.sealed({name: hashlib.sha256(content).hexdigest() for name, content in files.items()})
        temporary = run.path.with_name(f".tmp-{run.key}-{secrets.token_hex(4)}")
        try:
            temporary.mkdir(parents=True)
            for name, content in files.items():
                _write(temporary / name, content)
            _write(temporary / "card.json", sealed.to_json().encode())
            _sync_folder(temporary)
            if run.path.exists():
                run.path.rename(temporary.with_name(temporary.name + "-old"))
            temporary.rename(run.path)
            _sync_folder(run.path.parent)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise StoreError(f"cannot write {run.path}: {error.strerror or error}") from None
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        shutil.rmtree(temporary.with_name(temporary.name + "-old"), ignore_errors=True)
        return run

    @contextmanager
    def lock(self, stage: str, key: str, reporter: Reporter | None = None) -> Iterator[None]:
        """Only one process computes a key; others wait here, then find it done. Leftovers of the dead are removed."""
        lock = FileLock(self._lock_path(stage, key))
        try:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                (reporter or Silent()).note(f"waiting for another process that is computing {stage}/{key}")
                lock.acquire()
        except OSError as error:
            raise StoreError(f"cannot lock {stage}/{key} in {self.root}: {error.strerror or error}") from None
        try:
            _remove_leftovers(self.root / stage, key)
            yield
        finally:
            lock.release()

    def clean(self) -> int:
        """Remove temporary folders whose writer is dead (its lock is free); how many."""
        removed = 0
        for left in [p for depth in ("*", "asset/*") for p in self.root.glob(f"{depth}/.tmp-*")]:
            stage, key = left.parent.relative_to(self.root).as_posix(), left.name.split("-")[1]
            try:
                with FileLock(self._lock_path(stage, key), timeout=0):
                    removed += _remove_leftovers(left.parent, key)
            except Timeout:
                continue  # its writer is alive
        return removed

    def assets(self, reporter: Reporter | None = None) -> StoredAssets:
        """A cache for surrogates, encoders and generators, to be handed to a context."""
        return StoredAssets(self, reporter or Silent())

    def keep_own(self, kind: str, given: str | Path) -> str:
        """Keep a copy of a user's safetensors file as an asset; its key is a hash of its content.

        Raises:
            InputError: if ``given`` is neither a file of that kind nor the key of a copy.
        """
        stage, path = _own_stage(kind), Path(given).expanduser()
        if _KEY.fullmatch(str(given)) and self.has(stage, str(given)):
            return str(given)
        if not path.is_file():
            raise InputError(f"asset {kind}: no such file: {given}; expected a .safetensors file")
        try:
            tensors = load_tensors(path.read_bytes())
        except SafetensorError as error:
            raise InputError(
                f"asset {kind}: {given} is not a safetensors file ({error}); pickled weights are never read"
            ) from None
        except OSError as error:
            raise InputError(f"asset {kind}: {given} cannot be read ({error.strerror or error})") from None
        plain = _plain(tensors)
        card = asset_card(f"own {kind}", {"sha256": hashlib.sha256(save_tensors(plain)).hexdigest()})
        with self.lock(stage, card.key):
            if not self.has(stage, card.key):
                self.save(card.model_copy(update={"command": "(brought by the user)"}), {"asset": plain}, stage=stage)
        return card.key

    def own(self, kind: str, key: str) -> dict[str, Tensor]:
        """The tensors that :meth:`keep_own` kept.

        Raises:
            InputError: if the store has no such copy.
        """
        run = self.run(_own_stage(kind), key)
        if not self.has(run.stage, key):
            raise InputError(f"asset {kind}: {self.root} has no file kept under {key}; give the file itself")
        return run.tensors("asset")

    def _lock_path(self, stage: str, key: str) -> str:
        return str(self.root / ".locks" / f"{stage.replace('/', '-')}-{key}.lock")


class StoredAssets:
    """Fulfils :class:`~backdoorlab.training.context.Assets` with ``asset/<kind>/<key>`` artifacts."""

    def __init__(self, store: Store, reporter: Reporter) -> None:
        self.store, self.reporter = store, reporter

    def get(self, kind: str, spec: Mapping[str, Any], build: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What was stored for (kind, spec), or build, store and return it; the same bits either way."""
        card = asset_card(kind, spec)
        stage = _asset_stage(kind)
        run = self.store.run(stage, card.key)
        with self.store.lock(stage, card.key, self.reporter):
            if not self.store.has(stage, card.key):
                meter = Meter()
                with meter.part("build"):
                    tensors = build()
                self.store.save(card.model_copy(update=meter.fields()), {"asset": tensors}, stage=stage)
        return run.tensors("asset")


@dataclass(frozen=True)
class OwnAssets:
    """A cache in which the user's own files stand in for some kinds of assets.

    Attributes:
        cache: for all other kinds.
        own: tensors by kind.
    """

    cache: Assets
    own: Mapping[str, dict[str, Tensor]]

    def get(self, kind: str, spec: Mapping[str, Any], build: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The user's tensors if there are any of that kind, whatever the spec; else the cache's.

        What is built *from* a user's file (a pattern optimised on their surrogate) must not meet what was built from
        another: its spec is extended by the files in use.
        """
        if kind in self.own:
            return dict(self.own[kind])
        marks = {k: hashlib.sha256(save_tensors(_plain(t))).hexdigest()[:20] for k, t in sorted(self.own.items())}
        return self.cache.get(kind, {**spec, "own files": marks} if marks else spec, build)


def _asset_stage(kind: str) -> str:
    return f"asset/{re.sub(r'[^a-z0-9-]+', '-', kind.lower())}"


def _own_stage(kind: str) -> str:
    return _asset_stage(f"own-{kind}")


def _plain(tensors: Tensors) -> dict[str, Tensor]:
    """CPU copies that own their memory, as safetensors wants them."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _json(record: Any, indent: int | None = None) -> bytes:
    return (json.dumps(record, indent=indent, allow_nan=False) + "\n").encode()


def _write(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _read(path: Path) -> bytes:
    if path.is_symlink() or not path.is_file():
        what = "a link" if path.is_symlink() else "missing" if not path.exists() else "not a file"
        raise ArtifactError(f"{path}: {what}; an artifact consists of plain files")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror or error})") from None


def _remove_leftovers(folder: Path, key: str) -> int:
    """Remove temporary folders of a key whose lock we hold."""
    found = list(folder.glob(f".tmp-{key}-*"))
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    return len(found)
