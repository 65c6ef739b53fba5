"""YAML and JSON of others: plain values within limits, or one short line."""

from __future__ import annotations

import tracemalloc

import pytest

from backdoorlab.core.errors import ArtifactError, InputError
from backdoorlab.core.excerpt import brief, shown
from backdoorlab.core.records import VALUES, parse_json, parse_yaml


def bomb(levels: int = 9) -> bytes:
    """Nine aliases of nine aliases of ...: 9^levels values in a few hundred bytes."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines).encode()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1e-2", 0.01),
        ("a: 1.5E+3", 1500.0),
        ("a: -.5", -0.5),
        ("a: 5", 5),
        ("a: 010", 10),
        ("a: 0x1F", 31),
        ("a: 2024-01-01", "2024-01-01"),
        ("a: 1:30", "1:30"),
        ("a: =", "="),
        ("a:", None),
        ("a: no", False),
        ("a: '1e-2'", "1e-2"),
        ("x: &b {y: [1]}\na: *b", {"y": [1]}),
        ("x: &b {y: 1}\na: {<<: *b, z: 2}", {"y": 1, "z": 2}),
        ("a: 9223372036854775807", 2**63 - 1),
        ("\ufeffa: é", "é"),
    ],
)
def test_plain_values(text: str, value: object):
    assert parse_yaml(text.encode(), "f")["a"] == value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bomb(), "more than 20,000 values with all aliases followed"),
        (b"a: &a " + b"x" * 10_000 + b"\nb: [" + b"*a," * 5_000 + b"]", "more than 20,000 values"),
        (b"a: [" + b"1," * VALUES + b"]", "more than 20,000 values"),
        (b"#" * 300_000, "has 300,000 bytes; a YAML file may have at most 262,144"),
        (b"[" * 3_000, "line 1, column 51: more than 50 levels deep"),
        (b"{a: " * 3_000 + b"1" + b"}" * 3_000, "more than 50 levels deep"),
        (b"- " * 3_000, "more than 50 levels deep"),
        (b"&a [*a]", "an alias inside of what it names"),
        (b"a: " + b"9" * 5_000, "an integer of 5000 digits"),
        (b"a: 9223372036854775808", "expected at most 64 bits"),
        (b"a: 1\nb: 2\na: 3", "line 3, column 1: the key 'a' is given twice"),
        (b"1: x", "a key must be text, got '1'"),
        (b"[a]: x", "a key must be text, got a sequence"),
        (b"!!python/object/apply:os.getcwd []", "python/object/apply:os.getcwd'; only plain values"),
        (b"!!timestamp 2024-01-01", "only plain values"),
        (b"!!int x", "does not fit its tag"),
        (b"!!bool x", "does not fit its tag"),
        (b'"\\0"', "a NUL character"),
        (b'"\\ud800"', "half of a surrogate pair"),
        (b"\xff", "byte 0 is not UTF-8"),
        (b"a: *" + b"b" * 5_000, "found undefined alias"),
        (b"a: 1\n--- 2", "found another document"),
        (b"a: {", "line 1"),
    ],
)
def test_what_is_refused(content: bytes, message: str):
    with pytest.raises(InputError) as caught:
        parse_yaml(content, "f.yaml")
    text = str(caught.value)
    assert message in text
    assert text.startswith("f.yaml: ")
    assert "\n" not in text and len(text) < 300


def test_an_alias_bomb_takes_no_memory():
    parse_yaml(b"a: 1", "warm")
    tracemalloc.start()
    try:
        with pytest.raises(InputError):
            parse_yaml(bomb(30), "f")
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b"NaN", "NaN is no JSON number"),
        (b"1e999", "too large"),
        (b"9" * 5_000, "an integer of 5000 digits"),
        (b'"\\ud800"', "half of a surrogate pair"),
        (b'{"a":', "not valid JSON"),
        (b"\xff", "not valid JSON"),
    ],
)
def test_json_that_is_refused(content: bytes, message: str):
    with pytest.raises(ArtifactError, match=message) as caught:
        parse_json(content, "record.json")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_json_values():
    assert parse_json('{"a": [1, 2.5, null, "é\\ud83d\\ude00"]}'.encode(), "f") == {"a": [1, 2.5, None, "é😀"]}


def test_values_in_messages_are_short():
    nested: object = [1]
    for _ in range(60):
        nested = [nested] * 10  # 10^60 values, if they were all formatted
    for value in (nested, "x" * 10**6, 10**6000, {i: i for i in range(10**5)}, b"x" * 500, {"a": nested}):
        assert len(shown(value)) <= 80
    assert [shown(v) for v in (5, 1.5, True, None, "a'b", [1, "x"], {"a": 1})] == [
        "5",
        "1.5",
        "True",
        "None",
        '"a\'b"',
        "[1, 'x']",
        "{'a': 1}",
    ]
    assert brief("a\nb\x1b[31m") == "a b\\x1b[31m"
    assert len(brief("x" * 1000)) <= 80
