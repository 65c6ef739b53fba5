"""Errors that users may see. Each names the value, what was expected and the nearest valid choice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from backdoorlab.core.excerpt import shown


class BackdoorLabError(Exception):
    """Base of every error that this library raises on purpose; the command line prints it without a traceback."""

    exit_code = 1


class InputError(BackdoorLabError, ValueError):
    """The user's input cannot be used (exit code 2)."""

    exit_code = 2


class ArtifactError(InputError):
    """A stored artifact is missing, truncated, tampered with or of a foreign format."""


class MissingExtra(InputError):
    """A feature needs an optional dependency that is not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs an optional dependency; install it with: pip install 'backdoorlab[{extra}]'")


class NotApplicable(BackdoorLabError):
    """A method cannot be applied to this model or data; the benchmark records the reason instead of a number."""


class DataWarning(UserWarning):
    """Data that can be used, but perhaps not as meant; the command line prints it as one line."""


def nearest(value: object, choices: Iterable[str]) -> str:
    """Return a short hint such as " Did you mean 'badnets'?" or an empty string."""
    if not isinstance(value, str) or len(value) > 200:  # no misspelled name
        return ""
    close = difflib.get_close_matches(value.lower(), list(choices), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def unknown(kind: str, value: object, choices: Iterable[str]) -> InputError:
    """Build the error for a name that is not among the choices."""
    names = sorted(choices)
    choice = ", ".join(names[:40]) + (", ..." if len(names) > 40 else "")
    return InputError(f"unknown {kind} {shown(value)}.{nearest(value, names)} Choose one of: {choice}")
