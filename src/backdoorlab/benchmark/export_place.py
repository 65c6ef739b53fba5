"""Where an export goes: a folder that appears whole or not at all, and that is replaced only while it is what we wrote.

``DIR/SHA256SUMS`` lists every file of an export with its checksum (``sha256sum -c SHA256SUMS`` reads it). A folder is
replaced only if everything in it is listed there and unchanged, and of the old one only what is listed is deleted.

An export is written to ``.DIR.partial-TOKEN`` beside DIR while the lock file ``.DIR.partial-TOKEN.lock`` is held, so
that a later export can tell the leftovers of a process that has ended from the work of one that still runs.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from backdoorlab.core.errors import InputError
from backdoorlab.core.paths import exists, is_folder, printable, reason, user_path

SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  ([^/].*)")
_NAME = 40
"""Characters of the folder's name that appear in the names of temporary folders."""


def checked_place(folder: Path, force: bool) -> Path:
    """The folder's absolute path, if an export may be put there.

    What exports to it left behind is removed first, see :func:`remove_leftovers`.

    Raises:
        InputError: if it is a file, holds or is the working directory, or holds anything; with ``force``, if it holds
            anything that an export did not write or that was changed since, so that nothing else is ever deleted.
    """
    place = Path(os.path.realpath(user_path(folder)))
    if exists(place) and not is_folder(place):
        raise InputError(f"--out: {printable(folder)} is a file; expected a folder (it is made if it does not exist)")
    if place == Path.cwd() or place in Path.cwd().parents:
        raise InputError(
            f"--out: {printable(folder)} is the working directory or holds it; expected a folder of its own"
        )
    if exists(place.parent):
        remove_leftovers(place)
    if not exists(place) or not _holds_something(place):
        return place
    if not force:
        raise InputError(
            f"--out: {printable(folder)} is not empty; choose another folder, or replace an export with --force"
        )
    difference = foreign_content(place)
    if difference is not None:
        raise InputError(
            f"--force: {printable(folder)} {difference}; only an unchanged export is replaced, so choose another folder"
        )
    return place


def write_sums(folder: Path) -> None:
    """List every file below a folder with its checksum."""
    lines = [f"{_sha256(folder / name)}  {name}\n" for name in sorted(_files(folder)[0])]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def foreign_content(folder: Path) -> str | None:
    """What in a folder is not an export's as it was written, in words that follow the folder's name; None if nothing.

    A file that is listed but gone does not count: it cannot be lost any more.
    """
    sums = read_sums(folder)
    if sums is None:
        return f"has no {SUMS}, the list of files of an export"
    try:
        files, folders, others = _files(folder)
        for name in sorted(others):
            return f"holds {printable(name)!r}, which is neither a plain file nor a folder"
        for name in sorted(files - sums.keys() - {SUMS}):
            return f"holds {printable(name)!r}, which the export did not write"
        parents = {str(parent) for name in sums for parent in Path(name).parents}
        for name in sorted(folders - parents):
            return f"holds the folder {printable(name)!r}, which the export did not make"
        for name in sorted(files & sums.keys()):
            if _sha256(folder / name) != sums[name]:
                return f"holds {printable(name)!r}, which was changed after the export"
    except OSError as error:
        return f"cannot be read ({reason(error)})"
    return None


def read_sums(folder: Path) -> dict[str, str] | None:
    """Checksums by relative path, as :func:`write_sums` wrote them; None if there is no such list."""
    path = folder / SUMS
    try:
        if path.is_symlink():
            return None
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError):
        return None
    sums = {}
    for line in lines:
        match = _LINE.fullmatch(line)
        if match is None or ".." in match[2].split("/"):
            return None
        sums[match[2]] = match[1]
    return sums


