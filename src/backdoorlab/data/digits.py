"""Handwritten digits that ship with scikit-learn (UCI optical digits, test part): no download."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from backdoorlab.core.memory import expect_memory
from backdoorlab.core.seeding import make_generator
from backdoorlab.data.sources import DatasetSource, DatasetSpec, datasets
from backdoorlab.data.split import Dataset, Split


@datasets.register
class Digits(DatasetSource):
    """1,797 grey images of 8x8 pixels, upsampled bilinearly to 16x16 (``size`` for others); 4 in 5 for training."""

    name = "digits"
    modalities = ("image",)
    summary = "1,437 + 360 handwritten digits, 10 classes, grey, 16x16 by default (embedded, CC BY 4.0)"
    rescales = True

    def load(self, spec: DatasetSpec, argument: str, roots: tuple[Path, ...], download: bool) -> Dataset:
        """See :meth:`DatasetSource.load`."""
        bunch = load_digits()
        images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
        side = spec.size or 16
        expect_memory((len(images), 1, side, side), 9, "the digits")  # floats before and after rounding, then bytes
        images = F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)
        images = (images * 255).clamp(0, 255).round().to(torch.uint8)
        labels = torch.from_numpy(bunch.target).to(torch.int64)
        order = torch.randperm(len(labels), generator=make_generator(spec.seed, "digits"))
        cut = len(labels) * 4 // 5
        classes = tuple("0123456789")
        train, test = (Split(images[part], labels[part], classes) for part in (order[:cut], order[cut:]))
        return Dataset("digits", "image", train, test, mean=(0.3,), std=(0.33,))
