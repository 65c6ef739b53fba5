"""Tables of samples: clean splits, poisoned splits, and the small record that turns one into the other."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from backdoorlab.core.errors import ArtifactError, InputError
from backdoorlab.core.seeding import make_generator

Inputs = Tensor | np.ndarray
"""Raw samples: uint8 [N,C,H,W] images, uint8 [N,T,C,H,W] video, int16 [N,L] audio (tensors), str [N] text (array)."""

CLEAN, BACKDOOR, COVER = 0, 1, 2
"""Roles of a training sample: untouched; triggered and (re)labelled; triggered or perturbed with its true label."""


def take(inputs: Inputs, indices: Tensor) -> Inputs:
    """Rows of raw inputs (a copy); ``indices`` is int64 [M]."""
    if isinstance(inputs, np.ndarray):
        return np.asarray(inputs[indices.cpu().numpy()])
    return inputs[indices.to(inputs.device)]


def put(inputs: Inputs, indices: Tensor, rows: Inputs) -> Inputs:
    """A copy of raw inputs with some rows replaced."""
    if isinstance(inputs, np.ndarray):
        out = inputs.copy()
        out[indices.cpu().numpy()] = rows
        return out
    if not isinstance(rows, Tensor):
        raise InputError("cannot put text rows into a tensor of samples")
    tensor = inputs.clone()
    tensor[indices.to(inputs.device)] = rows.to(inputs.device)
    return tensor


def join(parts: list[Inputs]) -> Inputs:
    """Concatenate raw inputs."""
    if isinstance(parts[0], np.ndarray):
        return np.concatenate([np.asarray(p) for p in parts])
    return torch.cat([p for p in parts if isinstance(p, Tensor)])


@dataclass(frozen=True, eq=False)
class Split:
    """A table of samples, held in memory.

    Attributes:
        inputs: raw samples (see :data:`Inputs`), N rows.
        labels: int64 [N], in [0, len(classes)).
        classes: names of the classes.
    """

    inputs: Inputs
    labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.labels):
            raise InputError(f"a split needs one label per sample, got {len(self.inputs)} and {len(self.labels)}")
        if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            raise InputError(
                f"labels must lie in 0..{len(self.classes) - 1}, got {int(self.labels.min())}..{int(self.labels.max())}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Tensor) -> Split:
        """The samples at ``indices`` (int64 [M]) or under a mask (bool [N]), as a plain split."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        return Split(take(self.inputs, indices), self.labels[indices.to(self.labels.device)], self.classes)

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return len(self.classes)

    def to(self, device: torch.device | str) -> Split:
        """The same table on another device (text stays where it is)."""
        inputs = self.inputs if isinstance(self.inputs, np.ndarray) else self.inputs.to(device)
        return dataclasses.replace(self, inputs=inputs, labels=self.labels.to(device))

    def batches(self, size: int) -> Iterator[tuple[Inputs, Tensor]]:
        """Consecutive (inputs, labels) slices of at most ``size`` samples."""
        for start in range(0, len(self), size):
            yield self.inputs[start : start + size], self.labels[start : start + size]


@dataclass(frozen=True, eq=False)
class PoisonedSplit(Split):
    """A training set as the attacker left it; only metrics may read ``roles`` and ``true_labels``.

    Attributes:
        roles: uint8 [N]: CLEAN, BACKDOOR or COVER.
        true_labels: int64 [N], the labels before the attack.
    """

    roles: Tensor
    true_labels: Tensor

    def as_seen(self) -> Split:
        """What a defender sees: inputs and (poisoned) labels, nothing else."""
        return Split(self.inputs, self.labels, self.classes)


@dataclass(frozen=True, eq=False)
class Poison:
    """What an attack changed in a training set: kilobytes to megabytes instead of a second copy of the data.

    Attributes:
        indices: int64 [M], rows of the clean training set that were touched.
        roles: uint8 [M], BACKDOOR or COVER.
        labels: int64 [M], labels after the attack.
        inputs: raw samples after the attack, M rows.
        replay: True if the attacker controlled training, so that this set is a snapshot made for defenses that need
            a poisoned data set, not the data that the victim was trained on.
    """

    indices: Tensor
    roles: Tensor
    labels: Tensor
    inputs: Inputs
    replay: bool = False

    def __len__(self) -> int:
        return len(self.indices)

    def apply(self, clean: Split) -> PoisonedSplit:
        """The poisoned training set made of the clean one and this record."""
        if len(self) and int(self.indices.max()) >= len(clean):
            raise ArtifactError(
                f"poison record refers to row {int(self.indices.max())} of a set with {len(clean)} rows"
            )
        labels, roles = clean.labels.clone(), torch.zeros(len(clean), dtype=torch.uint8)
        labels[self.indices], roles[self.indices] = self.labels, self.roles
        inputs = put(clean.inputs, self.indices, self.inputs)
        return PoisonedSplit(inputs, labels, clean.classes, roles, clean.labels)

    def tensors(self) -> dict[str, Tensor]:
        """Everything as tensors, for safetensors (text as UTF-8 bytes and offsets)."""
        base = {
            "indices": self.indices,
            "roles": self.roles,
            "labels": self.labels,
            "replay": torch.tensor(self.replay),
        }
        return base | pack_inputs(self.inputs)

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Poison:
        """Inverse of :meth:`tensors`."""
        try:
            return cls(
                tensors["indices"], tensors["roles"], tensors["labels"], unpack_inputs(tensors), bool(tensors["replay"])
            )
        except KeyError as error:
            raise ArtifactError(f"poison record lacks {error}") from None


