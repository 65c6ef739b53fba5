"""The one door for pictures: which formats, how large, and what becomes of unusual pixels."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from backdoorlab.attacks.common.pictures import read_folder, read_picture
from backdoorlab.core.errors import DataWarning, InputError
from backdoorlab.data import load_dataset
from backdoorlab.data import pictures as door
from backdoorlab.data.files import SampleFormat, read_samples
from backdoorlab.data.images import read_images
from backdoorlab.data.pictures import MAX_PIXELS, open_picture, picture_form, without_remarks

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 12 16\n%%EndComments\nshowpage\n%%EOF\n"


def _png_that_says(width: int, height: int) -> bytes:
    """A PNG of which only the header is large."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def _doors(path: Path) -> list[object]:
    """What every door makes of one 12x16 grey file, or raises."""
    form = SampleFormat("image", (1, 16, 12))
    return [
        read_images([path], 1, 16, 12)[0, 0],
        read_samples(path, form).inputs[0, 0],
        read_picture(str(path), 1, 16, 12)[0],
        torch.from_numpy(np.array(open_picture(path.read_bytes()).convert("L"))),
    ]


def test_postscript_under_the_name_of_a_picture_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.png").write_bytes(EPS)
    started: list[object] = []
    monkeypatch.setattr(subprocess, "check_call", lambda *args, **kwargs: started.append(args))
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: started.append(args))
    for use in (
        lambda: picture_form(tmp_path / "a.png"),
        lambda: read_images([tmp_path / "a.png"], 1, 8, 8),
        lambda: read_picture(str(tmp_path / "a.png"), 1, 8, 8),
        lambda: read_samples(tmp_path / "a.png", SampleFormat("image", (1, 8, 8)), fit=True),
    ):
        with pytest.raises(InputError, match="none of the known formats"):
            use()
    assert not started


def test_no_other_module_opens_pictures():
    source = Path(door.__file__).parents[1]
    opening = [p.name for p in source.rglob("*.py") if "Image.open(" in p.read_text(encoding="utf-8")]
    assert opening == ["pictures.py"]


@pytest.mark.parametrize("size", [(20_000, 20_000), (2**31 - 1, 2**31 - 1), (MAX_PIXELS + 1, 1)])
def test_giant_pictures_are_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size):
    def decode(self: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    (tmp_path / "a.png").write_bytes(_png_that_says(*size))
    for use in (
        lambda: read_images([tmp_path / "a.png"], 1, 8, 8),
        lambda: read_picture(str(tmp_path / "a.png"), 1, 8, 8),
        lambda: read_samples(tmp_path / "a.png", SampleFormat("image", (1, 8, 8)), fit=True),
    ):
        with pytest.raises(InputError, match=r"a\.png says it .*64,000,000.*scale it down"), warnings.catch_warnings():
            warnings.simplefilter("error")
            use()


def test_a_header_that_promises_more_than_there_is(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(_png_that_says(4000, 4000))
    with pytest.raises(InputError, match=r"cannot read image .*a\.png"):
        open_picture(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "gif", "webp", "tiff", "ppm"])
def test_truncated_and_mutated_files_are_input_errors(tmp_path: Path, suffix: str):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (16, 12, 3), dtype=np.uint8)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(pixels).save(path, exif=_sideways()) if suffix in ("png", "jpg") else Image.fromarray(pixels).save(
        path
    )
    whole = path.read_bytes()
    open_picture(whole)
    for _ in range(60):
        broken = bytearray(whole[: rng.integers(1, len(whole) + 1)])
        for place in rng.integers(0, len(broken), 3):
            broken[place] = rng.integers(256)
        try:
            with without_remarks():
                open_picture(bytes(broken), "x")
                picture_form(bytes(broken), "x")
        except InputError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    "error", [MemoryError, IndexError, RecursionError, SyntaxError, EOFError, struct.error, zlib.error, KeyError]
)
def test_whatever_a_decoder_raises_is_an_input_error(monkeypatch: pytest.MonkeyPatch, error: type[Exception]):
    content = io.BytesIO()
    Image.new("L", (4, 4)).save(content, "PNG")

    def fail(self: object) -> None:
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(InputError, match="cannot read image x"):
        open_picture(content.getvalue(), "x")


