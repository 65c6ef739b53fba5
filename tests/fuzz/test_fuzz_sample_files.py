"""Damaged png, jpg, bmp, npy, wav and txt files through ``predict`` and ``stamp``."""

from __future__ import annotations

import io
import struct
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz_tools import byte_changes, call, change_bytes, expect_result_or_one_line, fuzzed, mended_png
from hypothesis import strategies as st
from PIL import Image

SIDE, RATE = 16, 8000


def picture(form: str, mode: str = "L") -> bytes:
    out = io.BytesIO()
    pixels = np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE)
    Image.fromarray(pixels).convert(mode).save(out, form)
    return out.getvalue()


def array(value: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, value)
    return out.getvalue()


def sound() -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(b"\1\2" * 4000)
    return out.getvalue()


IMAGES = {
    ".png": [picture("PNG"), picture("PNG", "RGBA"), picture("PNG", "P")],
    ".jpg": [picture("JPEG"), picture("JPEG", "RGB")],
    ".bmp": [picture("BMP"), picture("BMP", "RGB")],
    ".npy": [array(np.zeros((1, SIDE, SIDE), np.uint8)), array(np.zeros((3, 1, SIDE, SIDE), np.uint8))],
}
SOUNDS = {".wav": [sound()], ".npy": [array(np.zeros(8000, np.int16)), array(np.zeros((2, 4000), np.int16))]}
TEXTS = {".txt": [b"a good film\n", "überraschend gut\r\n".encode(), b"\xff\xfe"]}
EVERYTHING = [content for table in (IMAGES, SOUNDS, TEXTS) for contents in table.values() for content in contents]

case = st.tuples(
    st.sampled_from(("predict", "stamp")), st.booleans(), st.integers(0, 2**16 - 1), byte_changes, st.integers(0, 9)
)


def through(lab: Any, folder: Path, run: str, table: dict[str, list[bytes]], drawn: Any) -> None:
    """One damaged file, sometimes under the suffix of another format, through one of the two commands."""
    command, fit, number, changes, odd = drawn
    suffix = list(table)[number % len(table)]
    content = table[suffix][number // 7 % len(table[suffix])]
    if odd == 0:
        content = EVERYTHING[number % len(EVERYTHING)]
    changed = change_bytes(content, changes)
    if suffix == ".png" and odd < 6:
        changed = mended_png(changed)
    path = folder / f"x{suffix}"
    path.write_bytes(changed)
    out = folder / "out"
    more = ("--out", out, "--force") if command == "stamp" else ()
    reply = call(command, path, "--run", run, *more, *(["--resize"] if fit else []), "--store", lab.store)
    expect_result_or_one_line(reply)
    if command == "stamp":
        written = sorted(p.name for p in out.iterdir()) if out.exists() else []
        assert len(written) == (reply.code == 0), f"{written} after exit code {reply.code}"
        for name in written:
            (out / name).unlink()


@fuzzed(case, quick=70)
def test_pictures_and_arrays(lab: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, drawn: Any) -> None:
    """An image model gets pictures."""
    through(lab, folder, lab.image, IMAGES, drawn)


@fuzzed(case, quick=40)
def test_sounds(lab: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, drawn: Any) -> None:
    """An audio model gets sounds."""
    through(lab, folder, lab.audio, SOUNDS, drawn)


@fuzzed(case, quick=20)
def test_texts(lab: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, drawn: Any) -> None:
    """A text model gets text files."""
    through(lab, folder, lab.text, TEXTS, drawn)


SHAPES = (
    "()",
    "(0,)",
    "(-1,)",
    "(16,)",
    "(1, 16, 16)",
    "(0, 1, 16, 16)",
    "(2**62,)",
    "(1, 2**40, 2**40)",
    "(99999999999999999999,)",
    "(True, 16, 16)",
    "(1.5,)",
    "'x'",
    "None",
    "(1,) * 70",
)
TYPES = (
    "|u1",
    "<i2",
    ">i2",
    "|b1",
    "|O",
    "<f8",
    "<c16",
    "<U5",
    "|S5",
    "<M8[s]",
    "|V8",
    "xx",
    "<i999",
    "(2,)<i2",
    "[('a', 'u1')]",
)


@fuzzed(
    st.tuples(st.sampled_from(SHAPES), st.sampled_from(TYPES), st.booleans(), st.integers(0, 2000), st.integers(0, 4)),
    quick=40,
)
def test_headers_of_arrays(lab: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, drawn: Any) -> None:
    """Headers of npy files that promise what the file does not hold, or what no array can be."""
    shape, kind, fortran, size, version = drawn
    quoted = kind if kind.startswith("[") else repr(kind)
    header = f"{{'descr': {quoted}, 'fortran_order': {fortran}, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    start = {0: b"\x01\x00", 1: b"\x02\x00", 2: b"\x03\x00", 3: b"\x09\x00", 4: b"\x01\x00"}[version]
    length = struct.pack("<H" if start == b"\x01\x00" else "<I", len(header))
    path = folder / "x.npy"
    path.write_bytes(b"\x93NUMPY" + start + length + header + b"\1" * size)
    expect_result_or_one_line(call("predict", path, "--run", lab.image, "--store", lab.store))
