"""Perturbations of prepared inputs that leave them valid inputs: what adversarial repairs add to clean samples."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from backdoorlab.core.errors import NotApplicable
from backdoorlab.models.classifier import Classifier

STANDARD = 3 * 32 * 32
"""Values of the input for which published Euclidean bounds are meant."""


def valid_range(name: str, model: Classifier) -> tuple[float, float]:
    """Lowest and highest value of a model's prepared input: (0, 1), for sounds (-1, 1).

    Args:
        name: of the method, for the message.
        model: any classifier.

    Raises:
        NotApplicable: if inputs are not continuous (text).
    """
    if not model.modality.continuous:
        raise NotApplicable(f"{name} adds perturbations to inputs; those of a {model.modality.name} model are discrete")
    return (-1.0, 1.0) if model.modality.name == "audio" else (0.0, 1.0)


def shifted(inputs: Tensor, delta: Tensor, limits: tuple[float, float]) -> Tensor:
    """Inputs plus a perturbation (of one sample's shape, or of the batch's), clipped to the valid range."""
    return (inputs + delta).clamp(*limits)


def scaled_norm(norm: float, sample: Tensor) -> float:
    """A Euclidean bound that is meant for 3x32x32 values, for a sample of another size: the same bound per value."""
    return norm * math.sqrt(sample.numel() / STANDARD)


def within_norm(delta: Tensor, norm: float) -> Tensor:
    """Each perturbation of a batch scaled down to a Euclidean norm of at most ``norm``."""
    size = torch.linalg.vector_norm(delta.flatten(1), dim=1).clamp_min(1e-12)
    return delta * (norm / size).clamp(max=1).reshape(-1, *(1,) * (delta.dim() - 1))
