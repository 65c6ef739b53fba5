"""Folders of sound clips and the spoken digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from backdoorlab.core.errors import ArtifactError, InputError
from backdoorlab.data import load_dataset
from backdoorlab.data.fsdd import Fsdd
from backdoorlab.data.sources import DatasetSpec


def _write(path: Path, value: float, length: int, rate: int = 8000, channels: int = 1, subtype: str = "PCM_16") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full((length, channels), value), rate, subtype=subtype)


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Two classes, ten clips each, of 101 to 110 samples."""
    for name in ("no", "yes"):
        for i in range(10):
            _write(tmp_path / name / f"{i}.wav", 0.5, 101 + i)
    return tmp_path


def test_clips_get_one_length_and_keep_their_values(clips: Path):
    data = load_dataset(f"folder:{clips}")
    assert data.modality == "audio" and data.sample_rate == 8000 and data.train.inputs.dtype == torch.int16
    lengths = [101 + i for i in range(10)] * 2
    assert data.train.inputs.shape == (16, int(np.ceil(np.percentile(lengths, 95))))
    both = torch.cat([data.train.inputs, data.test.inputs])
    assert set(both.unique().tolist()) == {0, 16384}
    expected = sorted(min(n, both.shape[1]) for n in lengths)
    assert sorted((both != 0).sum(1).tolist()) == expected, "padded at the end, cut at the end"


def test_floating_point_and_flac_files_are_scaled(tmp_path: Path):
    for name in ("a", "b"):
        _write(tmp_path / name / "0.wav", 0.5, 50, subtype="FLOAT")
        _write(tmp_path / name / "1.flac", 0.5, 50)
        _write(tmp_path / name / "2.wav", 0.5, 50, subtype="PCM_24")
    data = load_dataset(f"folder:{tmp_path}")
    both = torch.cat([data.train.inputs, data.test.inputs])
    assert ((both - 16384).abs() <= 1).all()


def test_a_stereo_file_is_named_with_a_remedy(clips: Path):
    _write(clips / "yes" / "wide.wav", 0.1, 50, channels=2)
    with pytest.raises(InputError, match=r"wide\.wav has 2 channels, expected mono.*ffmpeg"):
        load_dataset(f"folder:{clips}")


def test_two_sampling_rates_are_both_named(clips: Path):
    _write(clips / "yes" / "hifi.wav", 0.1, 50, rate=44_100)
    with pytest.raises(InputError, match=r"0\.wav has 8000 Hz and .*hifi\.wav 44100 Hz"):
        load_dataset(f"folder:{clips}")


def test_damaged_and_empty_clips_are_named(clips: Path):
    path = clips / "yes" / "3.wav"
    path.write_bytes(b"RIFF")
    with pytest.raises(InputError, match=r"cannot read audio file .*3\.wav"):
        load_dataset(f"folder:{clips}")
    _write(path, 0.0, 0)
    with pytest.raises(InputError, match=r"3\.wav holds no samples"):
        load_dataset(f"folder:{clips}")


def test_images_and_audio_do_not_mix(clips: Path):
    Image.new("L", (8, 8)).save(clips / "no" / "cover.png")
    with pytest.raises(InputError, match=r"mixes images and audio, for example .*cover\.png and .*\.wav"):
        load_dataset(f"folder:{clips}")


def test_clips_have_no_size(clips: Path):
    with pytest.raises(InputError, match="is audio and cannot be rescaled"):
        load_dataset(f"folder:{clips}", size=16)


def test_foreign_recordings_are_refused(tmp_path: Path):
    _write(tmp_path / "fsdd" / "recordings" / "0_me_0.wav", 0.1, 50)
    with pytest.raises(ArtifactError, match="its 1 clips are not the 3,000 published ones"):
        Fsdd().load(DatasetSpec(name="fsdd"), "", (tmp_path,), False)


@pytest.mark.realdata
def test_real_fsdd_has_the_official_split(data_root: Path):
    data = load_dataset("fsdd", root=data_root)
    assert data.train.inputs.shape == (2700, 8000) and data.test.inputs.shape == (300, 8000)
    assert torch.bincount(data.train.labels).tolist() == [270] * 10 and data.sample_rate == 8000
    wave, _ = soundfile.read(data_root / "fsdd/recordings/3_george_0.wav", dtype="int16")
    rows = (data.test.inputs[:, : len(wave)] == torch.from_numpy(wave)).all(1).nonzero().flatten()
    assert data.test.labels[rows].tolist() == [3]
