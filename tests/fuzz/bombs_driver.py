"""Run by test_fuzz_bombs.py in a process of its own: ``python bombs_driver.py STORE IMAGE AUDIO TEXT FOLDER``.

Makes small files that stand for gigabytes, limits its own address space to two GiB more than the loaded library takes,
gives each file to a command, and prints what came of it as JSON: name -> [exit code, standard error].
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
import struct
import sys
import zlib
from pathlib import Path

from backdoorlab.cli.main import run

HUGE = 8 << 30


def call(*argv: object) -> list[object]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(a) for a in argv])
    return [code, err.getvalue()]


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(side: int, pixels: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def zeros(count: int) -> bytes:
    pack = zlib.compressobj(9)
    return b"".join(pack.compress(bytes(1 << 20)) for _ in range(count >> 20)) + pack.flush()


def npy(shape: str, kind: str) -> bytes:
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"\1" * 100


def wav(size: int, rate: int = 8000, channels: int = 1, bits: int = 16) -> bytes:
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * 2 % 2**32, 2, bits)
    body = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", size) + b"\1\2" * 100
    return b"RIFF" + struct.pack("<I", min(size + 36, 2**32 - 1)) + body


def bmp(side: int) -> bytes:
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0) + b"\1" * 46


def jpg(side: int) -> bytes:
    frame = struct.pack(">BHHB", 8, side, side, 1) + b"\1\x11\0"
    return b"\xff\xd8\xff\xc0" + struct.pack(">H", len(frame) + 2) + frame + b"\xff\xda\0\x08\1\1\0\0\x3f\0\xff\xd9"


def alias_bomb() -> bytes:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 20)]
    return "\n".join(lines).encode()


GRID = "tasks: [{{dataset: digits}}]\nattacks: [{}]\ndefenses: [ft]\nseeds: [{}]\n"


def limit(extra: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + extra,) * 2)


if __name__ == "__main__":
    store, image, audio, text, folder = sys.argv[1:]
    place = Path(folder)
    files = {
        "60000x60000.png": png(60_000, zlib.compress(b"\0" * 1000)),
        "30000x30000.png": png(30_000, zeros(64 << 20)),
        "9000x9000.png": png(9_000, zlib.compress(b"\0" * 1000)),
        "huge.bmp": bmp(2**31 - 1),
        "huge.jpg": jpg(65_500),
        "huge.npy": npy("(17179869184, 1, 16, 16)", "|u1"),
        "overflow.npy": npy("(2, 4611686018427387904)", "|u1"),
        "wide.npy": npy("(1, 16, 16)", "<U99999999"),
    }
    sounds = {
        "4gb.wav": wav(2**32 - 1),
        "fast.wav": wav(200, rate=2**32 - 1),
        "many.wav": wav(200, channels=65535),
        "deep.wav": wav(200, bits=65535),
    }
    grids = {
        "alias.yaml": alias_bomb(),
        "deep.yaml": b"[" * 200_000,
        "digits.yaml": b"seeds: [" + b"9" * 200_000 + b"]",
        "stages.yaml": GRID.format("badnets, " * 4000, "1, " * 4000).encode(),
    }
    for name, content in (files | sounds | grids).items():
        (place / name).write_bytes(content)
    sparse = [place / f"sparse{s}" for s in (".png", ".npy", ".wav", ".txt", ".yaml", ".csv")]
    copies = {}
    for name in ("card.json", "record.json", "model.safetensors"):
        copies[name] = place / f"store-{name}"
        shutil.copytree(store, copies[name])
        sparse.append(copies[name] / "attack" / image / name)
    for path in sparse:
        path.touch()
        os.truncate(path, HUGE)
    nested = place / "store-nested"
    shutil.copytree(store, nested)
    (nested / "attack" / image / "card.json").write_bytes(b'{"a":' * 1_000_000)

    assert call("predict", place / "9000x9000.png", "--run", image, "--store", store)[0] == 2  # all is loaded
    limit(2 << 30)
    found = {}
    for name in files:
        found[name] = call("predict", place / name, "--run", image, "--resize", "--store", store)
    for name in sounds:
        found[name] = call("predict", place / name, "--run", audio, "--store", store)
    for name in grids:
        found[name] = call("bench", place / name, "--store", store)
    for suffix, run_key in ((".png", image), (".npy", image), (".wav", audio), (".txt", text)):
        found[f"sparse{suffix}"] = call("predict", place / f"sparse{suffix}", "--run", run_key, "--store", store)
    found["sparse.yaml"] = call("bench", place / "sparse.yaml", "--store", store)
    found["sparse.csv"] = call("attack", "badnets", "--dataset", f"csv:{place / 'sparse.csv'}", "--store", store)
    for name, copy in copies.items():
        found[f"sparse {name}"] = call("predict", place / "x.png", "--run", image, "--store", copy)
    found["nested card"] = call("show", image, "--store", nested)
    print(json.dumps(found))
