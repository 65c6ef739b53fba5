"""Docstrings say what a method does; what runs of it showed stands on the results pages, with command and machine."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import backdoorlab

ROOT = Path(backdoorlab.__file__).parent
REPORT = re.compile(
    r"\b(ASR|ACC|AUROC)( of| is| was| were|:)? ?(about |only )?\d[\d.]*( %|\b)|\bSeen on\b|\b(one|two|three) seeds?\b",
    re.MULTILINE,
)
FILES = [
    path for folder in ("attacks", "defenses", "diffusion", "models") for path in sorted((ROOT / folder).rglob("*.py"))
]


def docstrings(path: Path) -> list[str]:
    nodes = [
        n
        for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)
    ]
    return [" ".join(text.split()) for text in (ast.get_docstring(n) for n in nodes) if text]


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(path.relative_to(ROOT).parts))
def test_docstrings_report_no_runs(path: Path) -> None:
    for text in docstrings(path):
        found = REPORT.search(text)
        assert found is None, f"... {text[max(0, found.start() - 60) : found.end() + 60]} ..."


@pytest.mark.parametrize(
    "text", ["ASR was 0.54 with it", "an AUROC of 0.97", "Seen on digits", "on three seeds", "ACC 0.77"]
)
def test_the_pattern_finds_reports(text: str) -> None:
    assert REPORT.search(text)
    assert not REPORT.search("ACC and ASR of 'accepted and'; DER of 0.5 means nothing happened")