def pack_inputs(inputs: Inputs) -> dict[str, Tensor]:
    """Raw inputs as named tensors."""
    if isinstance(inputs, Tensor):
        return {"inputs": inputs.contiguous().cpu()}
    coded = [str(text).encode() for text in inputs]
    offsets = torch.tensor([0, *np.cumsum([len(c) for c in coded], dtype=np.int64)], dtype=torch.int64)
    joined = np.frombuffer(b"".join(coded) or b"\0", dtype=np.uint8).copy()
    return {"text.bytes": torch.from_numpy(joined), "text.offsets": offsets}


def content_digest(inputs: Inputs, labels: Tensor) -> str:
    """Short SHA-256 of samples and labels: two data sets that merely share a name do not share what is made of them."""
    digest = hashlib.sha256()
    for tensor in (*pack_inputs(inputs).values(), labels):
        digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).data)
    return digest.hexdigest()[:16]


def unpack_inputs(tensors: dict[str, Tensor]) -> Inputs:
    """Inverse of :func:`pack_inputs`."""
    if "inputs" in tensors:
        return tensors["inputs"]
    data, offsets = tensors["text.bytes"].numpy().tobytes(), tensors["text.offsets"].tolist()
    texts = [data[a:b].decode() for a, b in itertools.pairwise(offsets)]
    return text_array(texts)


def text_array(texts: list[str]) -> np.ndarray:
    """Texts as an object array of str, the raw form of text samples."""
    out = np.empty(len(texts), dtype=object)
    out[:] = texts
    return out


@dataclass(frozen=True, eq=False)
class Dataset:
    """A named data set: training and test split, and what its modality must know.

    Attributes:
        name: as the user wrote it, for example "cifar10" or "folder:photos".
        modality: "image", "text", "audio" or "video".
        train: training split.
        test: test split; same classes.
        flip: whether a horizontal flip keeps the class (digits and traffic signs: no).
        sample_rate: of audio, in Hz; 0 otherwise.
        mean: per-channel mean in [0, 1] used for normalisation (image, video).
        std: per-channel standard deviation.
        captions: one sentence per training and per test sample, for text-to-image tasks; None where there are none.
        note: what a reader of results should know about this copy (synthetic, a part of the original, ...), or "".
    """

    name: str
    modality: str
    train: Split
    test: Split
    flip: bool = False
    sample_rate: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    captions: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.train.classes != self.test.classes:
            raise InputError(f"{self.name}: training and test set must have the same classes")
        if self.train.num_classes < 2:
            raise InputError(f"{self.name}: a classification task needs at least 2 classes, got {self.train.classes}")
        for part, split in (("training", self.train), ("test", self.test)):
            if not len(split):
                raise InputError(f"{self.name}: the {part} set is empty")
        if self.captions is not None and [*map(len, self.captions)] != [len(self.train), len(self.test)]:
            raise InputError(
                f"{self.name}: {len(self.train)} training and {len(self.test)} test samples need as many captions, "
                f"got {' and '.join(str(len(c)) for c in self.captions)}"
            )


def clean_indices(labels: Tensor, num_classes: int, fraction: float, seed: int) -> Tensor:
    """Rows of the clean training set that the defender owns: int64, sorted.

    Class counts are as equal as the data allow. All defenses of one seed get the same rows at the same fraction, and
    the rows of a smaller fraction are among those of a larger one.
    """
    count = min(len(labels), max(1, round(fraction * len(labels)))) if fraction > 0 else 0
    order = torch.randperm(len(labels), generator=make_generator(seed, "clean samples"))
    shuffled, rank = labels[order], torch.zeros(len(labels), dtype=torch.int64)
    for k in range(num_classes):
        of_class = shuffled == k
        rank[of_class] = torch.arange(int(of_class.sum()))
    return order[torch.argsort(rank, stable=True)[:count]].sort().values
