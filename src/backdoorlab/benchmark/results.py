"""SKELETON (signatures final, bodies follow)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from backdoorlab.benchmark.store import Store

DEFAULT_GROUP = ("dataset", "model", "attack", "defense")


@dataclass(frozen=True)
class Refusal:
    """A run that could not be read: ``path`` and one line saying why."""

    path: str
    reason: str


class Results:
    """All cards of a store in an in-memory DuckDB table ``runs``. ``.refusals`` lists unreadable ones."""

    refusals: list[Refusal]

    def __init__(self, store: Store) -> None: ...

    def rows(self, where: str = "") -> list[dict[str, Any]]:
        """Flat records, one per run."""
        raise NotImplementedError

    def table(self, metric: str = "asr", group_by: Sequence[str] = DEFAULT_GROUP) -> list[dict[str, Any]]:
        """Per group: n (seeds with a value), missing, mean, low, high (bootstrap 95 % CI, None for n = 1)."""
        raise NotImplementedError

    def sql(self, query: str) -> list[dict[str, Any]]:
        """Any query over the table ``runs``."""
        raise NotImplementedError


def rows(store: Store) -> list[dict[str, Any]]:
    """`Results(store).rows()`."""
    raise NotImplementedError


def table(store: Store, group_by: Sequence[str] = DEFAULT_GROUP, metric: str = "asr") -> list[dict[str, Any]]:
    """`Results(store).table(metric, group_by)`."""
    raise NotImplementedError
