"""Sample files: what is read is what is written, and what does not fit is refused with the reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from backdoorlab.core.errors import InputError
from backdoorlab.data.files import (
    SampleFormat,
    find_samples,
    join_samples,
    output_names,
    read_samples,
    write_atomically,
    write_samples,
)

GREY, COLOR = SampleFormat("image", (1, 16, 12)), SampleFormat("image", (3, 16, 12))
SOUND, TEXT = SampleFormat("audio", (800,), 8000), SampleFormat("text")


@pytest.mark.parametrize("suffix", [".png", ".bmp"])
@pytest.mark.parametrize("form", [GREY, COLOR])
def test_images_round_trip_bit_for_bit(tmp_path: Path, suffix: str, form: SampleFormat) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 12, form.shape[0]), dtype=np.uint8)
    Image.fromarray(pixels[..., 0] if form.shape[0] == 1 else pixels).save(tmp_path / f"a{suffix}")
    file = read_samples(tmp_path / f"a{suffix}", form)
    assert torch.equal(file.inputs, torch.from_numpy(pixels).permute(2, 0, 1)[None])  # type: ignore[arg-type]
    write_samples(tmp_path / f"out/b{suffix}", file, file.inputs, form)
    assert np.array_equal(np.array(Image.open(tmp_path / f"out/b{suffix}")).reshape(pixels.shape), pixels)


def test_image_of_another_size_needs_consent(tmp_path: Path) -> None:
    Image.new("L", (30, 20)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"is 30x20 pixels, the model takes 12x16 .* --resize"):
        read_samples(tmp_path / "a.png", GREY)
    assert read_samples(tmp_path / "a.png", GREY, fit=True).inputs.shape == (1, 1, 16, 12)


def test_sixteen_bit_images_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((16, 12), 40000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="not 8-bit"):
        read_samples(tmp_path / "a.png", GREY)


def test_sound_round_trips_bit_for_bit(tmp_path: Path) -> None:
    wave = np.random.default_rng(0).integers(-32768, 32768, 800).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", wave, 8000, subtype="PCM_16")
    file = read_samples(tmp_path / "a.wav", SOUND)
    write_samples(tmp_path / "b.wav", file, file.inputs, SOUND)
    again, rate = soundfile.read(tmp_path / "b.wav", dtype="int16")
    assert rate == 8000
    assert np.array_equal(again, wave)


@pytest.mark.parametrize(("channels", "rate"), [(2, 8000), (1, 44100), (2, 44100)])
def test_stereo_or_another_rate_names_both(tmp_path: Path, channels: int, rate: int) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros((800, channels), np.int16), rate)
    with pytest.raises(InputError, match=rf"{channels} channels? at {rate} Hz, the model takes mono sound at 8000 Hz"):
        read_samples(tmp_path / "a.wav", SOUND, fit=True)


@pytest.mark.parametrize("length", [100, 900])
def test_sound_of_another_length_needs_consent(tmp_path: Path, length: int) -> None:
    soundfile.write(tmp_path / "a.wav", np.full(length, 7, np.int16), 8000)
    with pytest.raises(InputError, match=f"has {length} samples .* takes 800"):
        read_samples(tmp_path / "a.wav", SOUND)
    fitted = read_samples(tmp_path / "a.wav", SOUND, fit=True).inputs
    assert fitted.shape == (1, 800)
    assert int((fitted != 0).sum()) == min(length, 800)  # type: ignore[union-attr]


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_a_text_file_is_one_sample_and_keeps_its_ending(tmp_path: Path, ending: str) -> None:
    (tmp_path / "a.txt").write_bytes(f"two lines\nof text{ending}".encode())
    file = read_samples(tmp_path / "a.txt", TEXT)
    assert list(file.inputs) == ["two lines\nof text"]
    write_samples(tmp_path / "b.txt", file, file.inputs, TEXT)
    assert (tmp_path / "b.txt").read_bytes() == (tmp_path / "a.txt").read_bytes()


@pytest.mark.parametrize(("content", "match"), [(b"", "empty"), (b"\xff\xfe\x00", "not a readable txt")])
def test_bad_text(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(InputError, match=match):
        read_samples(tmp_path / "a.txt", TEXT)


def test_arrays_keep_their_batch_axis(tmp_path: Path) -> None:
    form = SampleFormat("video", (4, 3, 8, 8))
    clip = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8), dtype=np.uint8)
    for name, array in (("one", clip), ("two", np.stack([clip, clip]))):
        np.save(tmp_path / f"{name}.npy", array)
        file = read_samples(tmp_path / f"{name}.npy", form)
        write_samples(tmp_path / f"{name}-out.npy", file, file.inputs, form)
        assert np.array_equal(np.load(tmp_path / f"{name}-out.npy"), array)
    files = [read_samples(tmp_path / f"{name}.npy", form) for name in ("one", "two")]
    assert len(join_samples(files)) == 3


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="not a readable npy"):
        read_samples(tmp_path / "a.npy", GREY)


def test_tables_of_texts_are_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n")
    with pytest.raises(InputError, match="One txt file is one sample"):
        find_samples([tmp_path / "a.csv"], "text")


def test_names_of_outputs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert output_names([tmp_path / "a.jpg", tmp_path / "b.bmp"], out) == [out / "a.png", out / "b.bmp"]
    with pytest.raises(InputError, match="both be written"):
        output_names([tmp_path / "a.jpg", tmp_path / "a.png"], out)
    with pytest.raises(InputError, match="never overwritten"):
        output_names([out / "a.png"], out)


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "a.png", b"content")
    assert list(tmp_path.iterdir()) == []
