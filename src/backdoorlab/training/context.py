"""What a stage is run with: seed, device, progress display and a cache for things that several runs share."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from backdoorlab.core.instructions import onednn_limit
from backdoorlab.core.seeding import derive_seed, make_generator

T = TypeVar("T")
Tensors = dict[str, Tensor]


class Reporter(Protocol):
    """Shows progress to a person; the library itself prints nothing."""

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Iterate while showing how far along it is."""
        ...

    def note(self, text: str) -> None:
        """Tell one line."""
        ...


class Silent:
    """The default reporter."""

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Just iterate."""
        return iter(items)

    def note(self, text: str) -> None:
        """Say nothing."""


class Assets(Protocol):
    """Cache of things that are costly to make and the same for many runs (surrogates, encoders, generators)."""

    def get(self, kind: str, spec: Mapping[str, Any], build: Callable[[], Tensors]) -> Tensors:
        """Return what was cached for (kind, spec), or build and keep it."""
        ...


class MemoryAssets:
    """Keeps assets for the life of the object; the benchmark's store keeps them on disk."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensors] = {}

    def get(self, kind: str, spec: Mapping[str, Any], build: Callable[[], Tensors]) -> Tensors:
        """See :class:`Assets`."""
        key = json.dumps([kind, spec], sort_keys=True)
        if key not in self._kept:
            self._kept[key] = build()
        return self._kept[key]


@dataclass(frozen=True)
class Context:
    """Everything a method may use besides its own hyper-parameters and data.

    Attributes:
        seed: of this stage; all randomness derives from it.
        device: where models and batches live.
        reporter: progress display.
        assets: cache shared by runs.
        warnings: what :meth:`warn` was told; shared with the contexts derived from this one.
    """

    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    reporter: Reporter = field(default_factory=Silent)
    assets: Assets = field(default_factory=MemoryAssets)
    warnings: list[str] = field(default_factory=list, compare=False)

    def warn(self, text: str) -> None:
        """Tell one line that also belongs on the result's card; the same line is told once."""
        if text not in self.warnings:
            self.warnings.append(text)
            self.reporter.note(text)

    def generator(self, *names: object, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh generator for a named purpose; on the CPU unless said otherwise, so that devices agree."""
        return make_generator(self.seed, *names, device=device)

    def child(self, *names: object) -> Context:
        """The same context with a seed derived for a sub-stage."""
        return dataclasses.replace(self, seed=derive_seed(self.seed, *names))

    def asset(
        self,
        kind: str,
        spec: Mapping[str, Any],
        build: Callable[[Context], Tensors],
        unseeded: Mapping[str, Any] | None = None,
    ) -> Tensors:
        """Named tensors made once per (kind, spec) and shared by all runs.

        Args:
            kind: such as "clean-surrogate".
            spec: JSON-able; everything that the result depends on. The run's seed is *not* part of it: ``build``
                receives a context whose seed is derived from the spec.
            build: makes the tensors.
            unseeded: more that the result depends on, which tells apart what is kept but does not change the seed.
        """
        seeded = dataclasses.replace(self, seed=derive_seed(0, kind, json.dumps(spec, sort_keys=True)))
        return self.assets.get(kind, {**spec, **(unseeded or {})}, lambda: build(seeded))

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Iterate with a progress bar."""
        return self.reporter.track(items, label, total)


def autocast(device: torch.device, precision: str = "auto") -> AbstractContextManager[Any]:
    """bf16 autocast where the hardware multiplies bf16 matrices fast; otherwise nothing.

    Args:
        device: of the model.
        precision: "auto", "bf16" or "fp32".
    """
    if precision == "fp32" or (precision == "auto" and not fast_bf16(device)):
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def fast_bf16(device: torch.device) -> bool:
    """Does this device have bf16 matrix instructions (CUDA from Ampere on, CPUs with AVX512-BF16 or AMX)?

    On a CPU they count only as far as oneDNN and torch may use them: ``ONEDNN_MAX_CPU_ISA`` (older name
    ``DNNL_MAX_CPU_ISA``) must not name an instruction set without them, and ``ATEN_CPU_CAPABILITY`` must not hold torch
    below AVX-512. Otherwise bf16 would be emulated.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        if (onednn_limit() or "all").lower() in _WITHOUT_BF16 or torch.backends.cpu.get_cpu_capability() != "AVX512":
            return False
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


_WITHOUT_BF16 = {"sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni"}
"""oneDNN's names (of any case) of what lies below AVX512-BF16; it takes a name that it does not know for "all"."""
