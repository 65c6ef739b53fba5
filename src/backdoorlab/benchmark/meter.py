"""What a run costs and where it ran: seconds per part, peak memory, hardware, versions, commit."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

import backdoorlab
from backdoorlab.benchmark.card import Card
from backdoorlab.benchmark.spec import CONTRACT
from backdoorlab.core.canonical import canonical
from backdoorlab.core.instructions import onednn_limit
from backdoorlab.models.passes import Passes, counted
from backdoorlab.training.context import fast_bf16

_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "diffusers",
    "numpy",
    "scipy",
    "scikit-learn",
    "safetensors",
)


class Meter:
    """Measures the parts of a run.

    Resident memory is sampled while a part runs, twenty times a second: the operating system's own high-water mark
    belongs to the whole process and would charge every run with its predecessors' peaks.
    """

    def __init__(self, device: torch.device | None = None, interval: float = 0.05) -> None:
        self.device, self.interval = device or torch.device("cpu"), interval
        self.seconds: dict[str, float] = {}
        self.passes: dict[str, Passes] = {}
        self.peak = 0.0
        self.device_peak: float | None = None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure a part; parts of the same name add up."""
        cuda, stop = self.device.type == "cuda", threading.Event()
        if cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        watcher = threading.Thread(target=self._watch, args=(stop,), daemon=True)
        started = time.perf_counter()
        watcher.start()
        try:
            with counted() as passes:
                yield
        finally:
            if (before := self.passes.get(name)) is not None:
                passes = Passes(before.forward + passes.forward, before.backward + passes.backward)
            self.passes[name] = passes
            if cuda:
                torch.cuda.synchronize(self.device)
                self.device_peak = max(self.device_peak or 0.0, torch.cuda.max_memory_allocated(self.device) / 2**20)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            stop.set()
            watcher.join()

    def _watch(self, stop: threading.Event) -> None:
        process, ended = psutil.Process(), False
        while not ended:
            ended = stop.wait(self.interval)
            self.peak = max(self.peak, process.memory_info().rss / 2**20)

    def notes(self) -> dict[str, Any]:
        """For a card: samples that went through classifiers, forward and backward, in each part that used any."""
        used = {name: asdict(passes) for name, passes in self.passes.items() if passes.forward}
        return {"passes": used} if used else {}

    def fields(self) -> dict[str, Any]:
        """The measured fields of a card."""
        return {
            "seconds": {k: round(v, 4) for k, v in self.seconds.items()},
            "peak_memory_mb": round(self.peak, 1) or None,
            "peak_device_memory_mb": self.device_peak,
        }


def environment(device: torch.device) -> dict[str, Any]:
    """The fields of a card that say where and with what it was made."""
    return {
        "hardware": hardware(device),
        "versions": versions(),
        "commit": commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def hardware(device: torch.device) -> dict[str, Any]:
    """Processor, cores, memory and accelerator, and what arithmetic they do: results depend on it.

    "instructions" is what torch uses on the CPU, "onednn_max_isa" the user's limit for oneDNN (None: no limit),
    "precision" what a recipe's "auto" stands for.
    """
    facts = {
        "platform": platform.platform(terse=True),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "onednn_max_isa": onednn_limit(),
        "precision": "bf16" if fast_bf16(device) else "fp32",
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "device": device.type,
    }
    if device.type == "cuda":
        facts["accelerator"] = torch.cuda.get_device_name(device)
    return facts


@functools.cache
def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the library, Python and the packages that make the numbers (those that are installed)."""
    installed = {"backdoorlab": backdoorlab.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


@functools.cache
def commit() -> str | None:
    """Commit of the checkout that the library is imported from, with "-dirty" if tracked files differ; or None."""
    package = Path(backdoorlab.__file__).resolve().parent
    try:
        git = functools.partial(subprocess.run, cwd=package, capture_output=True, text=True, timeout=10, check=True)
        git(["git", "ls-files", "--error-unmatch", "__init__.py"])
        head = git(["git", "rev-parse", "HEAD"]).stdout.strip()
        changed = git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("-dirty" if changed else "")


def asset_card(kind: str, spec: Mapping[str, Any]) -> Card:
    """The card of a shared asset, before it is measured."""
    full = {"kind": kind, "asset": spec, "contract": CONTRACT}
    key = hashlib.sha256(canonical(full).encode()).hexdigest()[:20]
    return Card(
        stage="asset",
        key=key,
        status="ok",
        spec=full,
        metrics={},
        null_reasons={},
        seconds={},
        peak_memory_mb=None,
        command="(made by the attack or defense that needs it)",
        **environment(torch.device("cpu")),
    )
