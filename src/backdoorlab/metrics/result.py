"""Metrics together with the reasons for those that are missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Metrics(Mapping[str, Any]):
    """Values by name; reads like a dictionary.

    Attributes:
        entries: numbers, lists of numbers, words, or None where there is nothing to say.
        reasons: why a value is None.
    """

    entries: Mapping[str, Any]
    reasons: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __or__(self, other: Mapping[str, Any]) -> Metrics:
        """Both, the other's values and reasons winning."""
        more = other.reasons if isinstance(other, Metrics) else {}
        return Metrics({**self.entries, **other}, {**self.reasons, **more})

    def __ror__(self, other: Mapping[str, Any]) -> Metrics:
        """A dictionary and these, these winning."""
        return Metrics(dict(other)) | self
