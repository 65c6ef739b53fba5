"""Sample files: what is read is what is written, and what does not fit is refused with the reason."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from backdoorlab.core.errors import InputError
from backdoorlab.data.files import (
    MAX_TEXT,
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


def test_sixteen_bit_images_are_scaled(tmp_path: Path) -> None:
    Image.fromarray(np.full((16, 12), 40000, np.uint16)).save(tmp_path / "a.png")
    assert read_samples(tmp_path / "a.png", GREY).inputs.unique().tolist() == [round(40000 / 257)]


@pytest.mark.parametrize("content", [b"PK\x03\x04" + bytes(40), b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00\xff\xff{"])
def test_files_that_are_no_arrays(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.npy: not a readable npy file"):
        read_samples(tmp_path / "a.npy", GREY)


def test_a_zip_archive_under_the_name_of_an_array(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((1, 16, 12), np.uint8))
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    with pytest.raises(InputError, match="not a readable npy file"):
        read_samples(tmp_path / "a.npy", GREY)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999, 1, 16, 12), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999999999999999, 1, 16, 12), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (2, 1, 16, 12), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 1, 16, 12), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (0, 1, 16, 12), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1, 16, 12), }",
        "{'descr': [('a', '|u1')], 'fortran_order': False, 'shape': (1, 16, 12), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (True, 16, 12), }",
        "{'descr': '|u1', 'fortran_order': 7, 'shape': (1, 16, 12), }",
        "{'descr': '|u1'}",
        "[" * 3000,
        "\u00ff" * 50,
    ],
)
def test_lying_and_malformed_headers_of_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, header: str) -> None:
    coded = header.encode("latin1") + b"\n"
    content = b"\x93NUMPY\x01\x00" + len(coded).to_bytes(2, "little") + coded + bytes(1 * 16 * 12)
    (tmp_path / "a.npy").write_bytes(content)
    for name in ("empty", "zeros", "ndarray", "fromfile"):
        monkeypatch.setattr(np, name, lambda *_, **__: pytest.fail("allocated by the header's word"))
    with pytest.raises(InputError, match=r"a\.npy") as error:
        read_samples(tmp_path / "a.npy", GREY)
    assert "\n" not in str(error.value)


def test_arrays_of_either_order_of_bytes_and_axes(tmp_path: Path) -> None:
    wave = np.arange(-400, 400, dtype=np.int16)
    np.save(tmp_path / "a.npy", wave.astype(">i2"))
    assert read_samples(tmp_path / "a.npy", SOUND).inputs[0].tolist() == wave.tolist()
    pixels = np.arange(16 * 12, dtype=np.uint8).reshape(1, 16, 12)
    np.save(tmp_path / "b.npy", np.asfortranarray(pixels))
    assert np.array_equal(read_samples(tmp_path / "b.npy", GREY).inputs[0].numpy(), pixels)


def test_mutated_arrays_are_read_or_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "a.npy", np.zeros((2, 1, 16, 12), np.uint8))
    whole = (tmp_path / "a.npy").read_bytes()
    for _ in range(200):
        broken = bytearray(whole[: rng.integers(1, len(whole) + 1)])
        for place in rng.integers(0, min(128, len(broken)), 2):
            broken[place] = rng.integers(256)
        (tmp_path / "a.npy").write_bytes(broken)
        try:
            read_samples(tmp_path / "a.npy", GREY)
        except InputError as error:
            assert "\n" not in str(error)


def test_hidden_files_are_no_samples_and_dangling_links_are_named(tmp_path: Path) -> None:
    Image.new("L", (12, 16)).save(tmp_path / "a.png")
    (tmp_path / "._a.png").write_bytes(b"\0\5\26\7")
    assert find_samples([tmp_path], "image") == [tmp_path / "a.png"]
    (tmp_path / "b.png").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"b\.png is a link that leads nowhere"):
        find_samples([tmp_path], "image")


@pytest.mark.parametrize(("path", "match"), [("~nouser/x.png", "no user"), ("x" * 300 + ".png", "File name too long")])
def test_paths_that_the_system_refuses(path: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        find_samples([Path(path)], "image")


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    for name, form in (("a.png", GREY), ("a.txt", TEXT), ("a.npy", GREY), ("a.wav", SOUND)):
        os.mkfifo(tmp_path / name)
        with pytest.raises(InputError, match="is no file"):
            read_samples(tmp_path / name, form)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfgood film\r\n")
    file = read_samples(tmp_path / "a.txt", TEXT)
    assert list(file.inputs) == ["good film"]
    write_samples(tmp_path / "b.txt", file, file.inputs, TEXT)
    assert (tmp_path / "b.txt").read_bytes() == (tmp_path / "a.txt").read_bytes()


def test_texts_of_any_size_and_with_nul_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * (MAX_TEXT + 1))
    with pytest.raises(InputError, match="more than 10,000,000 bytes"):
        read_samples(tmp_path / "a.txt", TEXT)
    (tmp_path / "a.txt").write_bytes(b"a\0b")
    with pytest.raises(InputError, match="NUL characters"):
        read_samples(tmp_path / "a.txt", TEXT)


def test_names_of_the_longest_length_are_written(tmp_path: Path) -> None:
    write_atomically(tmp_path / ("x" * 251 + ".png"), b"content")
    with pytest.raises(InputError, match="File name too long"):
        write_atomically(tmp_path / ("x" * 300) / "a.png", b"content")


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
    with pytest.raises(InputError, match="No space left"):
        write_atomically(tmp_path / "a.png", b"content")
    assert list(tmp_path.iterdir()) == []
