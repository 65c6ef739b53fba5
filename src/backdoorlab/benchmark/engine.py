"""SKELETON (signatures final, bodies follow)."""

from __future__ import annotations

from typing import Protocol


class Engine(Protocol):
    """Executes a plan."""


class LocalEngine:
    """``LocalEngine()`` in this process; ``LocalEngine(devices=("cuda:0", "cuda:1"))`` one worker process each."""

    def __init__(self, devices: tuple[str, ...] = (), jobs: int = 1) -> None: ...
