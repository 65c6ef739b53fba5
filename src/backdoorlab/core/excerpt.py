"""Values in messages: cut to a length that a person reads, without making the whole text first."""

from __future__ import annotations

import reprlib
from typing import Any

LENGTH = 80
"""Characters of a value that a message shows at most."""


def shown(value: Any) -> str:
    """``repr(value)`` cut to about :data:`LENGTH` characters.

    What is left out is never formatted: a list that holds itself a thousandfold, or an integer of a million digits,
    costs no more than a short one.
    """
    return brief(_REPR.repr(value))


def brief(text: str, length: int = LENGTH) -> str:
    """Foreign text as one line of at most ``length`` characters; its middle is left out if it is longer."""
    if len(text) > length:
        half = (length - 3) // 2
        text = f"{text[:half]}...{text[len(text) - half :]}"
    return "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in text).strip()


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxother = 3, LENGTH
        self.maxstring = self.maxlong = LENGTH - 2
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = 6

    def repr_int(self, value: int, level: int) -> str:
        return repr(value) if value.bit_length() < 256 else f"an integer of {value.bit_length()} bits"

    def repr_dict(self, value: dict[Any, Any], level: int) -> str:
        # As in the standard library, but the keys are not sorted, which would look at all of them.
        if level <= 0:
            return "{...}" if value else "{}"
        first = [key for key, _ in zip(value, range(self.maxdict), strict=False)]
        pieces = [f"{self.repr1(key, level - 1)}: {self.repr1(value[key], level - 1)}" for key in first]
        return "{" + ", ".join(pieces + ["..."] * (len(value) > self.maxdict)) + "}"

    def repr_instance(self, value: Any, level: int) -> str:
        if isinstance(value, (bool, float, complex, type(None))):
            return repr(value)
        return super().repr_instance(value, level) if _is_small(value) else f"a value of type {type(value).__name__}"


def _is_small(value: Any) -> bool:
    return not hasattr(value, "__len__") and not hasattr(value, "__dict__")


_REPR = _Short()
