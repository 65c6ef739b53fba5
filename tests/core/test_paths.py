"""Paths that users write: every refusal of the system is one line, nothing is left out in silence."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from backdoorlab.attacks.image.refool import Refool
from backdoorlab.core import paths
from backdoorlab.core.errors import InputError


def _denied(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    """Let the system refuse to list a folder; the superuser, as whom tests may run, is never refused."""
    listdir = os.listdir

    def refuse(path: object) -> list[str]:
        if Path(str(path)) == place:
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(os, "listdir", refuse)


def test_home_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.user_path("~/x") == tmp_path / "x"
    with pytest.raises(InputError, match=r"no user 'nouser'; write '\./~nouser/x'"):
        paths.user_path("~nouser/x")
    with pytest.raises(InputError, match="NUL"):
        paths.user_path("a\0b")


@pytest.mark.parametrize("look", [paths.is_file, paths.is_folder, paths.exists])
def test_names_that_the_system_refuses(look, tmp_path: Path):
    with pytest.raises(InputError, match="File name too long"):
        look(tmp_path / ("x" * 300))
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(InputError, match="symbolic links"):
        look(tmp_path / "a")
    assert not look(tmp_path / "none" / "x")


def test_a_parent_that_may_not_be_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(self: Path, **_: object) -> os.stat_result:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(InputError, match=r"x\.csv cannot be used: Permission denied"):
        paths.is_file(tmp_path / "x.csv")


def test_files_below_a_folder(tmp_path: Path):
    for name in ("b/2.png", "b/deep/1.png", "a.png", ".hidden", ".cache/x.png"):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "o.png").write_text("")
    (tmp_path / "tree" / "linked").symlink_to(tmp_path / "other")
    names = [str(p.relative_to(tmp_path / "tree")) for p in paths.files_below(tmp_path / "tree")]
    assert names == ["a.png", "b/2.png", "b/deep/1.png", "linked/o.png"]
    every = paths.files_below(tmp_path / "tree", hidden=True)
    assert every == sorted(every) and len(every) == 6


def test_folders_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a" / "locked").mkdir(parents=True)
    (tmp_path / "a" / "x.png").write_text("")
    _denied(monkeypatch, tmp_path / "a" / "locked")
    with pytest.raises(InputError, match=r"folder .*locked cannot be read: Permission denied"):
        paths.files_below(tmp_path / "a")
    with pytest.raises(InputError, match=r"folder .*locked cannot be read: Permission denied"):
        paths.entries(tmp_path / "a" / "locked")


def test_links_that_lead_nowhere_or_back_and_pipes_are_named(tmp_path: Path):
    base = tmp_path / "a"
    base.mkdir()
    (base / "x.png").symlink_to("gone.png")
    for walk in (paths.files_below, paths.entries):
        with pytest.raises(InputError, match=r"x\.png is a link that leads nowhere"):
            walk(base)
    (base / "x.png").unlink()
    (base / "again").symlink_to(tmp_path)
    with pytest.raises(InputError, match="again/a is a link back to a folder that holds it"):
        paths.files_below(base)
    (base / "again").unlink()
    os.mkfifo(base / "pipe.png")
    with pytest.raises(InputError, match=r"pipe\.png is neither a file nor a folder"):
        paths.files_below(base)


def test_content_is_read_up_to_a_limit(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"12345")
    assert paths.read_bytes(tmp_path / "a", 5) == b"12345"
    with pytest.raises(InputError, match="more than 4 bytes"):
        paths.read_bytes(tmp_path / "a", 4)
    with pytest.raises(InputError, match="there is no file"):
        paths.read_bytes(tmp_path / "b")
    with pytest.raises(InputError, match="is no file"):
        paths.read_bytes(tmp_path)


def test_names_with_line_breaks_or_of_other_bytes_print_on_one_line():
    assert paths.printable("a/é.png") == "a/é.png"
    for name in ("a\nb", "a\x1b[31m", os.fsdecode(b"a\xff")):
        assert paths.printable(name).isprintable() and paths.printable(name).isascii()


def test_the_digest_of_a_folder_leaves_nothing_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.png").write_bytes(b"1")
    method = Refool(reflections=str(tmp_path))
    before = method.file_digests()["reflections"]
    (tmp_path / "sub" / "x.png").write_bytes(b"2")
    assert method.file_digests()["reflections"] != before
    _denied(monkeypatch, tmp_path / "sub")
    with pytest.raises(InputError, match="cannot be read: Permission denied"):
        method.file_digests()
