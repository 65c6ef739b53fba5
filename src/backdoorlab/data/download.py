"""Fetch public archives once, whole or not at all: to a temporary name, checksummed, unpacked safely, then renamed.

Nothing here runs unless the user asked for a download. The digests are the published ones (md5 where the publisher
gives no better): an archive that does not match is deleted and never opened.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from backdoorlab.core.errors import ArtifactError, InputError
from backdoorlab.core.paths import exists, reason
from backdoorlab.data.sources import DatasetSource, find_file


@dataclass(frozen=True)
class Remote:
    """A file on the web.

    Attributes:
        url: where it is.
        digest: "md5:..." or "sha256:...".
        into: folder below the data set's root in which it (or, for an archive, its content) belongs.
        unpack: whether it is a tar or zip archive.
    """

    url: str
    digest: str
    into: str = ""
    unpack: bool = True


def verify(data: bytes, digest: str, path: Path, remedy: str) -> None:
    """Compare bytes that were just read with a pinned digest.

    Args:
        data: the file's content.
        digest: "md5:..." or "sha256:...".
        path: where it came from.
        remedy: what the user can do, a sentence.

    Raises:
        ArtifactError: if they differ.
    """
    kind, _, expected = digest.partition(":")
    got = hashlib.new(kind, data, usedforsecurity=False).hexdigest()
    if got != expected:
        raise ArtifactError(f"{path}: its {kind} is {got}, the published file's is {expected}. {remedy}")


def find_or_fetch(
    roots: tuple[Path, ...], folder: str, source: DatasetSource, remotes: tuple[Remote, ...], download: bool
) -> Path:
    """First existing ``root/folder``; if there is none and ``download`` is set, the freshly fetched one.

    Args:
        roots: searched in this order; a download goes to the last.
        folder: that the data set unpacks to.
        source: for messages.
        remotes: files that together make the folder.
        download: whether the user asked for it.

    Raises:
        InputError: if it was not found and not asked for, or could not be fetched.
    """
    if download and not any(exists(root / folder) for root in roots):
        try:
            fetch(roots[-1], folder, remotes)
        except OSError as error:
            raise InputError(f"cannot keep a download in {roots[-1]}: {reason(error)}") from error
    return find_file(roots, folder, source)


def fetch(root: Path, folder: str, remotes: tuple[Remote, ...]) -> None:
    """Make ``root/folder`` of the given files; an interruption leaves nothing behind that looks complete."""
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{folder}.lock"):
        if (root / folder).exists():  # another process was faster
            return
        with tempfile.TemporaryDirectory(dir=root, prefix=f".{folder}.") as scratch:
            stage = Path(scratch)
            for remote in remotes:
                target = stage / remote.into
                target.mkdir(parents=True, exist_ok=True)
                name = remote.url.rpartition("/")[2]
                arrived = fetch_file(remote.url, remote.digest, (stage if remote.unpack else target) / name)
                if remote.unpack:
                    unpack(arrived, target)
                    arrived.unlink()
            if not (stage / folder).is_dir():
                raise ArtifactError(f"{remotes[0].url} holds no folder {folder!r}")
            (stage / folder).replace(root / folder)


def fetch_file(url: str, digest: str, target: Path) -> Path:
    """Stream a URL to a file, hashing on the way; the file appears under its name only if the digest matches.

    Raises:
        InputError: if the server cannot be reached.
        ArtifactError: if what arrived is not the published file.
    """
    kind, _, expected = digest.partition(":")
    hasher = hashlib.new(kind, usedforsecurity=False)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as out, urllib.request.urlopen(url, timeout=60) as response:
            while block := response.read(1 << 20):
                hasher.update(block)
                out.write(block)
        if hasher.hexdigest() != expected:
            raise ArtifactError(
                f"{url}: the {kind} of what arrived is {hasher.hexdigest()}, expected {expected}; nothing was kept. "
                "Try again, or fetch the file by hand from a mirror that you trust"
            )
        return part.replace(target)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise InputError(f"cannot download {url}: {error}. Fetch it by hand and set $BACKDOORLAB_DATA") from error
    finally:
        part.unlink(missing_ok=True)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar or zip archive below ``folder``; links, devices and paths that lead out of it are refused.

    Raises:
        ArtifactError: if it is no archive, is damaged, or tries to write elsewhere.
    """
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as pack:
                _unzip(pack, folder)
        else:
            with tarfile.open(archive) as pack:
                pack.extractall(folder, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise ArtifactError(f"{archive.name} cannot be unpacked: {error}") from error


def _unzip(pack: zipfile.ZipFile, folder: Path) -> None:
    base = folder.resolve()
    for member in pack.infolist():
        target = (base / member.filename).resolve()
        if not target.is_relative_to(base) or Path(member.filename).is_absolute():
            raise zipfile.BadZipFile(f"member {member.filename!r} leads out of the folder")
        if member.is_dir():
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with pack.open(member) as source, target.open("wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
