"""One artifact of a store, for reading: nothing here writes, and nothing is believed before its digest was checked."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backdoorlab.benchmark.card import Card, parse_record
from backdoorlab.core.errors import ArtifactError, InputError, MissingExtra
from backdoorlab.core.records import JSON_BYTES, parse_json

if TYPE_CHECKING:
    from torch import Tensor

_NAME = re.compile(r"[a-z][a-z0-9_-]*\.(safetensors|json|jsonl)")
_LITTER = re.compile(r"\.ds_store|\._.*|thumbs\.db|desktop\.ini|\.nfs[0-9a-f]+", re.IGNORECASE)
_PLAIN_OPEN = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def is_litter(name: str) -> bool:
    """Is it what file browsers and network file systems leave in every folder (.DS_Store, Thumbs.db, ...)?"""
    return _LITTER.fullmatch(name) is not None


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
            ArtifactError: missing, unreadable, truncated, tampered with, foreign.
        """
        where = f"{self.path}{os.sep}card.json"
        record, digest = parse_record(_read(where), where)
        card = Card.from_record(record, where)
        if card.digest != digest:
            raise ArtifactError(f"{where}: its content does not match its own digest; it was changed after the run")
        if card.key != self.key or card.stage != self.stage.split("/")[0]:
            raise ArtifactError(f"{where}: belongs to {card.id}, not to {self.id}; the folder was moved or renamed")
        try:
            present = set(os.listdir(self.path))  # noqa: PTH208
        except OSError as error:
            raise ArtifactError(f"{self.path}: cannot be read ({error.strerror or error})") from None
        for name in sorted(present - {"card.json", *card.digests}):
            if not is_litter(name):
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
        content = _read(str(where))
        if hashlib.sha256(content).hexdigest() != card.digests[name]:
            raise ArtifactError(f"{where}: checksum mismatch; the file is truncated or was changed after the run")
        return content

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Tensors of ``name``.safetensors, on the CPU."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            return load(self.read(f"{name}.safetensors"))
        except SafetensorError as error:
            raise ArtifactError(f"{self.path / name}.safetensors: not a safetensors file ({error})") from None

    def all_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Every safetensors file by name without suffix."""
        names = [n.removesuffix(".safetensors") for n in self.card().digests if n.endswith(".safetensors")]
        return {name: self.tensors(name) for name in names}

    def record(self) -> dict[str, Any]:
        """What is needed, besides tensors, to rebuild the result."""
        return self._object("record.json", self.read("record.json"))

    def log(self) -> list[dict[str, Any]]:
        """One record per epoch (or event); empty if the stage has no log."""
        if "log.jsonl" not in self.card().digests:
            return []
        return [self._object("log.jsonl", line) for line in self.read("log.jsonl").splitlines()]

    def verify(self) -> Card:
        """Check every file; the card."""
        card = self.card()
        for name in card.digests:
            self.read(name)
        return card

    @contextmanager
    def rebuilding(self, name: str = "record.json") -> Iterator[None]:
        """Inside, a record that lacks a field, or has one of another type, is an error of the artifact.

        Args:
            name: of the file that is read there.

        Raises:
            ArtifactError: naming the file and the field.
        """
        try:
            yield
        except MissingExtra:
            raise
        except InputError as error:
            if str(self.path) in str(error):
                raise
            raise ArtifactError(f"{self.path / name}: {error}") from None
        except KeyError as error:
            raise ArtifactError(f"{self.path / name}: lacks {error}, which every run of this kind has") from None
        except (
            TypeError,
            ValueError,
            AttributeError,
            IndexError,
            RuntimeError,
            ArithmeticError,
            AssertionError,
            MemoryError,
        ) as error:
            what = " ".join(str(error).split())[:200]
            raise ArtifactError(f"{self.path / name}: a field is missing or of another type ({what})") from None

    def _object(self, name: str, text: bytes) -> dict[str, Any]:
        try:
            record = parse_json(text, str(self.path / name))
        except ArtifactError:
            record = None
        if not isinstance(record, dict):
            raise ArtifactError(f"{self.path / name}: does not hold JSON objects, as artifacts do")
        return record


@dataclass(frozen=True)
class UnreadableRun(StoredRun):
    """A run that cannot be read.

    Attributes:
        reason: one line.
    """

    reason: str = ""

    def card(self) -> Card:
        """There is none.

        Raises:
            ArtifactError: always.
        """
        raise ArtifactError(self.reason)


def _read(path: str) -> bytes:
    """Content of a regular file; a link, a folder or a pipe is an error."""
    try:
        if not hasattr(os, "O_NOFOLLOW") and os.path.islink(path):  # noqa: PTH114
            raise OSError(errno.ELOOP, "a link")
        descriptor = os.open(path, _PLAIN_OPEN)
    except OSError as error:
        if error.errno == errno.ELOOP:
            what = "a link; an artifact consists of plain files"
        elif error.errno in (errno.ENOENT, errno.ENOTDIR):
            what = "missing; an artifact consists of plain files"
        else:
            what = f"cannot be read ({error.strerror or error})"
        raise ArtifactError(f"{path}: {what}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ArtifactError(f"{path}: not a file; an artifact consists of plain files")
        if path.endswith(".json") and status.st_size > JSON_BYTES:
            raise ArtifactError(f"{path}: has {status.st_size:,} bytes; a record may have at most {JSON_BYTES:,}")
        with os.fdopen(descriptor, "rb", buffering=0, closefd=False) as file:
            return file.readall()
    except MemoryError:
        raise ArtifactError(f"{path}: has {status.st_size:,} bytes, for which there is no memory") from None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror or error})") from None
    finally:
        os.close(descriptor)
