"""The artifact store: a folder of ``stage/key/`` folders, each whole or absent, each verified before it is used.

    <root>/attack/<key>/    card.json record.json model.safetensors trigger.safetensors poison.safetensors log.jsonl
    <root>/benign/<key>/    <root>/defense/<key>/    <root>/asset/<kind>/<key>/
    <root>/.locks/          one lock file per key, held while it is computed

An artifact is written into a temporary folder beside its place, every file is flushed to the disk, and the folder is
renamed: a crash at any moment leaves the whole artifact or none. ``card.json`` lists the sha256 of all other files and
carries one of its own. Reading checks them, and refuses whatever a writer of this module would not have written
(unknown files, links, pickles, other schema versions) with one line that names the file. Nothing is ever unpickled.

Opening and reading a store changes nothing in it and needs no permission to write. What writers that have ended left is
removed when something is written: only temporary folders that a writer of this module would have made, in the store's
own stage folders, never through links, and only while the lock of their key is free.
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
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from backdoorlab.benchmark.artifact import StoredRun, UnreadableRun, is_litter
from backdoorlab.benchmark.card import Card
from backdoorlab.core.errors import ArtifactError, InputError, nearest
from backdoorlab.core.paths import is_file, printable, reason, user_path
from backdoorlab.core.tensors import tensor_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from backdoorlab.training.context import Assets, Reporter

__all__ = ["STAGES", "Store", "StoreError", "StoredAssets", "StoredRun", "UnreadableRun", "UserAssets"]

STAGES = ("benign", "attack", "defense")

_KEY = re.compile(r"[0-9a-f]{20}")
_KIND = re.compile(r"[a-z0-9-]+")
_TEMPORARY = re.compile(r"\.tmp-(?P<key>[0-9a-f]{20})-[0-9a-f]{8}(-old)?")


class StoreError(InputError):
    """The store cannot be written: no permission, no space, not a folder."""


class Store:
    """A folder of artifacts that any number of processes may use at once."""

    def __init__(self, root: str | Path) -> None:
        """Open the store; a folder that does not exist yet is made when the first artifact is written.

        Raises:
            StoreError: if it is no folder.
        """
        self.root = user_path(root).absolute()
        self._cleaned = False
        try:
            if not self.root.is_dir() and os.path.lexists(self.root):
                raise NotADirectoryError(20, "Not a directory")
        except OSError as error:
            raise StoreError(f"cannot use {printable(self.root)} as a store: {reason(error)}") from None

    def run(self, stage: str, key: str) -> StoredRun:
        """The artifact's handle, whether or not it exists."""
        return StoredRun(stage, key, self.root / stage / key)

    def has(self, stage: str, key: str) -> bool:
        """Is there such an artifact?

        Raises:
            ArtifactError: if the system refuses to say.
        """
        where = f"{self.root}/{stage}/{key}/card.json"
        try:
            os.lstat(where)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise ArtifactError(f"{where}: cannot be read ({reason(error)})") from None
        return True

    def runs(self, *stages: str) -> list[StoredRun]:
        """Handles of all runs (assets are not runs), unverified, oldest first.

        Raises:
            StoreError: if a stage's folder cannot be listed.
        """
        entries = []
        for stage in stages or STAGES:
            folder = self.root / stage
            for entry in _entries(folder):
                if entry.name.startswith(".") or is_litter(entry.name):
                    continue
                try:
                    changed = entry.stat(follow_symlinks=False).st_mtime_ns
                except OSError:
                    continue  # it was removed meanwhile
                entries.append((changed, stage, entry.name, folder))
        return [StoredRun(stage, name, folder / name) for _, stage, name, folder in sorted(entries)]

    def find(self, name: str | Path) -> StoredRun:
        """A run by the beginning of its key, by stage/key, or by the path of its folder.

        Raises:
            InputError: if no run, or more than one, is meant.
        """
        text = str(name).rstrip("/")
        path = user_path(text)
        if os.path.isfile(path / "card.json"):  # noqa: PTH113 - False, not an error, where it may not be looked at
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
        tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
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
        files = {f"{name}.safetensors": tensor_bytes(t) for name, t in (tensors or {}).items()}
        if record is not None:
            files["record.json"] = _json(record, indent=2)
        if log:
            files["log.jsonl"] = b"".join(map(_json, log))
        sealed = card.sealed({name: hashlib.sha256(content).hexdigest() for name, content in files.items()})
        temporary = run.path.with_name(f".tmp-{run.key}-{secrets.token_hex(4)}")
        old = temporary.with_name(temporary.name + "-old")
        try:
            temporary.mkdir(parents=True)
            for name, content in files.items():
                _write(temporary / name, content)
            _write(temporary / "card.json", sealed.to_json().encode())
            _sync_folder(temporary)
            if os.path.lexists(run.path):
                run.path.rename(old)
            temporary.rename(run.path)
            _sync_folder(run.path.parent)
        except BaseException as error:
            if os.path.lexists(old) and not os.path.lexists(run.path):
                old.rename(run.path)
            _remove(temporary)
            if isinstance(error, OSError):
                raise StoreError(f"cannot write {run.path}: {reason(error)}") from None
            raise
        _remove(old)
        return run

    @contextmanager
    def lock(self, stage: str, key: str, reporter: Reporter | None = None) -> Iterator[None]:
        """Only one process computes a key; others wait here, then find it done. Leftovers are removed.

        Raises:
            StoreError: if the store cannot be written.
        """
        try:
            (self.root / ".locks").mkdir(parents=True, exist_ok=True)
            if not self._cleaned:
                self._cleaned = True
                self.clean()
            lock = FileLock(self._lock_path(stage, key))
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if reporter is not None:
                    reporter.note(f"waiting for another process that is computing {stage}/{key}")
                lock.acquire()
        except OSError as error:
            raise StoreError(f"cannot lock {stage}/{key} in {printable(self.root)}: {reason(error)}") from None
        try:
            for path in _leftovers(self.root / stage, key):
                _remove(path)
            yield
        finally:
            lock.release()

    def clean(self) -> int:
        """Remove temporary folders whose writer has ended (its lock is free); how many.

        Writers do this on their own. A folder that cannot be removed, or whose lock belongs to another user, is left.
        """
        removed = 0
        for stage in [*STAGES, *self._asset_stages()]:
            folder = self.root / stage
            for key in filter(None, {_temporary_key(path.name) for path in _leftovers(folder)}):
                try:
                    with FileLock(self._lock_path(stage, key), timeout=0):
                        removed += sum(_remove(path) for path in _leftovers(folder, key))
                except (Timeout, OSError):
                    continue  # its writer still runs, or the lock belongs to another user
        return removed

    def _asset_stages(self) -> list[str]:
        folder = self.root / "asset"
        if folder.is_symlink():
            return []
        return [f"asset/{e.name}" for e in _entries(folder) if _KIND.fullmatch(e.name)]

    def assets(self, reporter: Reporter | None = None) -> StoredAssets:
        """A cache for surrogates, encoders and generators, to be handed to a context."""
        return StoredAssets(self, reporter)

    def keep_file(self, kind: str, source: str | Path) -> str:
        """Keep a copy of a user's safetensors file as an asset; its key is a hash of its content.

        Raises:
            InputError: if ``source`` is neither a file of that kind nor the key of a copy.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        from backdoorlab.benchmark.meter import asset_card

        stage, path = _file_stage(kind), user_path(source)
        if _KEY.fullmatch(str(source)) and self.has(stage, str(source)):
            return str(source)
        if not is_file(path):
            raise InputError(f"asset {kind}: no such file: {source}; expected a .safetensors file")
        try:
            tensors = load(path.read_bytes())
        except SafetensorError as error:
            raise InputError(
                f"asset {kind}: {source} is not a safetensors file ({error}); pickled weights are never read"
            ) from None
        except OSError as error:
            raise InputError(f"asset {kind}: {source} cannot be read ({reason(error)})") from None
        card = asset_card(f"own {kind}", {"sha256": hashlib.sha256(tensor_bytes(tensors)).hexdigest()})
        if self.has(stage, card.key):
            return card.key
        with self.lock(stage, card.key):
            if not self.has(stage, card.key):
                self.save(card.model_copy(update={"command": "(brought by the user)"}), {"asset": tensors}, stage=stage)
        return card.key

    def file(self, kind: str, key: str) -> dict[str, Tensor]:
        """The tensors that :meth:`keep_file` kept.

        Raises:
            InputError: if the store has no such copy.
        """
        run = self.run(_file_stage(kind), key)
        if not self.has(run.stage, key):
            raise InputError(f"asset {kind}: {self.root} has no file kept under {key}; give the file itself")
        return run.tensors("asset")

    def _lock_path(self, stage: str, key: str) -> str:
        return str(self.root / ".locks" / f"{stage.replace('/', '-')}-{key}.lock")


class StoredAssets:
    """Fulfils :class:`~backdoorlab.training.context.Assets` with ``asset/<kind>/<key>`` artifacts."""

    def __init__(self, store: Store, reporter: Reporter | None) -> None:
        self.store, self.reporter = store, reporter

    def get(self, kind: str, spec: Mapping[str, Any], build: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What was stored for (kind, spec), or build, store and return it; the same bits either way."""
        from backdoorlab.benchmark.meter import Meter, asset_card

        card = asset_card(kind, spec)
        stage = _asset_stage(kind)
        run = self.store.run(stage, card.key)
        if self.store.has(stage, card.key):
            return run.tensors("asset")
        with self.store.lock(stage, card.key, self.reporter):
            if not self.store.has(stage, card.key):
                meter = Meter()
                with meter.part("build"):
                    tensors = build()
                self.store.save(card.model_copy(update=meter.fields()), {"asset": tensors}, stage=stage)
        return run.tensors("asset")