@contextmanager
def whole_folder(place: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``place`` if the block ends well, and vanishes if not.

    An export that is there already is replaced, after another look at whether it is unchanged; what somebody puts into
    it at the last moment stays beside it under a hidden name.

    Raises:
        InputError: if it cannot be written, or what is there is no unchanged export any more.
    """
    lock: FileLock | None = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        draft, lock = _new_draft(place)
        old = draft.with_name(draft.name.replace(".partial-", ".old-"))
        draft.mkdir()
        yield draft
        if exists(place) and _holds_something(place):
            difference = foreign_content(place)
            if difference is not None:
                raise InputError(f"{printable(place)} {difference}; it was left as it is, and nothing was exported")
        if exists(place):
            place.rename(old)
        try:
            draft.rename(place)
        except OSError:
            if exists(old):
                old.rename(place)
            raise
        remove_listed(old)
    except BaseException as error:
        if lock is not None:
            shutil.rmtree(draft, ignore_errors=True)
        if isinstance(error, (OSError, ValueError)) and not isinstance(error, InputError):
            raise InputError(f"cannot write to {printable(place)}: {reason(error)}") from error
        raise
    finally:
        if lock is not None:
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)


def remove_leftovers(place: Path) -> int:
    """Remove what exports to ``place`` left beside it whose process is gone; how many folders.

    Only folders and lock files with exactly the names that :func:`whole_folder` gives, never links, and only while
    their lock is free. An export that was moved aside and not yet replaced when its process died is put back.
    """
    pattern = re.compile(rf"\.{re.escape(place.name[:_NAME])}\.(partial|old)-([0-9a-f]{{8}})(\.lock)?")
    tokens = set()
    with (
        suppress(OSError),
        os.scandir(place.parent) as entries,
    ):  # a folder that cannot be read gives an error when it is written to
        for entry in entries:
            match = pattern.fullmatch(entry.name)
            if match and not entry.is_symlink() and entry.is_dir() != bool(match[3]):
                tokens.add(match[2])
    removed = 0
    for token in sorted(tokens):
        draft, old = (place.with_name(f".{place.name[:_NAME]}.{kind}-{token}") for kind in ("partial", "old"))
        lock = _lock_of(draft)
        with suppress(Timeout, OSError), lock.acquire(timeout=0):
            if is_folder(old) and not old.is_symlink():
                if exists(place):
                    remove_listed(old)
                elif read_sums(old) is not None or not _holds_something(old):
                    old.rename(place)
                removed += 1
            if is_folder(draft) and not draft.is_symlink():
                shutil.rmtree(draft, ignore_errors=True)
                removed += 1
            Path(lock.lock_file).unlink(missing_ok=True)
    return removed


def remove_listed(folder: Path) -> None:
    """Delete the files that a folder's list names, and the folders that are empty then; anything else stays."""
    sums = read_sums(folder)
    if sums is None:
        with suppress(OSError):
            folder.rmdir()  # empty, as was the folder that the user had made
        return
    for name in sums:
        with suppress(OSError):
            (folder / name).unlink(missing_ok=True)
    _, folders, _ = _files(folder)
    for name in sorted(folders, key=lambda n: n.count("/"), reverse=True):
        with suppress(OSError):
            (folder / name).rmdir()
    if [p.name for p in folder.iterdir()] == [SUMS]:
        (folder / SUMS).unlink()
        folder.rmdir()


def _new_draft(place: Path) -> tuple[Path, FileLock]:
    """A name that no other process uses, and its lock, held."""
    while True:
        draft = place.with_name(f".{place.name[:_NAME]}.partial-{secrets.token_hex(4)}")
        lock = _lock_of(draft)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        if exists(Path(lock.lock_file)):  # else another export has just removed it as a leftover
            return draft, lock
        lock.release()


def _lock_of(draft: Path) -> FileLock:
    return FileLock(f"{draft}.lock")


def _holds_something(folder: Path) -> bool:
    """Does the folder hold anything?

    Raises:
        InputError: if it cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is not None
    except OSError as error:
        raise InputError(f"{printable(folder)} cannot be read: {reason(error)}") from None


def _files(folder: Path) -> tuple[set[str], set[str], set[str]]:
    """Relative paths of the plain files, the folders and everything else below a folder; links are not followed."""
    files: set[str] = set()
    folders: set[str] = set()
    others: set[str] = set()
    pending = [""]
    while pending:
        above = pending.pop()
        with os.scandir(folder / above) as entries:
            for entry in entries:
                name = f"{above}{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    folders.add(name)
                    pending.append(f"{name}/")
                else:
                    (files if entry.is_file(follow_symlinks=False) else others).add(name)
    return files, folders, others


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
