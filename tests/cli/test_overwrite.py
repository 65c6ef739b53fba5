"""Nothing that a user has is overwritten unasked, and a disk that is full leaves no half-written file behind."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import backdoorlab.data.files as files


@pytest.fixture
def digit(tmp_path: Path) -> Path:
    Image.new("L", (16, 16)).save(tmp_path / "digit.png")
    return tmp_path / "digit.png"


def test_stamp_replaces_only_with_force(cli: Callable[..., Any], lab: Any, digit: Path, tmp_path: Path) -> None:
    place = tmp_path / "out"
    place.mkdir()
    (place / "digit.png").write_text("a holiday photo")
    (place / "other.png").write_text("another")
    argv = ("stamp", digit, "--run", lab.attack, "--out", place, "--store", lab.store)
    reply = cli(*argv)
    assert (reply.code, (place / "digit.png").read_text()) == (2, "a holiday photo")
    assert f"{place / 'digit.png'} exists; choose another folder, or pass --force" in " ".join(reply.err.split())
    assert cli(*argv, "--force").code == 0
    with Image.open(place / "digit.png") as image:
        assert image.size == (16, 16)
    assert (place / "other.png").read_text() == "another"
    assert sorted(p.name for p in place.iterdir()) == ["digit.png", "other.png"]


def test_stamp_replaces_neither_folders_nor_what_links_point_to(
    cli: Callable[..., Any], lab: Any, digit: Path, tmp_path: Path
) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "digit.png").symlink_to(tmp_path / "precious")
    (tmp_path / "folders" / "digit.png").mkdir(parents=True)
    (tmp_path / "nowhere").mkdir()
    (tmp_path / "nowhere" / "digit.png").symlink_to(tmp_path / "gone")
    argv = ("stamp", digit, "--run", lab.attack, "--store", lab.store, "--out")
    for name in ("links", "folders", "nowhere"):
        assert cli(*argv, tmp_path / name).code == 2
    assert cli(*argv, tmp_path / "folders", "--force").code == 2
    assert cli(*argv, tmp_path / "links", "--force").code == 0
    assert (tmp_path / "precious").read_text() == "precious"
    assert not (tmp_path / "gone").exists()


def test_figure_replaces_only_with_force(cli: Callable[..., Any], lab: Any, tmp_path: Path) -> None:
    figure = tmp_path / "photo.png"
    figure.write_text("a holiday photo")
    argv = ("show", lab.attack, "--figure", figure, "--samples", "1", "--store", lab.store)
    assert (cli(*argv).code, figure.read_text()) == (2, "a holiday photo")
    assert cli(*argv, "--force").code == 0
    with Image.open(figure) as image:
        assert image.size[0] > 300


class Full:
    """A file on a disk that takes some bytes and then is full."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def write(self, content: bytes) -> int:
        self.stream.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("command", ["stamp", "show", "quickstart"])
def test_a_full_disk(
    cli: Callable[..., Any],
    lab: Any,
    digit: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    place = tmp_path / "out"
    place.mkdir()
    old = place / {"stamp": "digit.png", "show": "a.png", "quickstart": "quickstart.png"}[command]
    old.write_text("old")
    argv: dict[str, tuple[Any, ...]] = {
        "stamp": ("stamp", digit, "--run", lab.attack, "--out", place, "--store", lab.store, "--force"),
        "show": ("show", lab.attack, "--figure", old, "--samples", "1", "--store", lab.store, "--force"),
        "quickstart": ("quickstart", "--defenses", "strip", "--out", place, "--store", tmp_path / "s"),
    }
    plain = os.fdopen
    monkeypatch.setattr(
        files.os, "fdopen", lambda fd, *how, **more: plain(fd, *how, **more) if more else Full(plain(fd, *how))
    )
    reply = cli(*argv[command])
    assert reply.code == 2, reply.err
    assert reply.err.splitlines()[-1] == f"error: cannot write {old}: No space left on device"
    assert "bug" not in reply.err
    assert [p.name for p in place.iterdir()] == [old.name]
    assert old.read_text() == "old"


def test_any_other_refusal_of_the_system_is_one_line(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import backdoorlab.benchmark.runner as runner

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "x"))

    monkeypatch.setattr(runner.Runner, "run", full)
    reply = cli("attack", "badnets", "--store", tmp_path / "s")
    assert (reply.code, reply.err) == (2, f"error: {tmp_path / 'x'}: No space left on device\n")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind this user")
@pytest.mark.parametrize("option", ["--store", "--out", "--figure"])
def test_a_folder_without_permission(cli: Callable[..., Any], lab: Any, tmp_path: Path, option: str) -> None:
    shut = tmp_path / "shut"
    shut.mkdir(mode=0o500)
    argv: dict[str, tuple[Any, ...]] = {
        "--store": ("attack", "badnets", "--store", shut / "s"),
        "--out": ("quickstart", "--out", shut / "q", "--store", tmp_path / "s"),
        "--figure": ("show", lab.attack, "--figure", shut / "a.png", "--store", lab.store),
    }
    reply = cli(*argv[option])
    assert reply.code == 2
    assert str(shut) in reply.err
    assert not list(tmp_path.glob("s/*/*")), "found before work begins"
