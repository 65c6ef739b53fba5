"""Settings that users write, converted and checked in one place.

The same field may be given as text (``--set lr=1e-2``), as a value in a YAML or JSON file, or from Python. All three
are read by :func:`read_setting`, on top of pydantic.
"""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Collection, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, Strict, TypeAdapter, ValidationError

from backdoorlab.core.canonical import MAX_SEED
from backdoorlab.core.errors import InputError, nearest
from backdoorlab.core.excerpt import shown


def check_names(owner: str, settings: object, names: Collection[str], noun: str = "field") -> None:
    """Check that settings are a mapping with known names.

    Args:
        owner: of the fields, for messages.
        settings: what the user gave.
        names: of the fields that there are.
        noun: what the owner calls its fields.

    Raises:
        InputError: for anything but a mapping, and for a name that is not among ``names``, with the nearest one.
    """
    if not isinstance(settings, Mapping):
        raise InputError(f"{owner} must be a mapping, got {shown(settings)}")
    for name in settings:
        if name not in names:
            hint = nearest(name, names)
            raise InputError(f"{owner} has no {noun} {shown(name)}.{hint} It has: {', '.join(names)}")


def read_settings(owner: str, settings: Mapping[str, object], hints: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the right types.

    Args:
        owner: of the fields, for messages.
        settings: values, or text that stands for them, by field.
        hints: types of the fields, see :func:`read_setting`.

    Raises:
        InputError: for an unknown field or a value that is not of the field's type.
    """
    check_names(owner, settings, hints)
    return {name: read_setting(owner, name, value, hints[name]) for name, value in settings.items()}


def read_setting(owner: str, name: str, value: object, hint: Any) -> Any:
    """One value of the right type.

    Args:
        owner: of the field, for messages.
        name: of the field.
        value: of the type, or text that stands for it, such as ``1e-2``, ``yes`` or ``1, 2, 3``.
        hint: bool, int (64 bits), float, str, a tuple of one of these, or such a type or None; a value for a field of
            any other type is returned as it is.

    Raises:
        InputError: for a value that is not of the type.
    """
    kind, optional = _without_none(hint)
    if optional and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
        return None
    try:
        return _reader(kind).validate_python(_items(value) if typing.get_origin(kind) is tuple else value)
    except ValidationError as error:
        place = error.errors(include_url=False)[0]["loc"]
        raise InputError(f"{owner}: {name} must be {_expected(kind, place)}, got {_wrong(value, place)}.") from None


def check_seed(what: str, value: object) -> None:
    """Check a seed.

    Args:
        what: it is the seed of, for messages.
        value: what the user gave.

    Raises:
        InputError: for anything but an integer from 0 to :data:`MAX_SEED`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_SEED:
        raise InputError(f"{what} must be an integer from 0 to {MAX_SEED}, got {shown(value)}")


def type_name(hint: Any) -> str:
    """A type as help pages and messages call it."""
    kind, optional = _without_none(hint)
    name = str(getattr(kind, "__name__", kind))
    return f"{name} (optional)" if optional else name


def _without_none(hint: Any) -> tuple[Any, bool]:
    """The type behind ``X | None``, and whether None was allowed."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        return kinds[0], len(kinds) < len(typing.get_args(hint))
    return hint, False


def _expected(kind: Any, place: tuple[int | str, ...]) -> str:
    """What was expected, in words; ``place`` is empty unless one item of a tuple is wrong."""
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return _expected(item, ()) if place else f"a list of type {type_name(item)}"
    return "true or false" if kind is bool else f"of type {type_name(kind)}"


def _wrong(value: object, place: tuple[int | str, ...]) -> str:
    """What was given: the value, or one item of it."""
    items = _items(value) or () if place else ()
    return shown(next((item for i, item in enumerate(items) if place == (i,)), value))


@functools.cache
def _reader(kind: Any) -> TypeAdapter[Any]:
    """Pydantic's reader of a type."""
    if typing.get_origin(kind) is tuple:
        items: Any = types.GenericAlias(tuple, (_PLAIN.get(typing.get_args(kind)[0], Any), ...))
        return TypeAdapter(items)
    return TypeAdapter(_PLAIN.get(kind, Any))


def _items(value: object) -> list[object] | None:
    """Items of a list, or of text such as "1, 2, 3" or "[1, 2, 3]"; None for anything else."""
    if isinstance(value, str):
        value = value.replace("[", "").replace("]", "").split(",")
    if not isinstance(value, (list, tuple)):
        return None
    return [item.strip() if isinstance(item, str) else item for item in value]


def _number(value: object) -> object:
    """Anything but a truth value, which pydantic would take for 0 or 1."""
    if isinstance(value, bool):
        raise ValueError("a truth value")
    return value


def _whole_number(value: object) -> object:
    """The same; text such as "1e3" is a whole number too."""
    if isinstance(value, str) and not value.strip(" +-").isdecimal():
        return float(value)
    return _number(value)


_PLAIN: dict[Any, Any] = {
    bool: bool,
    int: Annotated[int, Field(gt=-(2**63), lt=2**63), BeforeValidator(_whole_number)],
    float: Annotated[float, BeforeValidator(_number)],
    str: Annotated[str, Strict()],
}
