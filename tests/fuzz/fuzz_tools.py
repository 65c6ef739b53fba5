"""What the fuzz tests share: calls of the command line, ways to damage files, and what may come of it.

A command that meets damaged or hostile input has two ways to end: with a result (exit code 0), or with exit code 2 and
one line on standard error that says what is wrong. Everything else is a bug: another code, a traceback, several
errors, a line as long as the input, control characters of the input on the terminal.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import struct
import unicodedata
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backdoorlab.cli.main import run


@dataclass(frozen=True)
class Reply:
    code: int
    out: str
    err: str


def call(*argv: object) -> Reply:
    """One command line, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(a) for a in argv])
    return Reply(code, out.getvalue(), err.getvalue())


def expect_result_or_one_line(reply: Reply, *, also: tuple[int, ...] = ()) -> None:
    """Exit code 0, or 2 with one error; ``also`` are further codes that a command documents."""
    lines = [line for line in reply.err.splitlines() if line.strip()]
    assert reply.code in (0, 2, *also), f"exit code {reply.code}: {reply.err[-1500:]}"
    assert "Traceback" not in reply.err and "(a bug, or" not in reply.err, reply.err[-1500:]
    if reply.code == 2:
        said = [line for line in lines if not line.startswith(("warning: ", "Usage: "))]
        assert len(said) == 1 and said[0].startswith("error: "), f"not one line: {reply.err[:1500]}"
    for line in lines:
        assert len(line) < 3000, f"a line of {len(line)} characters: {line[:300]}"
        assert not any(map(_steers, line)), f"control characters: {ascii(line)[:300]}"


def _steers(character: str) -> bool:
    """Does it move the cursor, turn the direction of writing, or is it no character at all?"""
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(character) in (
        "LRE",
        "RLE",
        "LRO",
        "RLO",
        "PDF",
        "LRI",
        "RLI",
        "FSI",
        "PDI",
    )


