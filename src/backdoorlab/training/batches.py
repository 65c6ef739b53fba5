"""What a step is given: batches that are gathered, edited, augmented and prepared on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from backdoorlab.core.errors import InputError
from backdoorlab.data.split import Split
from backdoorlab.modalities.base import Modality

Stamp = Callable[[Tensor, Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
"""(encoded raw batch, labels, sample indices, generator) -> (raw batch, labels): what an attacker who controls
training does to each batch before augmentation."""

View = Callable[[Tensor, torch.Generator], Tensor]
"""(encoded raw batch, generator) -> model input, augmented."""

B = TypeVar("B")
C = TypeVar("C")
T_co = TypeVar("T_co", covariant=True)


class Epochs(Protocol[T_co]):
    """Batches of one epoch after another: iterating once is an epoch."""

    def __len__(self) -> int:
        """Batches of an epoch."""
        ...

    def __iter__(self) -> Iterator[T_co]: ...


@dataclass(frozen=True)
class Batch:
    """Samples as a step sees them.

    Attributes:
        views: prepared model inputs, augmented independently of one another; one unless more were asked for.
        labels: int64 [B].
        indices: int64 [B], rows of the split.
    """

    views: tuple[Tensor, ...]
    labels: Tensor
    indices: Tensor

    @property
    def inputs(self) -> Tensor:
        """The first view."""
        return self.views[0]

    def __len__(self) -> int:
        return len(self.labels)


class Shuffled:
    """All samples of a split in random order, in batches of one size; the last, partial one is dropped.

    The split lies on the device as one tensor, and nothing here waits for the host.
    """

    def __init__(
        self,
        split: Split,
        modality: Modality,
        batch_size: int,
        generator: torch.Generator,
        *,
        augment: bool = True,
        stamp: Stamp | None = None,
        views: int = 1,
        view: View | None = None,
    ) -> None:
        """Lay the samples on the generator's device.

        Args:
            split: raw samples and labels.
            modality: prepares them.
            batch_size: at most the number of samples.
            generator: of the order, the stamp and the augmentation.
            augment: whether views are augmented.
            stamp: edits raw batches.
            views: how many of each batch.
            view: makes one; None takes the modality's own augmentation.

        Raises:
            InputError: if the split has fewer samples than a batch.
        """
        if not 0 < batch_size <= len(split):
            raise InputError(f"cannot draw batches of {batch_size} from {len(split)} samples")
        device = generator.device
        table = modality.encode(split.inputs).to(device)
        if table.dim() == 4:  # rows in the order in which crops, flips and convolutions read them
            table = table.contiguous(memory_format=torch.channels_last)
        self.table, self.labels, self.modality = table, split.labels.to(device), modality
        self.batch_size, self.generator, self.augment, self.stamp = batch_size, generator, augment, stamp
        self.views, self.view = views, view or self._usual

    def __len__(self) -> int:
        return len(self.labels) // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(len(self.labels), generator=self.generator, device=self.generator.device)
        for step in range(len(self)):
            yield self.at(order[step * self.batch_size : (step + 1) * self.batch_size])

    def at(self, indices: Tensor) -> Batch:
        """The batch of the rows ``indices``, int64 [B] on the device."""
        raw, labels = self.table[indices], self.labels[indices]
        if self.stamp is not None:
            raw, labels = self.stamp(raw, labels, indices, self.generator)
        return Batch(tuple(self.view(raw, self.generator) for _ in range(self.views)), labels, indices)

    def _usual(self, raw: Tensor, generator: torch.Generator) -> Tensor:
        return self.modality.prepare(raw, train=self.augment, generator=generator)


class Drawn(Shuffled):
    """Batches drawn with replacement, so many an epoch, whatever the size of the split."""

    def __init__(
        self,
        split: Split,
        modality: Modality,
        batch_size: int,
        generator: torch.Generator,
        steps: int,
        *,
        augment: bool = False,
        views: int = 1,
    ) -> None:
        """As :class:`Shuffled`, with the number of batches of an epoch."""
        super().__init__(split, modality, min(batch_size, len(split)), generator, augment=augment, views=views)
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self.steps):
            rows = torch.randint(
                len(self.labels), (self.batch_size,), generator=self.generator, device=self.generator.device
            )
            yield self.at(rows)


class Repeat(Generic[B]):
    """So many batches an epoch, each by one call."""

    def __init__(self, steps: int, draw: Callable[[], B]) -> None:
        """``draw`` makes a batch."""
        self.steps, self.draw = steps, draw

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[B]:
        for _ in range(self.steps):
            yield self.draw()


class Paired(Generic[B, C]):
    """Two sources side by side, such as labelled and unlabelled halves; the longer one sets the length of an epoch.

    The shorter one starts again, in a new order, where it ends.
    """

    def __init__(self, first: Epochs[B], second: Epochs[C]) -> None:
        """Two sources, neither of them empty."""
        self.first, self.second = first, second

    def __len__(self) -> int:
        return max(len(self.first), len(self.second))

    def __iter__(self) -> Iterator[tuple[B, C]]:
        count = len(self)
        yield from zip(_endless(self.first, count), _endless(self.second, count), strict=True)


def _endless(source: Epochs[B], count: int) -> Iterator[B]:
    while count > 0:
        for batch in source:
            yield batch
            count -= 1
            if not count:
                return
