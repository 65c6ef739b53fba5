"""Random numbers: every stage draws from a separate generator, derived from the run's seed and the stage's name.

Nothing in the library draws from torch's global generator without having isolated it first, so that adding a stage,
a worker or a progress bar never changes another stage's numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(seed: int, *names: object) -> int:
    """Mix a seed and any names into a new 63-bit seed, the same on every platform."""
    text = "\x1f".join([str(int(seed)), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def make_generator(seed: int, *names: object, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh generator for (seed, names)."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *names))


def spawn(generator: torch.Generator) -> int:
    """Draw a new seed from a generator, for code that can only be seeded by an integer."""
    return int(torch.randint(0, 2**62, (1,), generator=generator, device=generator.device).item())


@contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Seed torch's global generators inside the block (weight init, dropout) and restore them afterwards."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
