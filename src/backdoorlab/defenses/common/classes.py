"""Training sets class by class, and the language in which a verdict per class becomes scores of samples."""

from __future__ import annotations

import torch
from torch import Tensor

from backdoorlab.core.errors import InputError
from backdoorlab.data.split import Split
from backdoorlab.models.classifier import Classifier


def rows_per_class(labels: Tensor, num_classes: int) -> list[Tensor]:
    """Rows of each class in the order of the set: K tensors int64 [n_k] on the CPU, empty for missing classes."""
    labels = labels.cpu()
    order = labels.argsort(stable=True)
    return list(order.split(torch.bincount(labels, minlength=num_classes).tolist()))


def need_samples(name: str, what: str, data: Split, least: int = 1) -> None:
    """Refuse a set that is too small for a method.

    Raises:
        InputError: naming how many samples there are and how many are needed.
    """
    if len(data) < least:
        raise InputError(f"{name} needs at least {least} {what} samples, got {len(data) or 'none'}")


def need_classes(name: str, model: Classifier, data: Split) -> None:
    """Refuse a set whose classes are not those of the model.

    Raises:
        InputError: naming both numbers of classes.
    """
    if data.num_classes != model.num_classes:
        raise InputError(f"{name}: the model has {model.num_classes} classes, the samples have {data.num_classes}")


def gated(margins: Tensor, labels: Tensor, suspected: tuple[int, ...]) -> Tensor:
    """Margins of samples, positive beyond the method's threshold, with a say only in the suspected classes.

    The margins of the other classes keep their order and lie below all of those, and at most at 0: exactly what is
    above 0 is flagged, and the ranking goes on below.

    Args:
        margins: float [N].
        labels: int64 [N].
        suspected: classes.

    Returns:
        float32 [N].
    """
    inside = torch.isin(labels.cpu(), torch.tensor(suspected, dtype=torch.int64))
    if bool(inside.all()):
        return margins.float()
    ceiling = min(0.0, float(margins[inside].min())) if bool(inside.any()) else 0.0
    return torch.where(inside, margins, margins - margins[~inside].max() + ceiling).float()
