"""CIFAR's batches: the checksum comes first, and the unpickler knows nothing but arrays."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tarfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from backdoorlab.core.errors import ArtifactError, InputError
from backdoorlab.data.cifar import ArrayUnpickler, Cifar, Cifar10, read_batch
from backdoorlab.data.sources import DatasetSpec
from backdoorlab.data.split import Split

PIXELS = np.random.default_rng(0).integers(0, 256, (30, 3072), dtype=np.uint8)


@pytest.fixture
def tiny(tmp_path: Path) -> type[Cifar]:
    """A source in CIFAR's format with 20 + 10 images, on disk and as an archive."""
    folder = tmp_path / "archive" / "mini"
    folder.mkdir(parents=True)
    labels = [i % 2 for i in range(10)]
    content = {f"batch_{i}": {"data": PIXELS[10 * i : 10 * i + 10], "labels": labels} for i in range(3)}
    content["meta"] = {"label_names": ["cat", "dog"]}
    digests = {}
    for name, batch in content.items():
        data = pickle.dumps(batch, protocol=4)
        (folder / name).write_bytes(data)
        digests[name] = hashlib.md5(data).hexdigest()
    archive = tmp_path / "mini.tar.gz"
    with tarfile.open(archive, "w:gz") as pack:
        pack.add(folder, "mini")

    class Mini(Cifar):
        name = "mini"
        summary = "a miniature"
        folder = "mini"
        download_url = archive.as_uri()
        archive_md5 = hashlib.md5(archive.read_bytes()).hexdigest()
        train_files: ClassVar[dict[str, str]] = {k: digests[k] for k in ("batch_0", "batch_1")}
        test_files: ClassVar[dict[str, str]] = {"batch_2": digests["batch_2"]}
        meta = ("meta", digests["meta"], "label_names")
        label_key = "labels"
        mean, std = (0.5,) * 3, (0.25,) * 3

    return Mini


def test_batches_become_one_tensor(tmp_path: Path, tiny: type[Cifar]):
    data = tiny().load(DatasetSpec(name="mini"), "", (tmp_path / "archive",), False)
    assert torch.equal(data.train.inputs, torch.from_numpy(PIXELS[:20]).reshape(20, 3, 32, 32))
    assert torch.equal(data.test.inputs, torch.from_numpy(PIXELS[20:]).reshape(10, 3, 32, 32))
    assert data.train.labels.tolist() == [0, 1] * 10 and data.train.classes == ("cat", "dog") and data.flip


def test_size_rescales(tmp_path: Path, tiny: type[Cifar]):
    data = tiny().load(DatasetSpec(name="mini", size=16), "", (tmp_path / "archive",), False)
    assert data.train.inputs.shape == (20, 3, 16, 16)
    # An antialiased halving keeps the mean grey level.
    assert (data.train.inputs.float().mean() - float(PIXELS[:20].mean())).abs() < 1


def test_download_happens_only_when_asked(tmp_path: Path, tiny: type[Cifar]):
    roots = (tmp_path / "empty", tmp_path / "cache")
    with pytest.raises(InputError, match="Pass --download"):
        tiny().load(DatasetSpec(name="mini"), "", roots, False)
    assert not (tmp_path / "cache").exists()
    data = tiny().load(DatasetSpec(name="mini"), "", roots, True)
    assert len(data.train) == 20 and (tmp_path / "cache/mini/meta").is_file()


def test_a_tampered_batch_is_refused_before_it_is_opened(tmp_path: Path, tiny: type[Cifar]):
    path = tmp_path / "archive/mini/batch_1"
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"batch_1: its md5 is .* It is not opened"):
        tiny().load(DatasetSpec(name="mini"), "", (tmp_path / "archive",), False)


def test_a_missing_batch_is_named(tmp_path: Path, tiny: type[Cifar]):
    (tmp_path / "archive/mini/batch_0").unlink()
    with pytest.raises(InputError, match=r"cannot read .*batch_0"):
        tiny().load(DatasetSpec(name="mini"), "", (tmp_path / "archive",), False)


class Evil:
    """Runs a command when unpickled."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, exec, getattr, __import__, np.load])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_malicious_pickle_is_refused_even_if_its_checksum_matches(tmp_path: Path, function, protocol: int):
    flag = tmp_path / "owned"
    data = pickle.dumps({"data": Evil(function, f"touch {flag}")}, protocol=protocol)
    path = tmp_path / "batch"
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="refused to unpickle"):
        read_batch(path, hashlib.md5(data).hexdigest())
    assert not flag.exists()


def test_the_unpickler_reads_arrays_of_either_numpy(tmp_path: Path):
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    data = pickle.dumps(array, protocol=3)
    old = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert old != data, "numpy 2 is expected to write its new module name"
    for form in (data, old):
        assert np.array_equal(ArrayUnpickler(io.BytesIO(form), encoding="latin1").load(), array)


@pytest.mark.realdata
def test_real_cifar10_equals_what_torchvision_reads(data_root: Path):
    import torchvision

    data = Cifar10().load(DatasetSpec(name="cifar10"), "", (data_root,), False)
    for train, split in ((True, data.train), (False, data.test)):
        other = torchvision.datasets.CIFAR10(str(data_root), train=train)
        assert isinstance(split, Split)
        assert np.array_equal(other.data.transpose(0, 3, 1, 2), split.inputs.numpy())
        assert other.targets == split.labels.tolist() and tuple(other.classes) == split.classes
