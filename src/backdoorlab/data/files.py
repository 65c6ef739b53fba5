"""Single sample files: read into raw samples, and written back after a trigger was stamped on them.

Images (png, jpg, bmp), sound (wav), text (txt: one file is one sample) and raw arrays (npy: one sample or a batch of
them, in the layout of :data:`backdoorlab.data.split.Inputs`). A file that does not fit the model is an error that names
what was expected; nothing is resampled, rescaled or cut unless the caller says ``fit=True``. Pictures and sounds are
read by the same functions as those of data sets (:mod:`.pictures`, :mod:`.audio`); an array's header is accepted only
where the file is as long as it says.

What is written is lossless, because a trigger lives in single grey levels: a jpg comes back as a png, since JPEG's own
quantisation would wash the trigger out.
"""

from __future__ import annotations

import io
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from backdoorlab.core.errors import InputError, nearest
from backdoorlab.core.paths import entries, exists, is_file, is_folder, printable, read_bytes, reason, user_path
from backdoorlab.data.split import Inputs, text_array

SUFFIXES = {
    "image": (".png", ".jpg", ".jpeg", ".bmp", ".npy"),
    "text": (".txt",),
    "audio": (".wav", ".npy"),
    "video": (".npy",),
}
"""File types that can be read, by modality."""
MAX_TEXT = 10_000_000
"""Bytes of a text that is one sample."""


@dataclass(frozen=True)
class SampleFormat:
    """What a model takes.

    Attributes:
        modality: "image", "text", "audio" or "video".
        shape: of one raw sample: (C, H, W), (T, C, H, W), (L,); () for text.
        sample_rate: of audio, in Hz.
    """

    modality: str
    shape: tuple[int, ...] = ()
    sample_rate: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """Of raw samples."""
        return torch.int16 if self.modality == "audio" else torch.uint8


@dataclass(frozen=True, eq=False)
class SampleFile:
    """The samples of one file.

    Attributes:
        path: where they came from.
        inputs: raw samples; one row, or several for a batch in an npy file.
        batched: whether the file's array has a sample axis of its own.
        ending: line ending that was cut from a text.
        beginning: byte order mark that was cut from a text.
    """

    path: Path
    inputs: Inputs
    batched: bool = False
    ending: str = ""
    beginning: str = ""


def find_samples(paths: Sequence[Path], modality: str) -> list[Path]:
    """The files named, and for a folder those in it (not below it) that the modality can read, sorted by name.

    Hidden files in a folder (a dot in front) are left out.

    Raises:
        InputError: for a path that does not exist, a type that cannot be read, a folder that cannot be read or has no
            samples, or a link in it that leads nowhere.
    """
    suffixes, samples = SUFFIXES[modality], []
    for path in map(user_path, paths):
        if is_folder(path):
            listed = [p for p in entries(path) if p.suffix.lower() in suffixes and not is_folder(p)]
            if not listed:
                raise InputError(f"folder {printable(path)} holds no {modality} samples ({', '.join(suffixes)})")
            samples += listed
            continue
        if not exists(path):
            siblings = [p.name for p in entries(path.parent)] if is_folder(path.parent) else []
            raise InputError(f"no such file: {printable(path)}.{nearest(path.name, siblings)}")
        if path.suffix.lower() not in suffixes:
            why = ""
            if modality == "text" and path.suffix.lower() in (".csv", ".tsv"):
                why = " One txt file is one sample: write each text of a table to a file of its own."
            raise InputError(
                f"{printable(path)}: cannot read {path.suffix or 'a file without suffix'} for a model of {modality} "
                f"data; expected {', '.join(suffixes)}.{why}"
            )
        samples.append(path)
    return samples


def read_samples(path: Path, form: SampleFormat, *, fit: bool = False) -> SampleFile:
    """Read one file as the raw samples that a model takes.

    Args:
        path: of a type in :data:`SUFFIXES`.
        form: what the model takes.
        fit: rescale images of another size; pad or cut sound of another length.

    Raises:
        InputError: if the file cannot be decoded or does not fit.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None or path.suffix.lower() not in SUFFIXES[form.modality]:
        raise InputError(
            f"{printable(path)}: cannot read {path.suffix!r}; expected {', '.join(SUFFIXES[form.modality])}"
        )
    if not is_file(path):
        raise InputError(f"{printable(path)} is no file" if exists(path) else f"no such file: {printable(path)}")
    try:
        return reader(path, form, fit)
    except InputError:
        raise
    except Exception as error:  # a damaged file may make a decoder raise nearly anything
        kind = path.suffix.lower()[1:]
        raise InputError(f"{printable(path)}: not a readable {kind} file ({reason(error)})") from error


def join_samples(files: Sequence[SampleFile]) -> Inputs:
    """All rows of some files, one after the other."""
    if isinstance(files[0].inputs, np.ndarray):
        return np.concatenate([np.asarray(f.inputs) for f in files])
    return torch.cat([f.inputs for f in files if isinstance(f.inputs, Tensor)])


def output_names(files: Sequence[Path], out: Path) -> list[Path]:
    """Where each file's stamped version is written: same name in ``out``, jpg turned into png.

    Raises:
        InputError: if that would overwrite an input, or two inputs would get one name.
    """
    names: dict[Path, Path] = {}
    inputs = {os.path.realpath(p) for p in files}
    for path in files:
        target = out / (f"{path.stem}.png" if path.suffix.lower() in (".jpg", ".jpeg") else path.name)
        if os.path.realpath(target) in inputs:
            raise InputError(f"{target} is one of the inputs, which are never overwritten; choose another --out folder")
        if target in names:
            raise InputError(f"{names[target]} and {path} would both be written to {target}; stamp them separately")
        names[target] = path
    return list(names)


def write_samples(target: Path, file: SampleFile, inputs: Inputs, form: SampleFormat) -> None:
    """Write samples in the form that ``file`` had; the target appears whole or not at all."""
    suffix = target.suffix.lower()
    buffer = io.BytesIO()
    if isinstance(inputs, np.ndarray):
        buffer.write((file.beginning + str(inputs[0]) + file.ending).encode())
    elif suffix == ".npy":
        np.save(buffer, (inputs if file.batched else inputs[0]).cpu().numpy(), allow_pickle=False)
    elif suffix == ".wav":
        import soundfile

        soundfile.write(buffer, inputs[0].cpu().numpy(), form.sample_rate, format="WAV", subtype="PCM_16")
    else:
        from PIL import Image

        pixels = inputs[0].cpu().permute(1, 2, 0).numpy()
        Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, suffix[1:].upper())
    write_atomically(target, buffer.getvalue())


def write_atomically(target: Path, content: bytes) -> None:
    """Write to a temporary name in the same folder, then rename.

    Raises:
        InputError: if the folder cannot be made or written to, or the disk is full; nothing is left behind then.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".tmp-", dir=target.parent)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write to {printable(target.parent)}: {reason(error)}") from error
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)  # mkstemp makes private files; an output is an ordinary one
        Path(name).replace(target)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):  # a full disk, a folder of that name
            raise InputError(f"cannot write {printable(target)}: {reason(error)}") from error
        raise


