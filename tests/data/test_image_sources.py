"""Class folders, GTSRB and Tiny ImageNet, on miniature trees."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from backdoorlab.core.errors import DataWarning, InputError
from backdoorlab.data import images as images_module
from backdoorlab.data import load_dataset
from backdoorlab.data.gtsrb import Gtsrb
from backdoorlab.data.images import resize
from backdoorlab.data.sources import DatasetSpec
from backdoorlab.data.tiny_imagenet import TinyImageNet


def _save(path: Path, value: int | tuple[int, int, int], size: tuple[int, int] = (12, 12)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if isinstance(value, int) else "RGB", size, value).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of ten RGB images each, 12x12; the red channel counts the images."""
    for k, name in enumerate(("cat", "dog")):
        for i in range(10):
            _save(tmp_path / name / f"{i:02d}.png", (20 * k + i, 100, 200))
    return tmp_path


def test_a_folder_is_split_per_class(photos: Path):
    data = load_dataset(f"folder:{photos}")
    assert data.modality == "image" and data.train.classes == ("cat", "dog") and not data.flip
    assert data.train.inputs.shape == (16, 3, 12, 12) and data.train.inputs.dtype == torch.uint8
    assert torch.bincount(data.train.labels).tolist() == [8, 8] and torch.bincount(data.test.labels).tolist() == [2, 2]
    for split in (data.train, data.test):
        assert torch.equal(split.inputs[:, 0, 0, 0] // 20, split.labels.to(torch.uint8))
    assert not torch.equal(load_dataset(f"folder:{photos}", seed=1).test.inputs, data.test.inputs)
    assert torch.equal(load_dataset(f"folder:{photos}").test.inputs, data.test.inputs)


@pytest.mark.parametrize("held", ["test", "val"])
def test_given_parts_are_used(tmp_path: Path, held: str):
    for part, count in (("train", 3), (held, 2)):
        for name in ("a", "b"):
            for i in range(count):
                _save(tmp_path / part / name / f"{i}.png", i)
    data = load_dataset(f"folder:{tmp_path}")
    assert (len(data.train), len(data.test)) == (6, 4)
    assert data.train.inputs.shape[1:] == (1, 12, 12), "all files are grey"
    assert data.test.inputs[:, 0, 0, 0].tolist() == [0, 1, 0, 1]


def test_one_color_image_makes_all_rgb(photos: Path):
    _save(photos / "cat" / "grey.png", 77)
    data = load_dataset(f"folder:{photos}")
    both = torch.cat([data.train.inputs, data.test.inputs])
    assert both.shape[1] == 3 and (both == 77).all(dim=(1, 2, 3)).sum() == 1


def test_odd_sizes_become_32_unless_a_size_is_given(photos: Path):
    _save(photos / "cat" / "wide.png", (1, 2, 3), (40, 20))
    assert load_dataset(f"folder:{photos}").train.inputs.shape[1:] == (3, 32, 32)
    assert load_dataset(f"folder:{photos}", size=24).train.inputs.shape[1:] == (3, 24, 24)


def test_a_common_size_need_not_be_square(tmp_path: Path):
    for name in ("a", "b"):
        for i in range(2):
            _save(tmp_path / name / f"{i}.jpg", 50, (30, 20))
    assert load_dataset(f"folder:{tmp_path}").train.inputs.shape[1:] == (1, 20, 30)


def test_exif_orientation_is_applied(tmp_path: Path):
    for name in ("a", "b"):
        for i in range(2):
            image = Image.new("L", (30, 20), 0)
            exif = Image.Exif()
            exif[0x0112] = 6  # turn by 90 degrees
            (tmp_path / name).mkdir(exist_ok=True)
            image.save(tmp_path / name / f"{i}.jpg", exif=exif)
    assert load_dataset(f"folder:{tmp_path}").train.inputs.shape[1:] == (1, 30, 20)


def test_notes_and_hidden_files_are_skipped_but_unknown_kinds_are_not(photos: Path):
    (photos / "cat" / "readme.txt").write_text("hello")
    (photos / "cat" / ".DS_Store").write_bytes(b"\0")
    (photos / ".git").mkdir()
    assert len(load_dataset(f"folder:{photos}").train) == 16
    (photos / "cat" / "clip.gif").write_bytes(b"GIF89a")
    with pytest.raises(InputError, match=r"clip\.gif: unknown kind of file"):
        load_dataset(f"folder:{photos}")


def test_a_corrupt_image_is_named(photos: Path):
    path = photos / "dog" / "03.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match=r"cannot read image .*03\.png"):
        load_dataset(f"folder:{photos}")


def test_sixteen_bit_images_are_scaled(photos: Path):
    Image.fromarray(np.full((12, 12), 40_000, np.uint16)).save(photos / "dog" / "deep.png")
    data = load_dataset(f"folder:{photos}")
    both = torch.cat([data.train.inputs, data.test.inputs])
    assert (both == round(40_000 / 257)).flatten(1).all(1).sum() == 1


def test_hidden_folders_are_skipped_and_linked_ones_followed(photos: Path, tmp_path_factory: pytest.TempPathFactory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for i in range(5):
        _save(elsewhere / f"{i}.png", (1, 2, 3))
    _save(photos / "cat" / ".ipynb_checkpoints" / "0.png", (4, 5, 6))
    _save(photos / "cat" / "._0.png", (4, 5, 6))
    (photos / "dog" / "more").symlink_to(elsewhere)
    data = load_dataset(f"folder:{photos}")
    assert torch.cat([data.train.labels, data.test.labels]).bincount().tolist() == [10, 15]


def test_what_cannot_be_read_is_named(photos: Path, monkeypatch: pytest.MonkeyPatch):
    link = photos / "cat" / "gone.png"
    link.symlink_to("nowhere.png")
    with pytest.raises(InputError, match=r"gone\.png is a link that leads nowhere"):
        load_dataset(f"folder:{photos}")
    link.unlink()
    (photos / "cat" / "loop").symlink_to(photos / "cat")
    with pytest.raises(InputError, match="loop is a link back to a folder"):
        load_dataset(f"folder:{photos}")
    (photos / "cat" / "loop").unlink()
    (photos / "cat" / "locked").mkdir()
    listdir = os.listdir

    def refuse(path: str | Path) -> list[str]:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(InputError, match="locked cannot be read: Permission denied"):
        load_dataset(f"folder:{photos}")


def test_pictures_beside_the_class_folders_are_told_of(photos: Path):
    _save(photos / "stray.png", (0, 0, 0))
    with pytest.warns(DataWarning, match=r"1 file\(s\) beside the class folders .*stray\.png"):
        assert len(load_dataset(f"folder:{photos}").train) == 16


def test_class_names_may_hold_line_breaks_but_must_be_text(photos: Path):
    (photos / "dog").rename(photos / "do\ng\x1b[31m")
    data = load_dataset(f"folder:{photos}")
    assert data.train.classes == ("cat", "do\ng\x1b[31m") and len(data.train) == 16
    (photos / "cat").rename(photos / os.fsdecode(b"c\xff"))
    with pytest.raises(InputError, match=r"class folder .*udcff.* is not UTF-8; rename it"):
        load_dataset(f"folder:{photos}")


@pytest.mark.parametrize("name", ["folder:~nouser/x", "folder:" + "x" * 300, "csv:~nouser/x", "csv:" + "x" * 300])
def test_paths_that_the_system_refuses(name: str):
    with pytest.raises(InputError, match=r"no user 'nouser'|File name too long"):
        load_dataset(name)
    with pytest.raises(InputError, match="no user 'nouser'"):
        load_dataset("cifar10", root="~nouser/data")


def test_bad_trees_are_named(tmp_path: Path):
    with pytest.raises(InputError, match="there is no folder"):
        load_dataset(f"folder:{tmp_path}/none")
    with pytest.raises(InputError, match="has no class folders"):
        load_dataset(f"folder:{tmp_path}")
    _save(tmp_path / "a" / "x.png", 0)
    (tmp_path / "b").mkdir()
    with pytest.raises(InputError, match=r"class folder .*b holds no"):
        load_dataset(f"folder:{tmp_path}")


def test_parts_must_come_in_pairs_and_agree(tmp_path: Path):
    for name in ("a", "b"):
        _save(tmp_path / "train" / name / "x.png", 0)
    with pytest.raises(InputError, match="'train' but no test nor val"):
        load_dataset(f"folder:{tmp_path}")
    _save(tmp_path / "test" / "a" / "x.png", 0)
    with pytest.raises(InputError, match=r"same class folders; only one has \['b'\]"):
        load_dataset(f"folder:{tmp_path}")


def test_resize_halves_exactly(monkeypatch: pytest.MonkeyPatch):
    images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    images[:, :, :, 4:] = 200
    assert resize(images, 8) is images and resize(images, None) is images
    monkeypatch.setattr(images_module, "_CHUNK", 2 * 64)
    half = resize(images, 2)
    assert half.shape == (3, 1, 2, 2) and half.dtype == torch.uint8
    assert (half[..., 0] < 50).all() and (half[..., 1] > 150).all()


# GTSRB ----------------------------------------------------------------------------------------------------------------

HEAD = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"


@pytest.fixture
def signs(tmp_path: Path) -> Path:
    """Two training images and one test image for each of the 43 classes."""
    base = tmp_path / "gtsrb"
    tested = HEAD
    for k in range(43):
        folder, rows = base / "GTSRB" / "Training" / f"{k:05d}", HEAD
        for i in range(2):
            _save(folder / f"{i:05d}_00009.ppm", (k, i, 9), (20 + i, 25))
            rows += f"{i:05d}_00009.ppm;20;25;1;1;9;9;{k}\n"
        (folder / f"GT-{k:05d}.csv").write_text(rows)
        _save(base / "GTSRB" / "Final_Test" / "Images" / f"{k:05d}.ppm", (k, 7, 9))
        tested += f"{k:05d}.ppm;20;25;1;1;9;9;{k}\n"
    (base / "GT-final_test.csv").write_text(tested)
    return tmp_path


def test_gtsrb_reads_annotated_images(signs: Path):
    data = Gtsrb().load(DatasetSpec(name="gtsrb"), "", (signs,), False)
    assert data.train.inputs.shape == (86, 3, 32, 32) and data.test.inputs.shape == (43, 3, 32, 32)
    assert torch.equal(data.train.inputs[:, 0, 5, 5].long(), data.train.labels)
    assert torch.equal(data.test.inputs[:, 0, 5, 5].long(), data.test.labels)
    assert len(set(data.train.classes)) == 43 and data.train.classes[14] == "stop" and not data.flip
    assert "86 of 26640" in data.note
    assert Gtsrb().load(DatasetSpec(name="gtsrb", size=48), "", (signs,), False).test.inputs.shape[-1] == 48


def test_gtsrb_names_what_is_missing(signs: Path):
    folder = signs / "gtsrb" / "GTSRB" / "Training" / "00007"
    (folder / "00001_00009.ppm").unlink()
    with pytest.raises(InputError, match=r"GT-00007\.csv lists .*00001_00009\.ppm, which does not exist"):
        Gtsrb().load(DatasetSpec(name="gtsrb"), "", (signs,), False)
    (folder / "GT-00007.csv").unlink()
    with pytest.raises(InputError, match=r"annotation file .*GT-00007\.csv is missing"):
        Gtsrb().load(DatasetSpec(name="gtsrb"), "", (signs,), False)


def test_gtsrb_refuses_foreign_annotations(signs: Path):
    path = signs / "gtsrb" / "GTSRB" / "Training" / "00003" / "GT-00003.csv"
    path.write_text(path.read_text().replace(";3\n", ";4\n"))
    with pytest.raises(InputError, match="must list images of class 3"):
        Gtsrb().load(DatasetSpec(name="gtsrb"), "", (signs,), False)
    path.write_text(path.read_text().replace(";", ","))
    with pytest.raises(InputError, match="expected columns Filename and ClassId"):
        Gtsrb().load(DatasetSpec(name="gtsrb"), "", (signs,), False)


# Tiny ImageNet --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Three classes, two training images each, one of them grey; two of the classes share a name."""
    base = tmp_path / "tiny-imagenet-200"
    wnids = ("n03", "n01", "n02")
    for wnid in wnids:
        _save(base / "train" / wnid / "images" / f"{wnid}_0.JPEG", (60 * int(wnid[-1]), 90, 90), (64, 64))
        _save(base / "train" / wnid / "images" / f"{wnid}_1.JPEG", 60 * int(wnid[-1]), (64, 64))
    notes = ""
    for i, wnid in enumerate(wnids):
        _save(base / "val" / "images" / f"val_{i}.JPEG", (60 * int(wnid[-1]), 90, 90), (64, 64))
        notes += f"val_{i}.JPEG\t{wnid}\t0\t0\t62\t62\n"
    (base / "val" / "val_annotations.txt").write_text(notes)
    (base / "wnids.txt").write_text("\n".join(wnids) + "\n")
    (base / "words.txt").write_text("n00\tunused\nn01\tcrane, machine\nn02\tcrane, bird\nn03\tgoldfish\n")
    return tmp_path


def test_tiny_imagenet_reads_its_layout(tiny: Path):
    data = TinyImageNet().load(DatasetSpec(name="tiny_imagenet"), "", (tiny,), False)
    assert data.train.classes == ("crane (n01)", "crane (n02)", "goldfish") and data.flip
    assert data.train.inputs.shape == (6, 3, 64, 64) and data.test.inputs.shape == (3, 3, 64, 64)
    assert data.train.labels.tolist() == [0, 0, 1, 1, 2, 2] and data.test.labels.tolist() == [2, 0, 1]
    red = data.test.inputs[:, 0, 30, 30].float()
    assert (red - 60 * (data.test.labels + 1)).abs().max() < 6, "JPEG moves grey levels a little"
    assert TinyImageNet().load(DatasetSpec(name="t", size=32), "", (tiny,), False).train.inputs.shape[-1] == 32


def test_tiny_imagenet_names_what_is_missing(tiny: Path):
    (tiny / "tiny-imagenet-200/val/images/val_1.JPEG").unlink()
    with pytest.raises(InputError, match=r"no such image or class in line 'val_1\.JPEG"):
        TinyImageNet().load(DatasetSpec(name="t"), "", (tiny,), False)
    (tiny / "tiny-imagenet-200/words.txt").unlink()
    with pytest.raises(InputError, match=r"words\.txt is missing"):
        TinyImageNet().load(DatasetSpec(name="t"), "", (tiny,), False)
