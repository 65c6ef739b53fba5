"""Whether a table of samples can be held in memory, asked before it is made."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from backdoorlab.core.errors import InputError


def expect_memory(shape: Sequence[int], item: int, what: str) -> None:
    """Refuse what is larger than the machine's memory: the system would grant it, and kill the process later.

    Args:
        shape: of the array, samples first.
        item: bytes per value.
        what: for the message, in the plural.

    Raises:
        InputError: naming the shape and both sizes.
    """
    required, available = math.prod(shape) * item, memory()
    if required > available:
        form = " x ".join(map(str, shape[1:]))
        raise InputError(
            f"{what} ({shape[0]} of {form} values) would take {required / 2**30:,.0f} GiB, this machine has "
            f"{available / 2**30:,.0f} GiB of memory; use a smaller size or fewer samples"
        )


def memory() -> int:
    """Bytes of physical memory; 64 GiB where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return 64 << 30
