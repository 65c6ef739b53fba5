"""Values as JSON: plain ones made of tuples, arrays and tensors, and one text per value for hashing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

MAX_SEED = 2**63 - 1
"""Largest seed: what a signed 64-bit integer holds, in tables and generators alike."""


def canonical(record: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text.

    Raises:
        ValueError: for a number that is not finite.
    """
    return dump_canonical(jsonable(record))


def dump_canonical(plain: Any) -> str:
    """The same for what was read from JSON, or came out of :func:`jsonable`.

    Raises:
        ValueError: for a number that is not finite.
    """
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def jsonable(value: Any) -> Any:
    """Tuples as lists, mappings as dicts, arrays and tensors (all that has ``tolist``) as lists or numbers."""
    if value is None or type(value) in (str, bool, int, float):
        return value
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    return jsonable(value.tolist()) if hasattr(value, "tolist") else value
