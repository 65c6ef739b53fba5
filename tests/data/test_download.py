"""Downloads are whole or absent, and archives cannot write outside their folder. Uses file: URLs, no network."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from backdoorlab.core.errors import ArtifactError, InputError
from backdoorlab.data.download import Remote, fetch, fetch_file, unpack


def _md5(path: Path) -> str:
    return f"md5:{hashlib.md5(path.read_bytes()).hexdigest()}"


def _tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as pack:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            pack.addfile(info, io.BytesIO(data))
    return path


def _zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as pack:
        for name, data in members.items():
            pack.writestr(name, data)
    return path


@pytest.mark.parametrize("make", [_tar, _zip])
def test_fetch_unpacks_a_verified_archive(tmp_path: Path, make):
    archive = make(tmp_path / "set.archive", {"set/a/x.txt": b"hello", "set/y.txt": b"there"})
    root = tmp_path / "root"
    fetch(root, "set", (Remote(archive.as_uri(), _md5(archive)),))
    assert (root / "set/a/x.txt").read_bytes() == b"hello"
    assert {p.name for p in root.iterdir()} <= {"set", ".set.lock"}, "scratch files were left behind"


def test_fetch_puts_several_files_together(tmp_path: Path):
    first = _zip(tmp_path / "a.zip", {"inner/x": b"1"})
    plain = tmp_path / "labels.csv"
    plain.write_bytes(b"2")
    remotes = (Remote(first.as_uri(), _md5(first), "set"), Remote(plain.as_uri(), _md5(plain), "set", unpack=False))
    fetch(tmp_path / "root", "set", remotes)
    assert (tmp_path / "root/set/inner/x").read_bytes() == b"1"
    assert (tmp_path / "root/set/labels.csv").read_bytes() == b"2"


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_a_wrong_digest_leaves_nothing(tmp_path: Path, kind: str):
    archive = _tar(tmp_path / "set.tar.gz", {"set/x": b"evil"})
    root = tmp_path / "root"
    with pytest.raises(ArtifactError, match=f"the {kind} of what arrived is"):
        fetch(root, "set", (Remote(archive.as_uri(), f"{kind}:{'0' * 32}"),))
    assert {p.name for p in root.iterdir()} <= {".set.lock"}


def test_an_archive_without_the_expected_folder_is_an_error(tmp_path: Path):
    archive = _tar(tmp_path / "set.tar.gz", {"other/x": b""})
    with pytest.raises(ArtifactError, match="holds no folder 'set'"):
        fetch(tmp_path / "root", "set", (Remote(archive.as_uri(), _md5(archive)),))
    assert not (tmp_path / "root/set").exists()


def test_what_is_there_is_not_fetched_again(tmp_path: Path):
    (tmp_path / "set").mkdir()
    fetch(tmp_path, "set", (Remote("file:///does/not/exist", "md5:0"),))


def test_an_unreachable_url_is_an_input_error(tmp_path: Path):
    with pytest.raises(InputError, match="cannot download file:///does/not/exist"):
        fetch_file("file:///does/not/exist", "md5:0", tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make", [_tar, _zip])
@pytest.mark.parametrize("name", ["../escaped", "/tmp/backdoorlab-escaped", "set/../../escaped"])
def test_paths_that_lead_out_are_refused(tmp_path: Path, make, name: str):
    archive = make(tmp_path / "evil", {name: b"x"})
    target = tmp_path / "deep" / "target"
    target.mkdir(parents=True)
    try:
        unpack(archive, target)
    except ArtifactError:
        pass
    else:  # tarfile's filter strips a leading slash instead of refusing; then the file must be inside
        assert name.startswith("/") and (target / name.lstrip("/")).is_file()
    assert not (tmp_path / "deep" / "escaped").exists() and not (tmp_path / "escaped").exists()
    assert not Path("/tmp/backdoorlab-escaped").exists()


def test_a_link_that_leads_out_is_refused(tmp_path: Path):
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w") as pack:
        info = tarfile.TarInfo("link")
        info.type, info.linkname = tarfile.SYMTYPE, "../../secret"
        pack.addfile(info)
    (tmp_path / "target").mkdir()
    with pytest.raises(ArtifactError, match="cannot be unpacked"):
        unpack(path, tmp_path / "target")


def test_a_file_that_is_no_archive_is_an_error(tmp_path: Path):
    path = tmp_path / "page.tar.gz"
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(ArtifactError, match="cannot be unpacked"):
        unpack(path, tmp_path)
