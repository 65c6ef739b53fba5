"""Stores on other machines: any fsspec URL (s3://, gs://, sftp://, ...), mirrored in a local folder.

Artifacts are uploaded whole, ``card.json`` last, so that a folder without it is an upload that did not end, and counts
as absent; what comes down is verified against its card before it gets its place in the mirror. Locks hold among
processes of one machine only: two machines that start the same key at once both compute it, and the second upload
replaces the first by an equal artifact.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from backdoorlab.benchmark.artifact import StoredRun, UnreadableRun
from backdoorlab.benchmark.card import Card
from backdoorlab.benchmark.store import STAGES, Store, StoreError
from backdoorlab.core.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor


def open_store(where: str | Path) -> Store:
    """A local store for a path, a mirrored one for a URL."""
    text = str(where)
    if "://" not in text:
        return Store(text)
    return Store(text.removeprefix("file://")) if text.startswith("file://") else RemoteStore(text)


class RemoteStore(Store):
    """A store at a URL.

    Args:
        url: such as "s3://bucket/folder".
        mirror: local folder; None keeps one per URL in the user's cache.
    """

    def __init__(self, url: str, mirror: str | Path | None = None) -> None:
        import fsspec
        import platformdirs

        self.url = url.rstrip("/")
        try:
            self.files, base = fsspec.core.url_to_fs(self.url)
        except Exception as error:  # every file system has exceptions of its own: no such bucket, host, credentials
            raise StoreError(f"cannot use {url} as a store: {error}") from None
        self.base = PurePosixPath(base)
        name = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        super().__init__(mirror or Path(platformdirs.user_cache_dir("backdoorlab")) / "stores" / name)

    def has(self, stage: str, key: str) -> bool:
        """Is it in the mirror, or can it be fetched?"""
        return super().has(stage, key) or self._fetch(stage, key)

    def runs(self, *stages: str) -> list[StoredRun]:
        """All runs, fetched where the mirror lacks them; one that cannot be fetched does not hide the others."""
        broken = []
        for stage in stages or STAGES:
            for key in self._remote_keys(stage):
                try:
                    self.has(stage, key)
                except ArtifactError as error:
                    broken.append(UnreadableRun(stage, key, self.root / stage / key, str(error)))
        return [*broken, *super().runs(*stages)]

    def save(
        self,
        card: Card,
        tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
        record: Mapping[str, Any] | None = None,
        log: list[dict[str, Any]] | None = None,
        *,
        stage: str | None = None,
    ) -> StoredRun:
        """Write to the mirror, then upload."""
        run = super().save(card, tensors, record, log, stage=stage)
        target = self.base / run.stage / run.key
        try:
            self.files.makedirs(str(target), exist_ok=True)
            if self.files.exists(str(target / "card.json")):
                self.files.rm(str(target / "card.json"))
            for name in [*run.card().digests, "card.json"]:
                self.files.put_file(str(run.path / name), str(target / name))
        except OSError as error:
            raise StoreError(f"cannot upload {run.id} to {self.url}: {error}") from None
        return run

    def _remote_keys(self, stage: str) -> list[str]:
        try:
            names = [PurePosixPath(p).name for p in self.files.ls(str(self.base / stage), detail=False, refresh=True)]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StoreError(f"cannot list {self.url}/{stage}: {error}") from None
        return sorted(name for name in names if re.fullmatch("[0-9a-f]{20}", name))

    def _fetch(self, stage: str, key: str) -> bool:
        """Download one artifact; False if it is not there (or its upload did not end)."""
        source, place = self.base / stage / key, self.root / stage / key
        temporary = place.parent / f".tmp-{key}-{secrets.token_hex(4)}" / key
        try:
            if not self.files.exists(str(source / "card.json")):
                return False
            temporary.mkdir(parents=True)
            self.files.get_file(str(source / "card.json"), str(temporary / "card.json"))
            listed = Card.from_json(
                (temporary / "card.json").read_bytes(), f"{self.url}/{stage}/{key}/card.json"
            ).digests
            for name in listed:
                if "/" in name or name.startswith("."):
                    raise ArtifactError(
                        f"{self.url}/{stage}/{key}/card.json: lists a file {name!r} outside of its folder"
                    )
                self.files.get_file(str(source / name), str(temporary / name))
            StoredRun(stage, key, temporary).verify()
            if not place.exists():
                temporary.rename(place)
        except OSError as error:
            raise StoreError(f"cannot download {stage}/{key} from {self.url}: {error}") from None
        finally:
            shutil.rmtree(temporary.parent, ignore_errors=True)
        return True
