"""Paths that users write: expanded, looked at, listed and read, with every refusal of the system as one line.

``Path.exists`` and its kin let some refusals through as bare ``OSError`` (a name that is too long, a parent that may
not be entered), and ``Path.rglob`` passes over folders that it may not read and links that lead nowhere. Nothing that a
user names may be left out silently, so both are errors here.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from backdoorlab.core.errors import InputError
from backdoorlab.core.foreign import visible


def user_path(text: str | Path) -> Path:
    """The path with ``~`` and ``~user`` expanded.

    Raises:
        InputError: if there is no such user, or the text cannot be a path.
    """
    if "\0" in str(text):
        raise InputError(f"{str(text)!r} is no path: it holds a NUL character")
    try:
        return Path(text).expanduser()
    except RuntimeError:  # what pathlib raises for an unknown user
        user = str(text).split("/")[0]
        raise InputError(f"{text}: there is no user {user[1:]!r}; write './{text}' for a folder of that name") from None


def is_file(path: Path) -> bool:
    """Is there a regular file (or a link to one)? Pipes and devices, which may never end, are none.

    Raises:
        InputError: if the system refuses to say.
    """
    status = _status(path)
    return status is not None and stat.S_ISREG(status.st_mode)


def is_folder(path: Path) -> bool:
    """Is there a folder (or a link to one)?

    Raises:
        InputError: if the system refuses to say.
    """
    status = _status(path)
    return status is not None and stat.S_ISDIR(status.st_mode)


def exists(path: Path) -> bool:
    """Is there anything of that name?

    Raises:
        InputError: if the system refuses to say.
    """
    return _status(path) is not None


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, sorted; hidden entries (a dot in front) are left out.

    Raises:
        InputError: if the folder cannot be read, or a link in it leads nowhere or in a circle.
    """
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))  # noqa: PTH208
    except (OSError, ValueError) as error:
        raise InputError(f"folder {printable(folder)} cannot be read: {reason(error)}") from None
    paths = [folder / name for name in names]
    for path in paths:
        if not exists(path):
            raise InputError(f"{printable(path)} is a link that leads nowhere; remove it or mend it")
    return sorted(paths)


def files_below(folder: Path, hidden: bool = False) -> list[Path]:
    """All files in a folder and the folders below it, links followed, sorted.

    Args:
        folder: that exists.
        hidden: also what has a dot in front of its name, or lies in such a folder.

    Raises:
        InputError: for a folder that cannot be read, a link that leads nowhere or back to a folder above it, and for
            pipes, sockets and devices.
    """
    files: list[Path] = []

    def visit(current: Path, above: tuple[tuple[int, int], ...]) -> None:
        status = _status(current)
        identity = (status.st_dev, status.st_ino) if status is not None else (0, 0)
        if identity in above:
            raise InputError(f"{printable(current)} is a link back to a folder that holds it; remove it")
        try:
            names = os.listdir(current)  # noqa: PTH208
        except OSError as error:
            raise InputError(f"folder {printable(current)} cannot be read: {reason(error)}") from None
        for path in (current / name for name in names if hidden or not name.startswith(".")):
            if is_folder(path):
                visit(path, (*above, identity))
            elif is_file(path):
                files.append(path)
            elif exists(path):
                raise InputError(f"{printable(path)} is neither a file nor a folder (a pipe, socket or device)")
            else:
                raise InputError(f"{printable(path)} is a link that leads nowhere; remove it or mend it")

    visit(folder, ())
    return sorted(files)


def read_bytes(path: Path, most: int | None = None) -> bytes:
    """Content of a regular file.

    Args:
        path: of the file.
        most: bytes that it may have; None for any number.

    Raises:
        InputError: if there is none, it cannot be read, or it is larger.
    """
    if not is_file(path):
        raise InputError(f"{printable(path)} is no file" if exists(path) else f"there is no file {printable(path)}")
    try:
        with path.open("rb") as file:
            content = file.read() if most is None else file.read(most + 1)
    except MemoryError:
        raise InputError(f"{printable(path)} is too large to be read: there is no memory for it") from None
    except OSError as error:
        raise InputError(f"{printable(path)} cannot be read: {reason(error)}") from None
    if most is not None and len(content) > most:
        raise InputError(f"{printable(path)} has more than {most:,} bytes, the most that is read here")
    return content


def reason(error: Exception) -> str:
    """What an error of the system or of a decoder says, on one line without the file's name."""
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    return visible(text[:200]) if text else type(error).__name__


def printable(path: Path | str) -> str:
    """A path for messages: on one line, see :func:`~backdoorlab.core.foreign.visible`."""
    return visible(path)


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{printable(path)} cannot be used: {reason(error)}") from None
