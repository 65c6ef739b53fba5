"""Backdoors as separate folders: safetensors and one JSON record with checksums, written whole or not at all.

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
from torch import Tensor

from backdoorlab.core.errors import ArtifactError, InputError
from backdoorlab.core.paths import exists, is_file, read_bytes, user_path
from backdoorlab.core.records import JSON_BYTES, parse_json
from backdoorlab.core.tensors import tensor_bytes

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
        force: replace an earlier folder of this format that holds nothing else.

    Raises:
        InputError: if the folder exists, or cannot be written; nothing is left behind.
    """
    path = user_path(folder).absolute()
    if exists(path) and not (force and _replaceable(path)):
        hint = "; force=True replaces it" if _replaceable(path) else ""
        raise InputError(f"{path} exists already; give the name of a folder that does not{hint}")
    files = {f"{name}.safetensors": tensor_bytes(parts) for name, parts in tensors.items()}
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
    path = user_path(folder)
    record = _record(path)
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, digest in record.pop("files").items():
        where = path / name
        if not _NAME.fullmatch(name) or where.is_symlink() or not where.is_file():
            raise ArtifactError(f"{where}: missing or not a plain safetensors file, although the record lists it")
        content = read_bytes(where)
        if hashlib.sha256(content).hexdigest() != digest:
            raise ArtifactError(f"{where}: checksum mismatch; the file is truncated or was changed")
        try:
            tensors[name.removesuffix(".safetensors")] = load_tensors(content)
        except SafetensorError as error:
            raise ArtifactError(f"{where}: not a safetensors file ({error})") from None
    return tensors, record


def _replaceable(path: Path) -> bool:
    """Is this a folder of ours in which nobody has put anything else?"""
    try:
        listed = _record(path)["files"]
    except InputError:
        return False
    return {entry.name for entry in path.iterdir()} == {"record.json", *listed}


def _record(path: Path) -> dict[str, Any]:
    where = path / "record.json"
    if not is_file(where):
        raise ArtifactError(f"{path} is no saved backdoor; expected a folder with a record.json written by save()")
    record = parse_json(read_bytes(where, JSON_BYTES), str(where))
    ours = isinstance(record, dict) and record.get("format") == FORMAT and isinstance(record.get("files"), dict)
    if not ours:
        raise ArtifactError(f"{where}: not a record of a saved backdoor")
    return dict(record)
