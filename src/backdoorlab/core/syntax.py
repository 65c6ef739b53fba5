"""What a source file does, as bytes for hashing: its syntax tree without what has no effect.

Left out are comments, layout, positions, docstrings and other strings that stand alone, and ``pass``. The text is made
here and not by :func:`ast.dump`, whose output differs between versions of Python (fields that are empty, new fields).
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_IGNORED = frozenset({"ctx", "kind", "type_comment", "type_ignores"})
"""Fields that follow from the place of a node, or that Python itself ignores."""


@functools.cache
def code_of(path: Path) -> bytes:
    """The tree of a Python file; equal bytes for files that differ in comments, docstrings and layout alone.

    A file that is not Python source (a compiled module), or not source of this version of Python, is taken as it is:
    its bytes are then the only thing known to change whenever what it does changes.

    Raises:
        OSError: if it cannot be read.
    """
    content = path.read_bytes()
    if path.suffix != ".py":
        return b"bytes\0" + content
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError):
        return b"bytes\0" + content
    return b"tree\0" + "".join(_written(tree)).encode(errors="backslashreplace")


def _written(value: Any) -> Iterator[str]:
    """A node, a list of nodes or a plain value; fields that are empty or None do not appear."""
    if isinstance(value, ast.AST):
        yield f"{type(value).__name__}("
        for name in value._fields:
            field = getattr(value, name, None)
            if isinstance(field, list):
                field = _acting(_joined(field) if isinstance(value, ast.JoinedStr) else field)
            if name in _IGNORED or field == [] or (field is None and not isinstance(value, ast.Constant)):
                continue
            yield f"{name}="
            yield from _written(field)
            yield ","
        yield ")"
    elif isinstance(value, list):
        yield "["
        for item in value:
            yield from _written(item)
            yield ","
        yield "]"
    else:
        yield f"{type(value).__name__}:{value!r}"


def _acting(nodes: list[Any]) -> list[Any]:
    """Without statements that do nothing: strings that stand alone, and pass."""
    return [node for node in nodes if not (isinstance(node, ast.Pass) or _is_text(node))]


def _is_text(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _joined(parts: list[Any]) -> list[Any]:
    """Parts of an f-string with neighbouring texts in one, however a version of Python cuts them."""
    merged: list[Any] = []
    for part in parts:
        text = isinstance(part, ast.Constant) and isinstance(part.value, str)
        if text and not part.value:
            continue
        if text and merged and isinstance(merged[-1], ast.Constant):
            merged[-1] = ast.Constant(merged[-1].value + part.value)
        else:
            merged.append(part)
    return merged
