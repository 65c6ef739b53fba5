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
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from backdoorlab.core.errors import InputError, nearest
from backdoorlab.core.excerpt import shown
from backdoorlab.core.paths import exists, files_below, is_folder, read_bytes, user_path
from backdoorlab.core.settings import check_names, read_setting, type_name
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
        """Convert every value that is not the default to its field's type, and check it against the declared range.

        Raises:
            InputError: naming the hyper-parameter, the value given and what was expected.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not field.default:
                value = read_setting(self.name, field.name, value, _hints(type(self))[field.name])
                object.__setattr__(self, field.name, value)
            _check_range(self.name, field, value)

    @classmethod
    def facts(cls) -> dict[str, Any]:
        """Facts of the method as JSON-able values."""
        common = {"name": cls.name, "paper": cls.paper, "year": cls.year, "modalities": list(cls.modalities)}
        return common | {"aliases": list(cls.aliases)} | {name: getattr(cls, name) for name in cls.fact_names}

    @classmethod
    def parameters(cls) -> list[ParamInfo]:
        """All hyper-parameters with type, default, range and source."""
        hints = _hints(cls)
        return [
            ParamInfo(
                f.name,
                type_name(hints[f.name]),
                f.default,
                f.metadata.get("help", ""),
                _range(f),
                f.metadata.get("source", ""),
            )
            for f in dataclasses.fields(cls)
        ]

    @classmethod
    def build(cls, settings: Mapping[str, Any]) -> Self:
        """Make the method from names and values, which may be text as after ``--set``.

        Raises:
            InputError: for an unknown name or a value that does not fit.
        """
        check_names(cls.name, settings, [f.name for f in dataclasses.fields(cls)], "hyper-parameter")
        return cls(**settings)

    def settings(self) -> dict[str, Any]:
        """All hyper-parameters with their values, JSON-able."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def changed(self) -> dict[str, Any]:
        """The hyper-parameters that differ from their defaults, with their values."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}

    def file_digests(self, only: Collection[str] | None = None) -> dict[str, str]:
        """Hash of the content behind each hyper-parameter that names files or folders, where one is given.

        Args:
            only: of these hyper-parameters; None takes all.

        Raises:
            InputError: if there is no such file or folder.
        """
        names = [f.name for f in dataclasses.fields(self) if f.metadata.get("path")]
        paths = {name: getattr(self, name) for name in names if only is None or name in only}
        return {name: _content(self.name, name, value) for name, value in paths.items() if value is not None}

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
    for name in (value,) if isinstance(value, str) else value:
        if not name.strip():  # as a path it would be the working directory, with all that is below it
            raise InputError(f"{owner}: {field}: expected a file or folder, got nothing")
        base = user_path(name)
        if not exists(base):
            raise InputError(f"{owner}: found no file or folder {name!r} for {field}")
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
    files: set[Path] = set()
    pending, visited = [cls.__module__], {cls.__module__}
    while pending:
        module = sys.modules[pending.pop()]
        try:
            files.add(Path(inspect.getfile(module)))
        except TypeError:
            raise InputError(
                f"{getattr(cls, 'name', cls.__name__)}: its code was typed in, not read from a file, so that results "
                "could not be told from those of other code; write it to a .py file and import that"
            ) from None
        for value in vars(module).values():
            name = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None)
            inside = isinstance(name, str) and (name == family or name.startswith((f"{family}.", _SHARED)))
            if inside and name not in visited and not _is_contract(str(name)) and name in sys.modules:
                visited.add(str(name))
                pending.append(str(name))
    return files


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


def _check_range(owner: str, field: dataclasses.Field[Any], value: Any) -> None:
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
