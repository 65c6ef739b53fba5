"""Sound files: the only functions that decode them, and many of them as one int16 tensor.

WAV and FLAC, recognised by content, whatever the file is called. What amplitudes become, wherever they are read:
16 bits are kept, 8 bits moved up by 8, 24 and 32 bits lose their low ones; floating point (32 or 64 bits) is clipped to
-1..1 and scaled by 32,767. NaN, infinity and amplitudes beyond :data:`MAX_AMPLITUDE` are refused: a file that stores
16-bit numbers as floats would otherwise become square waves.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from backdoorlab.core.errors import InputError
from backdoorlab.core.memory import expect_memory
from backdoorlab.core.paths import exists, is_file, printable, reason

MAX_AMPLITUDE = 4.0
"""Of floating-point sound (12 dB over full scale), before it is clipped to 1."""
RATES = (1_000, 768_000)
"""Sampling rates that are accepted in a file's header, in Hz."""
MAX_SAMPLES = 1 << 28
"""Length that is accepted in a file's header (1.5 hours at 48 kHz)."""

_MAGIC = (b"RIFF", b"RIFX", b"RF64", b"fLaC")
_FORMATS = ("WAV", "WAVEX", "RF64", "FLAC")


def sound_form(path: Path) -> tuple[int, int, int]:
    """Sampling rate, number of channels and of samples per channel; only the header is read.

    Raises:
        InputError: if the file is missing, no WAV or FLAC, damaged, or holds no samples.
    """
    with _opened(path) as file:
        return file.samplerate, file.channels, file.frames


def read_sound(path: Path, length: int | None = None) -> tuple[np.ndarray, int]:
    """Samples of a mono file, int16 [L], and its sampling rate.

    Args:
        path: WAV or FLAC.
        length: decode at most so many samples; None decodes all.

    Raises:
        InputError: as :func:`sound_form`; for several channels, a file that ends early, and for NaN, infinite or far
            too large amplitudes.
    """
    label = printable(path)
    with _opened(path) as file:
        _expect_mono(path, file.channels)
        rate = file.samplerate
        count = file.frames if length is None else min(length, file.frames)
        # libsndfile reads floating-point files as integers without scaling, so that is done here.
        floating = file.subtype in ("FLOAT", "DOUBLE")
        try:
            clip = file.read(count, dtype="float32" if floating else "int16")
        except Exception as error:  # a damaged file may make the decoder raise nearly anything
            raise InputError(f"cannot read audio file {label}: {reason(error)}") from error
    if len(clip) < count:
        raise InputError(f"{label} is truncated: it holds {len(clip)} of the {count} samples that it should")
    if floating:
        peak = float(np.abs(clip).max())
        if not np.isfinite(peak):
            raise InputError(f"{label} holds amplitudes that are not numbers (NaN or infinite)")
        if peak > MAX_AMPLITUDE:
            raise InputError(
                f"{label} holds amplitudes up to {peak:g}; floating-point sound lies between -1 and 1: scale it first"
            )
        clip = np.rint(np.clip(clip, -1, 1) * 32767).astype(np.int16)
    return clip, rate


def common_rate(paths: Sequence[Path]) -> tuple[int, list[int]]:
    """Sampling rate that all files share, and their lengths in samples; only headers are read.

    Raises:
        InputError: naming a file that cannot be read, has several channels, or two whose rates differ.
    """
    rate, lengths = 0, []
    for path in paths:
        file_rate, channels, frames = sound_form(path)
        _expect_mono(path, channels)
        if rate and file_rate != rate:
            raise InputError(
                f"all clips must have one sampling rate, but {printable(paths[0])} has {rate} Hz and {printable(path)} "
                f"{file_rate} Hz; resample, for example: ffmpeg -i {printable(path.name)} -ar {rate} out.wav"
            )
        rate = file_rate
        lengths.append(frames)
    return rate, lengths


def read_clips(paths: Sequence[Path], length: int) -> Tensor:
    """Decode clips, cut or zero-pad each at its end to ``length`` samples: int16 [N, length].

    Raises:
        InputError: naming a file that cannot be decoded, or if all together do not fit into memory.
    """
    expect_memory((len(paths), length), 2, "the clips")
    out = np.zeros((len(paths), length), np.int16)
    for row, path in zip(out, paths, strict=True):
        clip, _ = read_sound(path, length)
        row[: len(clip)] = clip
    return torch.from_numpy(out)


def _expect_mono(path: Path, channels: int) -> None:
    if channels != 1:
        raise InputError(
            f"{printable(path)} has {channels} channels, expected mono; mix it down first, for example: "
            f"ffmpeg -i {printable(path.name)} -ac 1 mono.wav"
        )


def _opened(path: Path) -> soundfile.SoundFile:
    label = printable(path)
    if not is_file(path):
        raise InputError(
            f"cannot read audio file {label}: it is no file" if exists(path) else f"found no audio file {label}"
        )
    try:
        with path.open("rb") as raw:
            magic = raw.read(4)
        if magic not in _MAGIC:
            raise InputError(f"cannot read audio file {label}: it is neither WAV nor FLAC")
        file = soundfile.SoundFile(path)
    except InputError:
        raise
    except Exception as error:  # a damaged file may make the decoder raise nearly anything
        raise InputError(f"cannot read audio file {label}: {reason(error)}") from error
    wrong = ""
    if file.format not in _FORMATS:
        wrong = f"cannot read audio file {label}: it is {file.format}, neither WAV nor FLAC"
    elif file.frames <= 0:
        wrong = f"{label} holds no samples"
    elif file.frames > MAX_SAMPLES:
        wrong = f"{label} says it holds {file.frames:,} samples; at most {MAX_SAMPLES:,} are read"
    elif not RATES[0] <= file.samplerate <= RATES[1]:
        wrong = f"{label} says it has {file.samplerate} samples per second; expected {RATES[0]:,} to {RATES[1]:,}"
    if wrong:
        file.close()
        raise InputError(wrong)
    return file
