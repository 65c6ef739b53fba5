"""Sound files as one int16 tensor: what the sources that read clips from disk share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from backdoorlab.core.errors import InputError


def common_rate(paths: Sequence[Path]) -> tuple[int, list[int]]:
    """Sampling rate that all files share, and their lengths in samples; only headers are read.

    Raises:
        InputError: naming a file that cannot be read, has several channels, or two whose rates differ.
    """
    rate, lengths = 0, []
    for path in paths:
        try:
            info = soundfile.info(path)
        except (soundfile.SoundFileError, OSError) as error:
            raise InputError(f"cannot read audio file {path}: {error}") from error
        if info.channels != 1:
            raise InputError(
                f"{path} has {info.channels} channels, expected mono; mix it down first, for example: "
                f"ffmpeg -i {path.name} -ac 1 mono.wav"
            )
        if not info.frames:
            raise InputError(f"{path} holds no samples")
        if rate and info.samplerate != rate:
            raise InputError(
                f"all clips must have one sampling rate, but {paths[0]} has {rate} Hz and {path} {info.samplerate} Hz; "
                f"resample, for example: ffmpeg -i {path.name} -ar {rate} out.wav"
            )
        rate = info.samplerate
        lengths.append(info.frames)
    return rate, lengths


def read_clips(paths: Sequence[Path], length: int) -> Tensor:
    """Decode clips, cut or zero-pad each at its end to ``length`` samples: int16 [N, length].

    Raises:
        InputError: naming a file that cannot be decoded.
    """
    out = np.zeros((len(paths), length), np.int16)
    for row, path in zip(out, paths, strict=True):
        try:
            with soundfile.SoundFile(path) as file:
                # libsndfile reads floating-point files as integers without scaling, so that is done here.
                if file.subtype in ("FLOAT", "DOUBLE"):
                    clip = np.rint(np.clip(file.read(length, dtype="float32"), -1, 1) * 32767).astype(np.int16)
                else:
                    clip = file.read(length, dtype="int16")
        except (soundfile.SoundFileError, OSError) as error:
            raise InputError(f"cannot read audio file {path}: {error}") from error
        row[: len(clip)] = clip
    return torch.from_numpy(out)
