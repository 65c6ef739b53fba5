"""Backdoors as folders of their own: safetensors and one JSON record with checksums, written whole or not at all.

    DIR/record.json          what was done, and the sha256 of every other file
    DIR/model.safetensors    and trigger, poison, ...: the tensors of ``Backdoor.state``

The benchmark's store keeps more (the card of the run); this is for sharing one model with its trigger.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from backdoorlab.core.errors import ArtifactError, InputError

FORMAT = "backdoorlab.backdoor.1"

_NAME = re.compile(r"[a-z][a-z0-9_-]*\.safetensors")


def write_folder(
    folder: str | Path, tensors: Mapping[str, Mapping[str, Tensor]], record: Mapping[str, Any], *, force: bool = False
) -> Path:
    """Write tensors by file name and a record into a folder.

    Args:
        folder: made here; must not exist, or be an earlier one if ``force``.
        tensors: by file name without suffix.
        record: JSON-able.
        force: replace an earlier folder of this format (never anything else).

    Raises:
        InputError: if the folder exists, or cannot be written; nothing is left behind.
    """
    path = Path(folder).expanduser().absolute()
    if path.exists() and not (force and _ours(path)):
        hint = "; force=True replaces it" if _ours(path) else ""
        raise InputError(f"{path} exists already; give the name of a folder that does not{hint}")
    files = {f"{name}.safetensors": save_tensors(_plain(parts)) for name, parts in tensors.items()}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    text = json.dumps({"format": FORMAT, "files": digests, **record}, indent=2, allow_nan=False, ensure_ascii=False)
    files["record.json"] = text.encode() + b"\n"
    temporary = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        for name, content in files.items():
            with (temporary / name).open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return path


def read_folder(folder: str | Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Inverse of :func:`write_folder`: tensors by file name without suffix, and the record.

    Raises:
        ArtifactError: if it is no such folder, or a file is missing or was changed.
    """
    path = Path(folder).expanduser()
    if not _ours(path):
        raise ArtifactError(f"{path} is no saved backdoor; expected a folder with a record.json written by save()")
    record = _record(path)
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, digest in record.pop("files").items():
        where = path / name
        if not _NAME.fullmatch(name) or where.is_symlink() or not where.is_file():
            raise ArtifactError(f"{where}: missing or not a plain safetensors file, although the record lists it")
        content = where.read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise ArtifactError(f"{where}: checksum mismatch; the file is truncated or was changed")
        try:
            tensors[name.removesuffix(".safetensors")] = load_tensors(content)
        except SafetensorError as error:
            raise ArtifactError(f"{where}: not a safetensors file ({error})") from None
    return tensors, record


def _ours(path: Path) -> bool:
    try:
        return path.is_dir() and _record(path).get("format") == FORMAT
    except ArtifactError:
        return False


def _record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads((path / "record.json").read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path / 'record.json'} cannot be read: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("files"), dict):
        raise ArtifactError(f"{path / 'record.json'}: not a record of a saved backdoor")
    return record


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CPU copies that own their memory, as safetensors wants them."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
