"""Untrusted text (cards, class names, file names, messages), made harmless for terminals and spreadsheets.

A terminal executes escape sequences, shows text backwards after a bidirectional override and overwrites a line after a
carriage return; a spreadsheet runs a cell that begins like a formula. JSON needs none of this and keeps the true text.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

_JOINERS = "\u200c\u200d"
"""Of category Cf, needed by Persian and by emoji, without effect on what stands around them."""
_SPECIAL = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_FORMULA = re.compile(r"[\s\0]*[=+\-@\uff0b\uff0d\uff1d\uff20\t\r]")
_GUARDED = re.compile(r"'+[\s\0]*[=+\-@\uff0b\uff0d\uff1d\uff20\t\r]")


def visible(text: object, keep: str = "") -> str:
    """The text on one line, with all that a terminal would execute or hide written as an escape such as ``\\x1b``.

    Args:
        text: anything; ``str`` of it is taken.
        keep: control characters to leave as they are, such as line breaks.
    """
    raw = str(text)
    if raw.isascii() and raw.isprintable():
        return raw
    return "".join(c if c in keep or not _harmful(c) else _escaped(c) for c in raw)


def json_safe(text: str) -> str:
    """A JSON document, in which what :func:`visible` would escape is escaped as JSON does it: the value is the same.

    Args:
        text: from ``json.dumps``, where such characters can only stand inside of strings.
    """
    if text.isascii() and "\x7f" not in text:
        return text
    return "".join(c if c == "\n" or not _harmful(c) else _json_escape(c) for c in text)


def csv_cell(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula: an apostrophe in front of text that begins like one.

    Numbers, and texts that are numbers such as "-0.5", stay as they are. Text that already begins with apostrophes and
    then like a formula gets one more, so that :func:`from_csv_cell` gives back every text.
    """
    if not isinstance(value, str) or not (_FORMULA.match(value) or _GUARDED.match(value)) or _is_number(value):
        return value
    return f"'{value}"


def from_csv_cell(cell: str) -> str:
    """The text from which :func:`csv_cell` made the cell."""
    return cell[1:] if _GUARDED.match(cell) else cell


def markdown_cell(text: object) -> str:
    """A cell of a Markdown table: one line, its bars and backslashes before bars escaped."""
    return re.sub(r"(\\*)\|", r"\1\1\\|", visible(text))


def _harmful(char: str) -> bool:
    """Controls, formats (bidirectional marks, tags, soft hyphens), separators of lines and lone surrogates."""
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char not in _JOINERS


def _escaped(char: str) -> str:
    code = ord(char)
    if char in _SPECIAL:
        return _SPECIAL[char]
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _json_escape(char: str) -> str:
    code = ord(char)
    if code < 65536:
        return f"\\u{code:04x}"
    return f"\\u{0xD800 + (code - 0x10000 >> 10):04x}\\u{0xDC00 + (code - 0x10000 & 0x3FF):04x}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text and text.strip() == text
