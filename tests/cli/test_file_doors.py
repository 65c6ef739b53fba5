"""Files that lie, are giant or cannot be reached: exit code 2, one line, at every command that reads files."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from backdoorlab.attacks.common.pictures import read_picture

ATTACK = ("attack", "badnets")
LONG = "x" * 300


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("files")
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    (root / "giant.png").write_bytes(b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", b""))
    header = struct.pack(">IIBBBBB", 4_000, 4_000, 8, 0, 0, 0, 0)
    (root / "lying.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(bytes(99)))
    )
    (root / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n")
    np.savez(root / "zip.npz", x=np.zeros((1, 16, 16), np.uint8))
    (root / "zip.npz").rename(root / "zip.npy")
    coded = b"{'descr': '|u1', 'fortran_order': False, 'shape': (9999999999999, 1, 16, 16), }\n"
    (root / "huge.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(coded).to_bytes(2, "little") + coded)
    np.save(root / "objects.npy", np.array([{}]), allow_pickle=True)
    for part in ("dangling/a", "dangling/b", "bytes/a", "bytes/b"):
        (root / part).mkdir(parents=True)
        for i in range(2):
            Image.new("L", (16, 16), i).save(root / part / f"{i}.png")
    (root / "dangling/a/gone.png").symlink_to("nowhere.png")
    (root / "bytes/a").rename(root / "bytes" / os.fsdecode(b"\xff"))
    (root / "rare.csv").write_text("text,label\n" + "".join(f"word{i},{i % 2}\n" for i in range(20)))
    (root / "nul.csv").write_text("text,label\n" + "good\0film,1\nbad film,0\n" * 4)
    Image.fromarray(np.full((3, 3), 7, np.int32)).save(root / "whole.tiff")
    return root


CASES: dict[str, tuple[tuple[str, ...], str]] = {
    "giant picture": (("predict", "{giant.png}"), "64,000,000 pixels"),
    "lying picture": (("predict", "--resize", "{lying.png}"), "lying.png"),
    "postscript": (("predict", "{eps.png}"), "none of the known formats"),
    "zip called npy": (("predict", "{zip.npy}"), "not a readable npy file"),
    "huge npy": (("predict", "{huge.npy}"), "bytes of values"),
    "pickled npy": (("predict", "{objects.npy}"), "pickled objects, which are never read"),
    "dangling link": (("predict", "{dangling/a}"), "gone.png is a link that leads nowhere"),
    "unknown user": (("predict", "~nouser/x.png"), "no user 'nouser'"),
    "long path": (("predict", f"{LONG}.png"), "File name too long"),
    "stamp into an unknown user's folder": (("stamp", "{dangling/b/0.png}", "--out", "~nouser/x"), "no user 'nouser'"),
    "stamp into a long path": (("stamp", "{dangling/b/0.png}", "--out", LONG), "255 bytes"),
    "absurd size": ((*ATTACK, "--size", "1000000"), "size must be at most 4096"),
    "data of an unknown user": ((*ATTACK, "--dataset", "folder:~nouser/x"), "no user 'nouser'"),
    "root of an unknown user": ((*ATTACK, "--dataset", "cifar10", "--root", "~nouser/x"), "nouser"),
    "long data path": ((*ATTACK, "--dataset", f"csv:{LONG}"), "File name too long"),
    "data with a dangling link": ((*ATTACK, "--dataset", "folder:{dangling}"), "gone.png is a link"),
    "class that is not UTF-8": ((*ATTACK, "--dataset", "folder:{bytes}"), "is not UTF-8"),
    "rare words": ((*ATTACK, "--dataset", "csv:{rare.csv}"), "no word occurs twice in the training texts"),
    "NUL in a table": ((*ATTACK, "--dataset", "csv:{nul.csv}"), "line 2: holds a NUL"),
    "patch of an unknown user": ((*ATTACK, "--set", "patch=~nouser/x.png"), "no user 'nouser'"),
    "patch on a long path": ((*ATTACK, "--set", f"patch={LONG}"), "File name too long"),
    "patch that is postscript": ((*ATTACK, "--set", "patch={eps.png}"), "none of the known formats"),
    "patch that is giant": ((*ATTACK, "--set", "patch={giant.png}"), "64,000,000 pixels"),
    "patch of 32-bit numbers": ((*ATTACK, "--set", "patch={whole.tiff}"), "which value is white"),
}


@pytest.mark.parametrize("case", CASES)
def test_files_that_cannot_be_used(
    case: str, cli: Callable[..., Any], lab: Any, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argv, hint = CASES[case]
    words = [word.replace("{", f"{files}/").replace("}", "") for word in argv]
    store = ("--run", lab.attack, "--store", str(lab.store)) if argv[0] in ("predict", "stamp") else ("--store", "runs")
    reply = cli(*words, *store)
    assert reply.code == 2, f"{reply.code}: {reply.out}{reply.err}"
    lines = reply.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and hint in lines[0], reply.err
    assert not list(Path("runs").glob("attack/*")) and not list(tmp_path.glob("**/*.png"))


def test_the_cost_of_large_pictures_is_told_in_one_line(cli: Callable[..., Any], tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("L", (200, 200)).save(tmp_path / "data" / name / "0.png")
    reply = cli(*ATTACK, "--dataset", f"folder:{tmp_path / 'data'}", "--store", tmp_path / "runs")
    lines = reply.err.strip().splitlines()
    assert reply.code == 2 and len(lines) == 2, "each class needs two pictures"
    assert "all 2 pictures are 200x200 and are kept at that size" in lines[0]


def test_sixteen_bit_patches_are_not_white(tmp_path: Path) -> None:
    deep = np.array([[0, 20_000, 65_535]] * 3, np.uint16)
    Image.fromarray(deep).save(tmp_path / "patch.png")
    expected = torch.tensor([[0, 78, 255]] * 3, dtype=torch.uint8)
    assert torch.equal(read_picture(str(tmp_path / "patch.png"), 1, 3, 3)[0], expected)
