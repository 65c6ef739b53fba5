"""Single sample files: read into raw samples, and written back after a trigger was stamped on them.

Images (png, jpg, bmp), sound (wav), text (txt: one file is one sample) and raw arrays (npy: one sample or a batch of
them, in the layout of :data:`backdoorlab.data.split.Inputs`). A file that does not fit the model is an error that names
what was expected; nothing is resampled, rescaled or cut unless the caller says ``fit=True``.

What is written is lossless, because a trigger lives in single grey levels: a jpg comes back as a png, since JPEG's own
quantisation would wash the trigger out.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from backdoorlab.core.errors import InputError, nearest
from backdoorlab.data.split import Inputs, text_array

SUFFIXES = {
    "image": (".png", ".jpg", ".jpeg", ".bmp", ".npy"),
    "text": (".txt",),
    "audio": (".wav", ".npy"),
    "video": (".npy",),
}
"""File types that can be read, by modality."""


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
    """

    path: Path
    inputs: Inputs
    batched: bool = False
    ending: str = ""


def find_samples(paths: Sequence[Path], modality: str) -> list[Path]:
    """The files named, and for a folder those in it (not below it) that the modality can read, sorted by name.

    Raises:
        InputError: for a path that does not exist, a type that cannot be read, or a folder without samples.
    """
    wanted, found = SUFFIXES[modality], []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.is_file() and p.suffix.lower() in wanted)
            if not inside:
                raise InputError(f"folder {path} holds no {modality} samples ({', '.join(wanted)})")
            found += inside
            continue
        if not path.exists():
            there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise InputError(f"no such file: {path}.{nearest(path.name, there)}")
        if path.suffix.lower() not in wanted:
            why = " One txt file is one sample: write each text of a table to a file of its own." if (
                modality == "text" and path.suffix.lower() in (".csv", ".tsv")) else ""  # fmt: skip
            raise InputError(
                f"{path}: cannot read {path.suffix or 'a file without suffix'} for a model of {modality} data; "
                f"expected {', '.join(wanted)}.{why}"
            )
        found.append(path)
    return found


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
        raise InputError(f"{path}: cannot read {path.suffix!r}; expected {', '.join(SUFFIXES[form.modality])}")
    try:
        return reader(path, form, fit)
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, SyntaxError, EOFError) as error:
        raise InputError(f"{path}: not a readable {path.suffix.lower()[1:]} file ({_short(error)})") from error


def join_samples(files: Sequence[SampleFile]) -> Inputs:
    """All rows of some files, one after the other."""
    if isinstance(files[0].inputs, np.ndarray):
        return np.concatenate([np.asarray(f.inputs) for f in files])
    return torch.cat([f.inputs for f in files if isinstance(f.inputs, Tensor)])


def output_names(files: Sequence[Path], out: Path) -> list[Path]:
    """Where each file's stamped twin goes: same name in ``out``, jpg turned into png.

    Raises:
        InputError: if that would overwrite an input, or two inputs would get one name.
    """
    names: dict[Path, Path] = {}
    inputs = {p.resolve() for p in files}
    for path in files:
        target = out / (f"{path.stem}.png" if path.suffix.lower() in (".jpg", ".jpeg") else path.name)
        if target.resolve() in inputs:
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
        buffer.write((str(inputs[0]) + file.ending).encode())
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
        InputError: if the folder cannot be made or written to.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise InputError(f"cannot write to {target.parent}: {error.strerror or error}") from error
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)  # mkstemp makes private files; an output is an ordinary one
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _read_image(path: Path, form: SampleFormat, fit: bool) -> SampleFile:
    from PIL import Image, ImageOps

    from backdoorlab.data.images import to_array

    channels, height, width = form.shape
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.size != (width, height) and not fit:
            raise InputError(
                f"{path}: is {upright.width}x{upright.height} pixels, the model takes {width}x{height} "
                f"(width x height); pass --resize to rescale it"
            )
        pixels = to_array(upright, channels, height, width)
    return SampleFile(path, torch.from_numpy(pixels.copy())[None])


def _read_sound(path: Path, form: SampleFormat, fit: bool) -> SampleFile:
    import soundfile

    data, rate = soundfile.read(path, dtype="int16", always_2d=True)
    expected = f"the model takes mono sound at {form.sample_rate} Hz"
    if data.shape[1] != 1 or rate != form.sample_rate:
        given = f"{data.shape[1]} channel{'s' * (data.shape[1] != 1)} at {rate} Hz"
        raise InputError(f"{path}: has {given}, {expected}; convert it first")
    sound = torch.from_numpy(data[:, 0].copy())
    if len(sound) != form.shape[0]:
        if not fit:
            raise InputError(
                f"{path}: has {len(sound)} samples ({len(sound) / rate:.2f} s), the model takes {form.shape[0]} "
                f"({form.shape[0] / rate:.2f} s); pass --resize to pad it with silence or cut it"
            )
        padded = torch.zeros(form.shape[0], dtype=torch.int16)
        keep = min(len(sound), len(padded))
        padded[:keep] = sound[:keep]
        sound = padded
    return SampleFile(path, sound[None])


def _read_text(path: Path, form: SampleFormat, fit: bool) -> SampleFile:
    raw = path.read_bytes().decode()
    text = raw.rstrip("\r\n")
    if not text.strip():
        raise InputError(f"{path}: the text is empty")
    return SampleFile(path, text_array([text]), ending=raw[len(text) :])


def _read_array(path: Path, form: SampleFormat, fit: bool) -> SampleFile:
    array = np.load(path, allow_pickle=False)
    wanted = str(form.dtype).removeprefix("torch.")
    batched = array.ndim == len(form.shape) + 1
    if array.dtype.name != wanted or tuple(array.shape[batched:]) != form.shape or not array.size:
        shape = ", ".join(map(str, form.shape))
        raise InputError(
            f"{path}: is a {array.dtype} array of shape {list(array.shape)}; "
            f"expected {wanted} of shape [{shape}] (one sample) or [N, {shape}]"
        )
    return SampleFile(path, torch.from_numpy(array if batched else array[None]), batched)


_READERS: dict[str, Callable[[Path, SampleFormat, bool], SampleFile]] = {
    ".png": _read_image, ".jpg": _read_image, ".jpeg": _read_image, ".bmp": _read_image,
    ".wav": _read_sound, ".txt": _read_text, ".npy": _read_array,
}  # fmt: skip


def _short(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