@dataclass(frozen=True)
class UserAssets:
    """A cache in which the user's own files stand in for some kinds of assets.

    Attributes:
        cache: for all other kinds.
        files: tensors by kind.
    """

    cache: Assets
    files: Mapping[str, dict[str, Tensor]]

    def get(self, kind: str, spec: Mapping[str, Any], build: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The user's tensors if there are any of that kind, whatever the spec; else the cache's.

        What is built *from* a user's file (a pattern optimised on their surrogate) must not meet what was built from
        another: its spec is extended by the files in use.
        """
        if kind in self.files:
            return dict(self.files[kind])
        digests = {k: hashlib.sha256(tensor_bytes(t)).hexdigest()[:20] for k, t in sorted(self.files.items())}
        return self.cache.get(kind, {**spec, "own files": digests} if digests else spec, build)


def _asset_stage(kind: str) -> str:
    return f"asset/{re.sub(r'[^a-z0-9-]+', '-', kind.lower())}"


def _file_stage(kind: str) -> str:
    return _asset_stage(f"own-{kind}")


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


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What lies in a folder; nothing if there is none."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StoreError(f"cannot read {printable(folder)}: {reason(error)}") from None


def _leftovers(folder: Path, key: str | None = None) -> list[Path]:
    """Temporary folders in a stage's folder (of one key); none if that folder is a link."""
    if folder.is_symlink():
        return []
    names = [e.name for e in _entries(folder) if e.is_dir(follow_symlinks=False)]
    keys = {name: _temporary_key(name) for name in names}
    return [folder / name for name, of in keys.items() if of is not None and key in (None, of)]


def _temporary_key(name: str) -> str | None:
    """The key in the name of a temporary folder; None for any other name."""
    match = _TEMPORARY.fullmatch(name)
    return match["key"] if match else None


def _remove(path: Path) -> bool:
    """Remove a folder and what is in it, as far as the system allows; is it gone?"""
    shutil.rmtree(path, ignore_errors=True)
    return not os.path.lexists(path)
