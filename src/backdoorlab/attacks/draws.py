"""Uniform numbers that belong to a sample, not to a call: the same whatever the batch or its order."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 63) - 1


def _mix(bits: Tensor) -> Tensor:
    """One round of the SplitMix64 finaliser on int64 (products wrap, shifts are made logical by masking)."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        bits = (bits ^ ((bits >> shift) & (_MASK >> (shift - 1)))) * factor
    return bits ^ ((bits >> 31) & (_MASK >> 30))


def indexed_uniform(seed: int, indices: Tensor, count: int) -> Tensor:
    """``count`` numbers for each sample, a fixed function of (seed, index).

    A counter-based generator (SplitMix64), so that stamping a set in batches of any size, on any device, in any order
    gives the same images.

    Args:
        seed: of the trigger.
        indices: int64 [N].
        count: numbers per sample.

    Returns:
        float32 [N, count] in [0, 1), on the indices' device.
    """
    columns = torch.arange(count, device=indices.device)
    key = _mix(torch.tensor(seed, dtype=torch.int64, device=indices.device) * -7046029254386353131 + 1)
    bits = _mix(_mix(indices.to(torch.int64)[:, None] + key) + (columns + 1) * -7046029254386353131)
    return ((bits >> 40) & 0xFFFFFF).to(torch.float32) / 2**24


def sample_uniform(
    seed: int, batch: Tensor, count: int, indices: Tensor | None, generator: torch.Generator | None
) -> Tensor:
    """``count`` uniform numbers per row of a batch: from the generator if there is one, else by index.

    Returns:
        float32 [N, count] on the batch's device.
    """
    if generator is not None:
        return torch.rand(len(batch), count, generator=generator, device=generator.device).to(batch.device)
    rows = torch.arange(len(batch)) if indices is None else indices
    return indexed_uniform(seed, rows.to(batch.device), count)
