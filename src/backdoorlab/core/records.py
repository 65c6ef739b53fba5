"""YAML and JSON that others wrote, read into plain values within limits.

Both formats have short documents that stand for huge or endless values: aliases of aliases, lists that hold themselves,
ten thousand brackets, integers of any length. What is read here is bounded in bytes, depth and number of values *after*
aliases are followed, and consists of null, truth values, finite 64-bit numbers, text, lists and mappings with text as
keys; nothing else is ever built. The error for a document that is refused is one line and shows little of it.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, ClassVar

import yaml

from backdoorlab.core.errors import ArtifactError, InputError
from backdoorlab.core.excerpt import brief

YAML_BYTES = 256 * 1024
"""Most bytes of a YAML document: thirty times the largest grid that a person would write."""
JSON_BYTES = 64 * 1024 * 1024
"""Most bytes of a JSON document; a card or record with per-sample numbers has some megabytes."""
DEPTH = 50
"""Most levels of lists and mappings inside of each other."""
VALUES = 20_000
"""Most values of a YAML document with its aliases followed; 100 characters of text count as one more."""
_INTEGERS = range(-(2**63), 2**63)
_DIGITS = 400
"""Longest integer that is converted at all, to see whether it fits; a float of full range has 309 digits."""


def parse_yaml(content: bytes, where: str) -> Any:
    """A YAML document as plain values.

    As PyYAML's safe loader reads it, except that numbers are those of YAML 1.2 (``1e-2`` is one, ``010`` is ten,
    ``1:30`` is none), dates are text, and a key that is given twice is an error.

    Args:
        content: UTF-8.
        where: name of the file, for messages.

    Raises:
        InputError: one line with line and column.
    """
    if len(content) > YAML_BYTES:
        raise InputError(f"{where}: has {len(content):,} bytes; a YAML file may have at most {YAML_BYTES:,}")
    try:
        loader = _Loader(content.decode("utf-8-sig"))
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not valid YAML: byte {error.start} is not UTF-8") from None
    except yaml.MarkedYAMLError as error:
        mark: Any = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise InputError(f"{where}: not valid YAML: {place}{brief(error.problem or 'cannot be read', 200)}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not valid YAML: {brief(str(error), 200)}") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # "!!int x", "!!bool x", ...
        raise InputError(f"{where}: not valid YAML: a value does not fit its tag ({brief(str(error))})") from None


def parse_json(content: bytes, where: str) -> Any:
    """A JSON document as plain values.

    Args:
        content: UTF-8.
        where: name of the file, for messages.

    Raises:
        ArtifactError: one line naming the file.
    """
    if len(content) > JSON_BYTES:
        raise ArtifactError(f"{where}: has {len(content):,} bytes; a record may have at most {JSON_BYTES:,}")
    try:
        text = content.decode()
        value = json.loads(text, parse_int=_json_int, parse_float=_json_float, parse_constant=_no_constant)
        if "\\ud" in text or "\\uD" in text:
            _expect_text(value)
    except (ValueError, RecursionError) as error:
        problem = "nested too deeply" if isinstance(error, RecursionError) else brief(str(error), 200)
        raise ArtifactError(f"{where}: not valid JSON ({problem})") from None
    return value


def _json_int(text: str) -> int:
    if len(text) > _DIGITS or int(text) not in _INTEGERS:
        raise ValueError(f"an integer of {len(text)} digits; expected at most 64 bits")
    return int(text)


def _json_float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {brief(text)} is too large")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _expect_text(value: Any) -> None:
    """Refuse halves of surrogate pairs, which no file or terminal can hold."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("a text holds half of a surrogate pair") from None


_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Composes nodes while counting them; builds plain values only."""

    yaml_constructors: ClassVar[dict[Any, Any]] = {
        _TAG + name: yaml.SafeLoader.yaml_constructors[_TAG + name] for name in ("null", "bool", "float", "seq", "map")
    }
    yaml_implicit_resolvers: dict[Any, Any] = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag.removeprefix(_TAG) in ("null", "bool", "merge")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.values = self.depth = 0
        self.sizes: dict[int, int] = {}
        self.heights: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """One node; an alias counts as much as what it names."""
        event: Any = self.peek_event()
        before = self.values
        if isinstance(event, yaml.AliasEvent):
            mark: Any = event.start_mark
            node: Any = super().compose_node(parent, index)
            if id(node) not in self.sizes:
                raise yaml.MarkedYAMLError(problem="an alias inside of what it names", problem_mark=mark)
            self._grow(self.sizes[id(node)], self.heights[id(node)], mark)
            return node
        self.depth += 1
        text = event.value if isinstance(event, yaml.ScalarEvent) else ""
        self._grow(1 + len(text) // 100, 0, event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        self.sizes[id(node)] = self.values - before
        self.heights[id(node)] = 1 + max((self.heights[id(child)] for child in _children(node)), default=0)
        return node

    def _grow(self, size: int, height: int, mark: Any) -> None:
        self.values += size
        if self.values > VALUES:
            problem = f"more than {VALUES:,} values with all aliases followed"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        if self.depth + height > DEPTH:
            raise yaml.MarkedYAMLError(problem=f"more than {DEPTH} levels deep", problem_mark=mark)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping with distinct texts as keys."""
        if isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, _ in node.value:
                if key.tag == _TAG + "merge":
                    continue
                if key.tag != _TAG + "str":
                    shown = repr(brief(key.value)) if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
                    problem = f"a key must be text, got {shown} (quote it)"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                if key.value in keys:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {brief(key.value)!r} is given twice", problem_mark=key.start_mark
                    )
                keys.add(key.value)
        return dict(super().construct_mapping(node, deep))


def _children(node: Any) -> list[Any]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _integer(loader: _Loader, node: Any) -> int:
    text = loader.construct_scalar(node)
    base = {"0x": 16, "0o": 8}.get(text[:2], 10)
    value = int(text, base) if len(text) <= _DIGITS else None
    if value is None or value not in _INTEGERS:
        problem = f"an integer of {len(text)} digits; expected at most 64 bits"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    return value


def _text(loader: _Loader, node: Any) -> str:
    text = str(loader.construct_scalar(node))
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        problem = "a text with a NUL character or half of a surrogate pair"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    return text


def _refused(loader: _Loader, node: Any) -> Any:
    problem = f"a value with the tag {brief(node.tag)!r}; only plain values are read"
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


_Loader.add_constructor(_TAG + "int", _integer)
_Loader.add_constructor(_TAG + "str", _text)
_Loader.add_constructor(None, _refused)
_Loader.add_implicit_resolver(
    _TAG + "int", re.compile(r"^([-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    _TAG + "float",
    re.compile(r"^([-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+0123456789."),
)
