"""The one door for sound: every sample format is scaled, damaged files are refused, at each place that reads sound."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from backdoorlab.core.errors import InputError
from backdoorlab.data import load_dataset
from backdoorlab.data.audio import read_clips, read_sound, sound_form
from backdoorlab.data.files import SampleFormat, read_samples

FORM = SampleFormat("audio", (800,), 8000)
SUBTYPES = ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE")
TONE = 0.7 * np.sin(np.arange(800) * 0.2)


@pytest.mark.parametrize("subtype", SUBTYPES)
def test_every_sample_format_is_the_same_sound_at_every_door(tmp_path: Path, subtype: str):
    path = tmp_path / "a.wav"
    soundfile.write(path, TONE, 8000, subtype=subtype)
    expected = torch.from_numpy(np.rint(TONE * 32767)).float()
    within = 260 if subtype == "PCM_U8" else 2
    direct = torch.from_numpy(read_sound(path)[0])
    for got in (direct, read_samples(path, FORM).inputs[0], read_clips([path], 800)[0]):
        assert got.dtype == torch.int16 and torch.equal(got, direct)
        assert float((got.float() - expected).abs().max()) <= within


@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "not numbers"),
        (np.inf, "not numbers"),
        (-np.inf, "not numbers"),
        (20_000.0, "up to 20000; .* scale it"),
    ],
)
def test_amplitudes_without_meaning_are_refused(tmp_path: Path, subtype: str, value: float, message: str):
    wave = TONE.copy()
    wave[5] = value
    path = tmp_path / "a.wav"
    soundfile.write(path, wave, 8000, subtype=subtype)
    for use in (lambda: read_sound(path), lambda: read_samples(path, FORM), lambda: read_clips([path], 800)):
        with pytest.raises(InputError, match=message):
            use()


def test_slight_overshoot_is_clipped(tmp_path: Path):
    soundfile.write(tmp_path / "a.wav", np.array([1.5, -1.5, 0.5]), 8000, subtype="FLOAT")
    assert read_sound(tmp_path / "a.wav")[0].tolist() == [32767, -32767, 16384]


@pytest.mark.parametrize("subtype", SUBTYPES)
def test_sound_without_samples_is_refused(tmp_path: Path, subtype: str):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(0), 8000, subtype=subtype)
    for use in (lambda: sound_form(path), lambda: read_samples(path, FORM, fit=True), lambda: read_clips([path], 800)):
        with pytest.raises(InputError, match="holds no samples"):
            use()


@pytest.mark.parametrize("rate", [0, 1, 7, 4_000_000_000])
def test_absurd_rates_are_refused(tmp_path: Path, rate: int):
    path = tmp_path / "a.wav"
    soundfile.write(path, TONE, 8000, subtype="PCM_16")
    content = bytearray(path.read_bytes())
    content[24:28] = struct.pack("<I", rate)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.wav"):
        sound_form(path)


def test_odd_rates_stay_usable(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(2):
            soundfile.write(tmp_path / name / f"{i}.wav", TONE, 11_025)
    assert load_dataset(f"folder:{tmp_path}").sample_rate == 11_025


def test_other_formats_under_the_name_of_a_wav_file_are_refused(tmp_path: Path):
    soundfile.write(tmp_path / "a.aiff", TONE, 8000)
    (tmp_path / "a.aiff").rename(tmp_path / "a.wav")
    with pytest.raises(InputError, match="neither WAV nor FLAC"):
        read_samples(tmp_path / "a.wav", FORM)
    with pytest.raises(InputError, match="is no file"):
        read_sound(tmp_path)
    with pytest.raises(InputError, match="found no audio file"):
        read_sound(tmp_path / "none.wav")


def test_a_truncated_flac_file_is_refused(tmp_path: Path):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 40_000)
    soundfile.write(tmp_path / "a.flac", noise, 8000)
    content = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"a\.flac"):
        read_sound(tmp_path / "a.flac")


@pytest.mark.parametrize(("suffix", "subtype"), [("wav", "PCM_16"), ("wav", "FLOAT"), ("flac", "PCM_16")])
def test_mutated_files_are_read_or_refused(tmp_path: Path, suffix: str, subtype: str):
    rng = np.random.default_rng(0)
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, TONE, 8000, subtype=subtype)
    whole = path.read_bytes()
    for _ in range(100):
        broken = bytearray(whole[: rng.integers(1, len(whole) + 1)])
        for place in rng.integers(0, min(60, len(broken)), 3):
            broken[place] = rng.integers(256)
        path.write_bytes(broken)
        for use in (lambda: read_sound(path), lambda: read_clips([path], 800)):
            try:
                use()
            except InputError as error:
                assert "\n" not in str(error)


def test_clips_that_no_memory_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    soundfile.write(tmp_path / "a.wav", TONE, 8000)
    monkeypatch.setattr("backdoorlab.core.memory.memory", lambda: 1000)
    with pytest.raises(InputError, match=r"the clips \(1 of 800 values\) would take"):
        read_clips([tmp_path / "a.wav"], 800)
