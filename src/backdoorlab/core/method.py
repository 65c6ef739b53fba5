"""What an attack and a defense have in common: declared facts and checked, documented hyper-parameters.

A method is a frozen dataclass. Its class variables are facts (name, paper, year, ...), its fields hyper-parameters.
Every field is declared with :func:`param`, which carries the help text, the legal range and the source of the default;
the command line's ``--help``, the docs tables and the range checks are all made from it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from backdoorlab.core.errors import InputError, nearest
from backdoorlab.core.excerpt import shown
from backdoorlab.core.paths import exists, files_below, is_folder, read_bytes, user_path
from backdoorlab.core.syntax import code_of


def param(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[Any, ...] | None = None,
    source: str = "",
    path: bool = False,
) -> Any:
    """Declare a hyper-parameter.

    Args:
        default: value used when the user gives none.
        help: one line saying what it is, with its unit.
        low: smallest legal value (inclusive).
        high: largest legal value (inclusive).
        above: bound that the value must exceed (exclusive).
        choices: the only legal values.
        source: where the default comes from ("paper", "BackdoorBench", "ours").
        path: the value names a file or folder of the user's (or is a tuple of such); results are then kept by its
            content, not its name.
    """
    meta = {"help": help, "low": low, "high": high, "above": above, "choices": choices, "source": source, "path": path}
    return dataclasses.field(default=default, metadata=meta)


@dataclasses.dataclass(frozen=True)
class ParamInfo:
    """One hyper-parameter as users see it."""

    name: str
    type: str
    default: Any
    help: str
    range: str
    source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """Base of attacks and defenses: facts as class variables, hyper-parameters as fields."""

    name: ClassVar[str]
    paper: ClassVar[str]
    year: ClassVar[int]
    modalities: ClassVar[tuple[str, ...]]
    aliases: ClassVar[tuple[str, ...]] = ()
    """Other names that the literature uses; commands understand them."""
    fact_names: ClassVar[tuple[str, ...]] = ()
    """Names of further class variables that ``list --json`` shows."""

    def __post_init__(self) -> None:
        """Check every field against its declared range.

        Raises:
            InputError: naming the hyper-parameter, the value given and the range expected.
        """
        for field in dataclasses.fields(self):
            _check(type(self).name, field, getattr(self, field.name))

    @classmethod
    def facts(cls) -> dict[str, Any]:
        """Facts of the method as JSON-able values."""
        own = {"name": cls.name, "paper": cls.paper, "year": cls.year, "modalities": list(cls.modalities)}
        own |= {"aliases": list(cls.aliases)}
        return own | {name: getattr(cls, name) for name in cls.fact_names}

    @classmethod
    def parameters(cls) -> list[ParamInfo]:
        """All hyper-parameters with type, default, range and source."""
        hints = _hints(cls)
        return [
            ParamInfo(
                f.name,
                _type_name(hints[f.name]),
                f.default,
                f.metadata.get("help", ""),
                _range(f),
                f.metadata.get("source", ""),
            )
            for f in dataclasses.fields(cls)
        ]

    @classmethod
    def build(cls, settings: Mapping[str, Any]) -> Self:
        """Make the method from names and values; strings (from ``--set``) are converted to the field's type.

        Raises:
            InputError: for an unknown name or a value that does not fit.
        """
        hints = _hints(cls)
        fields = {f.name: f for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for key, value in settings.items():
            if key not in fields:
                raise InputError(
                    f"{cls.name} has no hyper-parameter {shown(key)}.{nearest(key, fields)} It has: {', '.join(fields)}"
                )
            values[key] = convert(cls.name, key, value, hints[key])
        return cls(**values)

    def settings(self) -> dict[str, Any]:
        """All hyper-parameters with their values, JSON-able."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def changed(self) -> list[str]:
        """Names of the hyper-parameters that differ from their defaults."""
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]

    def file_digests(self, only: Collection[str] | None = None) -> dict[str, str]:
        """Hash of the content behind each hyper-parameter that names files or folders, where one is given.

        Args:
            only: of these hyper-parameters; None takes all.

        Raises:
            InputError: if there is no such file or folder.
        """
        names = [f.name for f in dataclasses.fields(self) if f.metadata.get("path")]
        given = {name: getattr(self, name) for name in names if only is None or name in only}
        return {name: _content(self.name, name, value) for name, value in given.items() if value is not None}

    @classmethod
    def code_digest(cls) -> str:
        """Hash of the code that makes the method: its file and the files beside it that it is built from.

        "Beside it" is the same family of modules (``backdoorlab.attacks``, a plug-in's own package); a changed method
        gets new results, not old ones. The library's own contracts do not count: they have a version of their own.
        What counts is the syntax tree: comments, docstrings and layout may change.

        Raises:
            InputError: if the class was not defined in a file.
        """
        return _code_digest(cls)


def _digest_sources(cls: type) -> str:
    digest = hashlib.sha256()
    for path in sorted(_sources(cls)):
        digest.update(hashlib.sha256(code_of(path)).digest())
    return digest.hexdigest()[:16]


# Once per class: the code that runs is the one that was imported, whatever happens to its file afterwards.
_hints: Callable[[type], dict[str, Any]] = functools.cache(typing.get_type_hints)
_code_digest: Callable[[type], str] = functools.cache(_digest_sources)


