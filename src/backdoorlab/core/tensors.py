"""Tensors as the bytes of a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """As a safetensors file, which takes CPU tensors with memory of their own."""
    from safetensors.torch import save  # here, since commands that only read cards do without torch

    return save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})