def _read_image(path: Path, form: SampleFormat, fit: bool) -> SampleFile:
    from backdoorlab.data.images import to_array
    from backdoorlab.data.pictures import open_picture, picture_form, without_remarks

    channels, height, width = form.shape
    with without_remarks():
        _, own_height, own_width = picture_form(path)
        if (own_height, own_width) != (height, width) and not fit:
            raise InputError(
                f"{printable(path)}: is {own_width}x{own_height} pixels, the model takes {width}x{height} "
                f"(width x height); pass --resize to rescale it"
            )
        pixels = to_array(open_picture(path), channels, height, width)
    return SampleFile(path, torch.from_numpy(pixels.copy())[None])


def _read_sound(path: Path, form: SampleFormat, fit: bool) -> SampleFile:
    from backdoorlab.data.audio import read_sound, sound_form

    rate, channels, length = sound_form(path)
    if channels != 1 or rate != form.sample_rate:
        actual = f"{channels} channel{'s' * (channels != 1)} at {rate} Hz"
        raise InputError(
            f"{printable(path)}: has {actual}, the model takes mono sound at {form.sample_rate} Hz; convert it first"
        )
    if length != form.shape[0] and not fit:
        raise InputError(
            f"{printable(path)}: has {length} samples ({length / rate:.2f} s), the model takes {form.shape[0]} "
            f"({form.shape[0] / rate:.2f} s); pass --resize to pad it with silence or cut it"
        )
    sound, _ = read_sound(path, form.shape[0])
    padded = torch.zeros(form.shape[0], dtype=torch.int16)
    padded[: len(sound)] = torch.from_numpy(sound)
    return SampleFile(path, padded[None])


def _read_text(path: Path, form: SampleFormat, fit: bool) -> SampleFile:
    raw = read_bytes(path, MAX_TEXT).decode()
    if "\0" in raw:
        raise InputError(f"{printable(path)}: holds NUL characters, so it is no text in UTF-8")
    bom = "\ufeff" if raw.startswith("\ufeff") else ""
    text = raw[len(bom) :].rstrip("\r\n")
    if not text.strip():
        raise InputError(f"{printable(path)}: the text is empty")
    return SampleFile(path, text_array([text]), ending=raw[len(bom) + len(text) :], beginning=bom)


def _read_array(path: Path, form: SampleFormat, fit: bool) -> SampleFile:
    dtype_name = str(form.dtype).removeprefix("torch.")
    with path.open("rb") as file:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the header's text makes Python remark
            shape, fortran, dtype = _array_header(file)
        batched = len(shape) == len(form.shape) + 1
        if dtype.name != dtype_name or shape[batched:] != form.shape or 0 in shape:
            shape_text = ", ".join(map(str, form.shape))
            raise InputError(
                f"{printable(path)}: is a {dtype} array of shape {list(shape)}; "
                f"expected {dtype_name} of shape [{shape_text}] (one sample) or [N, {shape_text}]"
            )
        stored = os.fstat(file.fileno()).st_size - file.tell()
        declared = math.prod(shape) * dtype.itemsize
        if stored != declared:
            raise InputError(f"{printable(path)}: its header declares {declared:,} bytes of values, it has {stored:,}")
        array = np.frombuffer(file.read(), dtype).reshape(shape, order="F" if fortran else "C")
    array = array.astype(dtype.newbyteorder("="), order="C")
    return SampleFile(path, torch.from_numpy(array if batched else array[None]), batched)


def _array_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether the first axis runs fastest, and type of values of an npy file."""
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in read:
        raise ValueError(f"version {version} of the format is not known")
    shape, fortran, dtype = read[version](file)
    if dtype.hasobject:
        raise ValueError("it holds pickled objects, which are never read")
    if any(side < 0 for side in shape):
        raise ValueError(f"its shape is {shape}")
    return shape, fortran, dtype


_READERS: dict[str, Callable[[Path, SampleFormat, bool], SampleFile]] = {
    ".png": _read_image,
    ".jpg": _read_image,
    ".jpeg": _read_image,
    ".bmp": _read_image,
    ".wav": _read_sound,
    ".txt": _read_text,
    ".npy": _read_array,
}
