"""Metrics of generated images: distance to an attacker's target, and quality of clean samples by a small classifier.

The Fréchet distance here is *local*: Gaussian statistics of the penultimate features of a small classifier trained on
the same data, not of Inception. It ranks models of one task and must never be compared with published FID values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from backdoorlab.core.errors import InputError, MissingExtra

HIT_MSE = 0.02
"""A triggered sample reproduces the target if its mean squared error, on a [0, 1] grey scale, is at most this (an error
of 14 % of the grey range per pixel, root mean square)."""


def squared_error(images: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each image to the target on a [0, 1] scale.

    Args:
        images: uint8 [N,C,H,W].
        target: uint8 [C,H,W].

    Returns:
        float64 [N].
    """
    if images.shape[1:] != target.shape:
        raise InputError(f"target of shape {tuple(target.shape)} does not fit images {tuple(images.shape[1:])}")
    return ((images.double() - target.double()) / 255).square().flatten(1).mean(1)


def structural_similarity(images: Tensor, target: Tensor) -> float:
    """Mean SSIM of images with the target (Gaussian window, sigma 1.5), 1 for equal ones.

    Args:
        images: uint8 [N,C,H,W].
        target: uint8 [C,H,W].
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError:
        raise MissingExtra("SSIM of diffusion samples", "diffusion") from None
    reference = (target.double() / 255).expand(len(images), *target.shape)
    value = structural_similarity_index_measure(images.double() / 255, reference, data_range=1.0)
    return float(torch.as_tensor(value))


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two feature sets (Heusel et al., NeurIPS 2017, arXiv 1706.08500).

        |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^(1/2) C_b C_a^(1/2))^(1/2))

    Args:
        a: float [N,D], N >= 2.
        b: float [M,D], M >= 2.

    Raises:
        InputError: for fewer than two samples or features of different length.
    """
    if min(len(a), len(b)) < 2 or a.shape[1] != b.shape[1]:
        raise InputError(f"need two feature sets of at least 2 samples, got {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = a.double(), b.double()
    cov_a, cov_b = (torch.atleast_2d(torch.cov(x.T)) for x in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    # The inner matrix is symmetric, so its root's trace needs eigenvalues only, and no complex matrix root.
    overlap = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * overlap
    return float(distance.clamp_min(0))


def classifier_metrics(logits: Tensor) -> dict[str, Any]:
    """How sure a classifier is of generated images, and which classes they cover.

    Args:
        logits: float [N,K].

    Returns:
        classifier_confidence: mean probability of the most likely class. classes_covered: number of classes that
        receive at least a tenth of a fair share (N / K) of the images. class_shares: K numbers.
    """
    count, classes = logits.shape
    confidence, predicted = logits.double().softmax(1).max(1)
    shares = torch.bincount(predicted, minlength=classes).double() / count
    return {
        "classifier_confidence": float(confidence.mean()),
        "classes_covered": int((shares >= 0.1 / classes).sum()),
        "class_shares": shares.tolist(),
    }