def fuzzed(strategy: st.SearchStrategy[Any], quick: int = 40, long: int = 1500) -> Callable[[Any], Any]:
    """Make a test of a function that takes the fixture ``lab``, a folder, pytest's monkeypatch and a drawn case.

    ``make test`` runs ``quick`` examples, always the same ones; ``make test-slow`` runs ``long`` ones.
    """

    def wrap(check: Callable[..., None]) -> Any:
        @pytest.mark.parametrize(
            "examples", [pytest.param(quick, id="quick"), pytest.param(long, id="long", marks=pytest.mark.slow)]
        )
        def test(examples: int, lab: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
            monkeypatch.chdir(tmp_path)

            @settings(
                max_examples=examples,
                derandomize=True,
                database=None,
                deadline=None,
                print_blob=False,
                suppress_health_check=list(HealthCheck),
            )
            @given(strategy)
            def try_it(case: Any) -> None:
                check(lab, tmp_path, monkeypatch, case)

            try_it.hypothesis.inner_test.__name__ = check.__name__  # the examples are drawn by the name
            try_it()

        test.__doc__ = check.__doc__
        return test

    return wrap


# Bytes

_EXTREMES = (b"\x00", b"\xff", b"\x7f", b"\x80", b"\x01")
_place = st.integers(0, 2**16 - 1)
"""A position in a file, as a share of its length; small files are reached everywhere."""

byte_changes = st.lists(
    st.one_of(
        st.tuples(st.just("cut"), _place, st.just(b"")),
        st.tuples(st.just("flip"), _place, st.integers(0, 7).map(lambda b: bytes([1 << b]))),
        st.tuples(
            st.just("set"),
            _place,
            st.tuples(st.sampled_from(_EXTREMES), st.sampled_from((1, 2, 4, 8))).map(lambda t: t[0] * t[1]),
        ),
        st.tuples(
            st.just("head"),
            st.integers(0, 127),
            st.tuples(st.sampled_from(_EXTREMES), st.sampled_from((1, 2, 4))).map(lambda t: t[0] * t[1]),
        ),
        st.tuples(st.just("insert"), _place, st.binary(min_size=1, max_size=40)),
        st.tuples(st.just("remove"), _place, st.binary(min_size=1, max_size=40)),
        st.tuples(st.just("double"), _place, st.binary(min_size=1, max_size=40)),
        st.tuples(st.just("replace"), _place, st.binary(max_size=300)),
        st.tuples(st.just("append"), _place, st.binary(min_size=1, max_size=40)),
    ),
    min_size=1,
    max_size=4,
)


def change_bytes(content: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    """Cut, flip, overwrite, insert, remove or repeat."""
    for what, place, payload in changes:
        at = place if what == "head" else place * len(content) >> 16
        end = at + len(payload)
        if what == "cut":
            content = content[:at]
        elif what == "flip" and content:
            content = content[:at] + bytes([content[at] ^ payload[0]]) + content[at + 1 :]
        elif what in ("set", "head"):
            content = content[:at] + payload + content[end:]
        elif what == "insert":
            content = content[:at] + payload + content[at:]
        elif what == "remove":
            content = content[:at] + content[end:]
        elif what == "double":
            content = content[:end] + content[at:]
        elif what == "replace":
            content = payload
        elif what == "append":
            content = content + payload
    return content


def mended_png(content: bytes) -> bytes:
    """The same PNG with right checksums, so that a reader goes beyond them; as it is if it has no chunks any more."""
    out, at = content[:8], 8
    while at + 12 <= len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        body = content[at + 4 : at + 8 + length]
        if at + 12 + length > len(content):
            break
        out += content[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return out + content[at:]


# Values

NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 1.5, -0.5, 2**31, 2**63, -(2**63), 10**30, 1e308, 1e-320),
    *(float("nan"), float("inf"), "", " ", "x", "none", "nan", "no", "1e-2", "5", "a" * 300, "\x00", "\ud800", "\n"),
    *("\x1b[31m", "é", "[red]x[/]", "{}", "%s%n", "..", "../../etc/passwd", "/dev/zero", "/", "2024-01-01"),
    *([], {}, [[]], [None], {"a": None}, {"": 1}, [1, "x"], ["x"] * 500),
)
"""Values of every type, ends of ranges, and text that means something to a shell, terminal, path or template."""

value_changes = st.lists(
    st.tuples(
        st.sampled_from(("set", "set", "set", "delete", "double", "rename", "swap", "wrap")),
        st.integers(0, 2**16 - 1),
        st.integers(0, 2**16 - 1),
    ),
    min_size=1,
    max_size=3,
)


def change_values(document: Any, changes: list[tuple[str, int, int]]) -> Any:
    """Replace, drop, double, rename, swap or nest values anywhere in a document of lists and mappings."""
    document = {"": copy.deepcopy(document)}
    for what, place, choice in changes:
        slots = list(_slots(document))
        holder, key = slots[place % len(slots)]
        nasty = copy.deepcopy(NASTY[choice % len(NASTY)])
        if what == "set":
            holder[key] = nasty
        elif what == "delete" and holder is not document:
            del holder[key]
        elif what == "double":
            holder[key] = [holder[key]] * 3
        elif what == "rename" and isinstance(holder, dict) and holder is not document:
            holder[str(nasty)] = holder.pop(key)
        elif what == "swap":
            other, name = slots[choice % len(slots)]
            holder[key] = copy.deepcopy(other[name])
        elif what == "wrap":
            for _ in range((1, 5, 60, 900)[choice % 4]):
                holder[key] = [holder[key]] if choice % 8 < 4 else {"a": holder[key]}
    return document[""]


def _slots(value: Any) -> Any:
    """(list or mapping, key) of every value in it."""
    waiting = [value]
    while waiting:
        holder = waiting.pop()
        for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
            yield holder, key
            if isinstance(holder[key], (dict, list)):
                waiting.append(holder[key])


def as_json(document: Any) -> bytes:
    """JSON, with NaN and halves of surrogate pairs where there are such; the nesting may be deep."""
    try:
        return json.dumps(document).encode()
    except RecursionError:
        return b'{"a":' * 5000