def test_sixteen_bit_grey_is_scaled_at_every_door(tmp_path: Path):
    deep = (np.arange(16 * 12, dtype=np.uint32) * 65_535 // (16 * 12 - 1)).astype(np.uint16).reshape(16, 12)
    expected = torch.from_numpy(np.rint(deep / 257).astype(np.uint8))
    for name in ("a.png", "a.pgm", "a.tiff"):
        Image.fromarray(deep).save(tmp_path / name)
    for got in _doors(tmp_path / "a.png"):
        assert torch.equal(got, expected)
    for name in ("a.pgm", "a.tiff"):
        assert torch.equal(read_picture(str(tmp_path / name), 1, 16, 12)[0], expected)
    assert picture_form(tmp_path / "a.png") == (True, 16, 12)


@pytest.mark.parametrize(("kind", "dtype"), [("F", np.float32), ("I", np.int32)])
def test_pixels_without_a_stated_white_are_refused(tmp_path: Path, kind: str, dtype: type):
    Image.fromarray(np.full((16, 12), 7, dtype)).save(tmp_path / "a.tiff")
    for use in (lambda: picture_form(tmp_path / "a.tiff"), lambda: read_picture(str(tmp_path / "a.tiff"), 1, 16, 12)):
        with pytest.raises(InputError, match=rf"which value is white in its pixel format \({kind}\).*convert"):
            use()


@pytest.mark.parametrize(("bits", "photometric"), [(12, 1), (16, 0)])
def test_tiffs_of_twelve_bits_or_with_white_as_zero_are_refused(tmp_path: Path, bits: int, photometric: int):
    Image.fromarray(np.zeros((16, 12), np.uint16)).save(tmp_path / "a.tiff", tiffinfo={262: photometric})
    content = bytearray((tmp_path / "a.tiff").read_bytes())
    if bits == 12:
        place = content.index(struct.pack("<HHI", 258, 3, 1))
        content[place + 8] = 12
    with pytest.raises(InputError):
        open_picture(bytes(content))


def _sideways() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_orientation_is_obeyed_at_every_door(tmp_path: Path):
    stored = np.arange(12 * 16, dtype=np.uint8).reshape(12, 16)
    Image.fromarray(stored).save(tmp_path / "a.png", exif=_sideways())
    expected = torch.from_numpy(np.rot90(stored, -1).copy())
    for got in _doors(tmp_path / "a.png"):
        assert torch.equal(got, expected)
    deep = stored.astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "b.png", exif=_sideways())
    for got in _doors(tmp_path / "b.png"):
        assert torch.equal(got, expected)


def test_transparency_is_dropped_and_palettes_are_looked_up(tmp_path: Path):
    color = np.zeros((16, 12, 4), np.uint8)
    color[..., 0], color[:8, :, 3] = 200, 255
    Image.fromarray(color).save(tmp_path / "rgba.png")
    palette = Image.fromarray(color[..., :3]).quantize(4)
    palette.save(tmp_path / "p.png", transparency=bytes([0, 128]))
    Image.fromarray(color[..., :3]).convert("CMYK").save(tmp_path / "cmyk.tiff")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("rgba.png", "p.png", "cmyk.tiff"):
            got = read_picture(str(tmp_path / name), 3, 16, 12)
            assert torch.equal(got, torch.tensor([200, 0, 0], dtype=torch.uint8).reshape(3, 1, 1).expand(3, 16, 12))


def test_grey_with_alpha_of_sixteen_bits_keeps_its_brightness():
    """Pillow cannot write such a file, so it is put together here."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    row = b"\0" + struct.pack(">4H", 0x8000, 0xFFFF, 0xFFFF, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 4, 0, 0, 0))
    content += chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    assert np.asarray(open_picture(content).convert("L")).tolist() == [[0x80, 0xFF]]


def test_missing_files_folders_and_pipes_are_named(tmp_path: Path):
    with pytest.raises(InputError, match="found no image file"):
        open_picture(tmp_path / "none.png")
    with pytest.raises(InputError, match="is no file"):
        open_picture(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="is no file"):
        open_picture(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="File name too long"):
        open_picture(tmp_path / ("x" * 300))
    with pytest.raises(InputError, match="no user 'nouser'"):
        read_picture("~nouser/x.png", 1, 8, 8)


def test_folders_of_pictures_skip_hidden_files_and_name_dangling_links(tmp_path: Path):
    Image.new("L", (8, 8), 9).save(tmp_path / "a.png")
    (tmp_path / "._a.png").write_bytes(b"\0\5\26\7")
    assert read_folder(str(tmp_path), 1, 8, 8).shape == (1, 1, 8, 8)
    (tmp_path / "b.png").symlink_to("nowhere.png")
    with pytest.raises(InputError, match=r"b\.png is a link that leads nowhere"):
        read_folder(str(tmp_path), 1, 8, 8)


def _folder(base: Path, side: int) -> str:
    for name in ("a", "b"):
        (base / name).mkdir()
        for i in range(2):
            Image.new("L", (side, side), i).save(base / name / f"{i}.png")
    return f"folder:{base}"


def test_large_pictures_of_one_size_come_with_a_warning_of_the_cost(tmp_path: Path):
    name = _folder(tmp_path, 200)
    with pytest.warns(DataWarning, match=r"all 4 pictures are 200x200 .* 39 times the work of 32x32.*--size"):
        assert load_dataset(name).train.inputs.shape[1:] == (1, 200, 200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_dataset(name, size=64)


def test_sizes_that_no_memory_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name = _folder(tmp_path, 16)
    for dataset in ("digits", name):
        with pytest.raises(InputError, match="size must be at most 4096 pixels, got 1000000"):
            load_dataset(dataset, size=1_000_000)
    monkeypatch.setattr("backdoorlab.core.memory.memory", lambda: 1 << 20)
    for dataset in ("digits", "shapes", "moving_digits", name):
        with pytest.raises(InputError, match="GiB of memory; use a smaller size"):
            load_dataset(dataset, size=2048)
