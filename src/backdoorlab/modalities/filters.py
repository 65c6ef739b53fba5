"""Linear tools for batches of images: separable Gaussian blur, orthonormal cosine transform, shape check."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from backdoorlab.core.errors import InputError
from backdoorlab.data.split import Inputs


def expect_images(inputs: Inputs, shape: tuple[int, ...] | torch.Size | None = None) -> Tensor:
    """The inputs, if they are raw images that a trigger can stamp.

    Args:
        inputs: anything.
        shape: (C, H, W) that the images must have; None for any.

    Raises:
        InputError: if they are not uint8 [N,C,H,W], or of another size.
    """
    if not isinstance(inputs, Tensor) or inputs.dtype != torch.uint8 or inputs.dim() != 4:
        got = f"{inputs.dtype} {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise InputError(f"expected uint8 images of shape [N, C, H, W], got {got}")
    if shape is not None and tuple(inputs.shape[1:]) != tuple(shape):
        raise InputError(
            f"this trigger is made for images of shape {tuple(shape)}, got {tuple(inputs.shape[1:])}; "
            "resize the images or make the trigger for their size"
        )
    return inputs


def expect_channels(images: Tensor, channels: int) -> Tensor:
    """The images, if they have so many channels; for triggers that fit images of any size.

    Raises:
        InputError: if they have not.
    """
    if images.shape[1] != channels:
        raise InputError(f"this trigger is made for images with {channels} channels, got {images.shape[1]}")
    return images


def blur_matrix(side: int, sigma: Tensor, truncate: float = 4.0) -> Tensor:
    """Gaussian blur along one axis as a matrix whose rows sum to 1 (weights outside the image are dropped).

    Args:
        side: number of pixels.
        sigma: float [N], in pixels, > 0.
        truncate: radius of the kernel in sigmas, rounded up to whole pixels.

    Returns:
        float [N, side, side]; apply as ``matrix @ column``.
    """
    place = torch.arange(side, device=sigma.device)
    distance = (place[:, None] - place).abs()
    sigma = sigma[:, None, None]
    weights = torch.exp(-0.5 * (distance / sigma) ** 2) * (distance <= torch.ceil(truncate * sigma))
    return weights / weights.sum(-1, keepdim=True)


def gaussian_blur(images: Tensor, sigma: Tensor | float, truncate: float = 4.0) -> Tensor:
    """Blur float images [N,C,H,W] with a standard deviation per image (float [N]) or one for all, in pixels."""
    width = torch.as_tensor(sigma, dtype=images.dtype, device=images.device).reshape(-1)
    rows = blur_matrix(images.shape[-2], width, truncate)[:, None]
    columns = blur_matrix(images.shape[-1], width, truncate)[:, None]
    return rows @ images @ columns.transpose(-1, -2)


def dct_matrix(side: int) -> Tensor:
    """Orthonormal DCT-II: float64 [side, side], row u = frequency u; the inverse is the transpose."""
    place = torch.arange(side, dtype=torch.float64)
    matrix = torch.cos(math.pi * (place + 0.5) * place[:, None] / side) * math.sqrt(2 / side)
    matrix[0] /= math.sqrt(2)
    return matrix


def inverse_dct(coefficients: Tensor) -> Tensor:
    """Images float64 [..., H, W] of two-dimensional orthonormal DCT coefficients of the same shape."""
    rows, columns = dct_matrix(coefficients.shape[-2]), dct_matrix(coefficients.shape[-1])
    return rows.T @ coefficients.double() @ columns