def _content(owner: str, field: str, value: str | tuple[str, ...]) -> str:
    """Hash of a file, of all files below a folder with their names, or of several of these in turn."""
    digest = hashlib.sha256()
    for given in (value,) if isinstance(value, str) else value:
        if not given.strip():  # as a path it would be the working directory, with all that is below it
            raise InputError(f"{owner}: {field}: expected a file or folder, got nothing")
        base = user_path(given)
        if not exists(base):
            raise InputError(f"{owner}: found no file or folder {given!r} for {field}")
        below = files_below(base, hidden=True) if is_folder(base) else [base]
        for file in below:
            try:
                content = hashlib.sha256(read_bytes(file)).digest()
            except InputError as error:
                raise InputError(f"{owner}: {field}: {error}") from None
            digest.update(f"{file.relative_to(base).as_posix()}\0".encode() + content)
        digest.update(b"\0")
    return digest.hexdigest()[:20]


def _sources(cls: type) -> set[Path]:
    """Files of a class's module and, transitively, of the modules of its family whose names it uses."""
    family = ".".join(
        cls.__module__.split(".")[:2] if cls.__module__.startswith("backdoorlab.") else cls.__module__.split(".")[:1]
    )
    found: set[Path] = set()
    waiting, seen = [cls.__module__], {cls.__module__}
    while waiting:
        module = sys.modules[waiting.pop()]
        try:
            found.add(Path(inspect.getfile(module)))
        except TypeError:
            raise InputError(
                f"{getattr(cls, 'name', cls.__name__)}: its code was typed in, not read from a file, so that results "
                "could not be told from those of other code; write it to a .py file and import that"
            ) from None
        for value in vars(module).values():
            name = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None)
            inside = isinstance(name, str) and (name == family or name.startswith((f"{family}.", _SHARED)))
            if inside and name not in seen and not _is_contract(str(name)) and name in sys.modules:
                seen.add(str(name))
                waiting.append(str(name))
    return found


_CONTRACTS = re.compile(
    r"backdoorlab\.(attacks\.(base|files|poisoning|result|selection|targets|triggers\.base)|defenses\.(base|view))"
)
_SHARED = "backdoorlab.models.networks."
"""Networks that methods are built from: they count as if they lay beside the method."""


def _is_contract(module: str) -> bool:
    return _CONTRACTS.fullmatch(module) is not None


def _range(field: dataclasses.Field[Any]) -> str:
    meta = field.metadata
    if meta.get("choices"):
        return " | ".join(map(str, meta["choices"]))
    parts = []
    if meta.get("above") is not None:
        parts.append(f"> {meta['above']:g}")
    if meta.get("low") is not None:
        parts.append(f">= {meta['low']:g}")
    if meta.get("high") is not None:
        parts.append(f"<= {meta['high']:g}")
    return " and ".join(parts)


def _check(owner: str, field: dataclasses.Field[Any], value: Any) -> None:
    meta, wrong = field.metadata, False
    if value is None:
        return
    if meta.get("choices"):
        wrong = value not in meta["choices"]
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        wrong = not math.isfinite(value)
        wrong |= meta.get("low") is not None and value < meta["low"]
        wrong |= meta.get("high") is not None and value > meta["high"]
        wrong |= meta.get("above") is not None and value <= meta["above"]
    if wrong:
        hint = nearest(value, map(str, meta["choices"])) if meta.get("choices") and isinstance(value, str) else ""
        expected = f"must be {_range(field)}" if _range(field) else "must be a finite number"
        raise InputError(f"{owner}: {field.name} {expected}, got {shown(value)}.{hint}")


def _type_name(hint: Any) -> str:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join(_type_name(a) for a in typing.get_args(hint) if a is not type(None)) + " (optional)"
    return getattr(hint, "__name__", str(hint))


def convert(owner: str, key: str, value: Any, hint: Any) -> Any:
    """Convert a value to an annotated type: how every field that users set is read, from a command line or a file.

    Args:
        owner: of the field, for messages.
        key: the field.
        value: a value of the type, or text that stands for one, such as ``1e-2``, ``yes`` or ``1, 2, 3``.
        hint: bool, int, float, str, a tuple of one of these, or such a type or None.

    Raises:
        InputError: for a value that is not of the type.
    """
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        items = value.replace("[", "").replace("]", "").split(",") if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            raise InputError(f"{owner}: {key} must be a list of type {_type_name(inner)}, got {shown(value)}.")
        return tuple(convert(owner, key, item.strip() if isinstance(item, str) else item, inner) for item in items)
    failure = InputError(f"{owner}: {key} must be of type {_type_name(hint)}, got {shown(value)}.")
    if hint is bool:
        if isinstance(value, bool):
            return value
        table = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if not isinstance(value, (str, int)) or str(value).lower() not in table:
            raise InputError(f"{owner}: {key} must be true or false, got {shown(value)}.")
        return table[str(value).lower()]
    if hint in (int, float):
        if isinstance(value, bool):
            raise failure
        if hint is int and isinstance(value, int):
            number: float = value  # not through float, which holds 53 bits
        else:
            try:
                number = float(value)
                if hint is int and number == int(number):
                    number = int(value) if isinstance(value, str) and value.strip("+- ").isdecimal() else int(number)
            except (TypeError, ValueError, OverflowError):
                raise failure from None
        if hint is int and (not isinstance(number, int) or abs(number) >= 2**63):
            raise failure
        return number
    if hint is str:
        if not isinstance(value, str):
            raise failure
        return value
    return value
