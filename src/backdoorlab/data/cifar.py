"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from the official python batches.

The batches are pickles, the only ones that this library ever reads: each file's bytes are compared with the published
md5 first, and the very same bytes then pass through an unpickler that knows three numpy names and nothing else.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from backdoorlab.core.errors import ArtifactError, InputError
from backdoorlab.data.download import Remote, find_or_fetch, verify
from backdoorlab.data.images import resize
from backdoorlab.data.sources import DatasetSource, DatasetSpec, datasets
from backdoorlab.data.split import Dataset, Split

# What numpy arrays pickle to, under numpy 1's (official files) and numpy 2's module names.
_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    ("numpy._core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
}


class ArrayUnpickler(pickle.Unpickler):
    """Reads containers, numbers, strings and numpy arrays; any other name in the pickle is an error."""

    def find_class(self, module: str, name: str) -> Any:
        """Look a global name up among the admitted ones."""
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise ArtifactError(f"refused to unpickle {module}.{name}: only numpy arrays are admitted") from None


def read_batch(path: Path, md5: str) -> dict[str, Any]:
    """One official batch, its bytes checked against the published md5 before they are interpreted.

    Raises:
        InputError: if the file is missing.
        ArtifactError: if it is not the published file.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; delete the folder and fetch it again") from None
    verify(data, f"md5:{md5}", path, "It is not opened: delete the folder and fetch the data set again")
    batch: dict[str, Any] = ArrayUnpickler(io.BytesIO(data), encoding="latin1").load()
    return batch


class Cifar(DatasetSource):
    """What CIFAR-10 and CIFAR-100 share: 32x32 RGB images, stored [N, 3072] in channel, row, column order."""

    modalities = ("image",)
    rescales = True

    folder: ClassVar[str]
    archive_md5: ClassVar[str]
    train_files: ClassVar[dict[str, str]]
    test_files: ClassVar[dict[str, str]]
    meta: ClassVar[tuple[str, str, str]]
    """File with the class names, its md5, the key of the list."""
    label_key: ClassVar[str]
    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]

    def load(self, spec: DatasetSpec, argument: str, roots: tuple[Path, ...], download: bool) -> Dataset:
        """See :meth:`DatasetSource.load`."""
        remote = Remote(self.download_url, f"md5:{self.archive_md5}")
        folder = find_or_fetch(roots, self.folder, self, (remote,), download)
        name, md5, key = self.meta
        classes = tuple(read_batch(folder / name, md5)[key])
        train, test = (self._split(folder, files, classes, spec.size) for files in (self.train_files, self.test_files))
        return Dataset(self.name, "image", train, test, flip=True, mean=self.mean, std=self.std)

    def _split(self, folder: Path, files: dict[str, str], classes: tuple[str, ...], size: int | None) -> Split:
        images, labels = np.empty((0, 3, 32, 32), np.uint8), []
        for i, (name, md5) in enumerate(files.items()):
            batch = read_batch(folder / name, md5)
            rows = len(batch["data"])  # the same in every file of a part
            if i == 0:
                images = np.empty((rows * len(files), 3, 32, 32), np.uint8)
            images[i * rows : (i + 1) * rows] = batch["data"].reshape(-1, 3, 32, 32)
            labels += batch[self.label_key]
        return Split(resize(torch.from_numpy(images), size), torch.tensor(labels), classes)


@datasets.register
class Cifar10(Cifar):
    """The 10-class set."""

    name = "cifar10"
    summary = "50,000 + 10,000 photographs, 10 classes, RGB, 32x32 (Krizhevsky 2009; no licence stated)"
    download_url = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    archive_md5 = "c58f30108f718f92721af3b95e74349a"
    folder = "cifar-10-batches-py"
    train_files: ClassVar[dict[str, str]] = {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    }
    test_files: ClassVar[dict[str, str]] = {"test_batch": "40351d587109b95175f43aff81a1287e"}
    meta = ("batches.meta", "5ff9c542aee3614f3951f8cda6e48888", "label_names")
    label_key = "labels"
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.247, 0.243, 0.261)


@datasets.register
class Cifar100(Cifar):
    """The 100-class set, fine labels."""

    name = "cifar100"
    summary = "50,000 + 10,000 photographs, 100 classes, RGB, 32x32 (Krizhevsky 2009; no licence stated)"
    download_url = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
    archive_md5 = "eb9058c3a382ffc7106e4002c42a8d85"
    folder = "cifar-100-python"
    train_files: ClassVar[dict[str, str]] = {"train": "16019d7e3df5f24257cddd939b257f8d"}
    test_files: ClassVar[dict[str, str]] = {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"}
    meta = ("meta", "7973b15100ade9c7d40fb424638fde48", "fine_label_names")
    label_key = "fine_labels"
    mean = (0.5071, 0.4865, 0.4409)
    std = (0.2673, 0.2564, 0.2762)
