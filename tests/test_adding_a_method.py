"""docs/adding-a-method.md, followed to the letter from a separate, installed package."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOC = Path(__file__).parents[1] / "docs" / "adding-a-method.md"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the package of the page was installed by pip."""
    source, target = tmp_path_factory.mktemp("bdl-frame"), tmp_path_factory.mktemp("site")
    blocks = re.findall(r"^`([\w/.]+)`(?:| holds one line):\n\n```\w+\n(.*?)^```", DOC.read_text(), re.M | re.S)
    assert [name for name, _ in blocks] == [
        "pyproject.toml",
        "bdl_frame/__init__.py",
        "bdl_frame/attack.py",
        "bdl_frame/defense.py",
    ]
    for name, text in blocks:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True)
    return target


def backdoorlab(site: Path, *args: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-m", "backdoorlab", *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_methods_of_another_package_are_listed_with_their_facts(site: Path) -> None:
    listed = json.loads(backdoorlab(site, "list", "attacks", "--modality", "image", "--json").stdout)
    frame = next(row for row in listed if row["name"] == "frame")
    assert (frame["year"], frame["threat_model"], frame["trigger_visibility"]) == (2026, "poisoning", "visible")
    assert "brightness" in [d["name"] for d in json.loads(backdoorlab(site, "list", "defenses", "--json").stdout)]


def test_their_hyper_parameters_are_documented_and_checked(site: Path) -> None:
    page = backdoorlab(site, "attack", "frame", "--help").stdout
    assert "width of the frame in pixels" in page
    refused = backdoorlab(site, "attack", "frame", "--set", "width=9")
    assert refused.returncode == 2
    assert "width" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_attack_and_defense_work_end_to_end(site: Path, tmp_path: Path) -> None:
    store = ["--store", str(tmp_path / "runs"), "--json"]
    command = ["attack", "frame", "--dataset", "digits", "--recipe", "smoke", "--poison-rate", "0.05"]
    planted = backdoorlab(site, *command, "--set", "width=1", *store)
    assert planted.returncode == 0, planted.stderr
    attack = json.loads(planted.stdout)
    assert attack["metrics"]["asr"] > 0.9
    assert attack["metrics"]["acc"] > 0.9
    found = backdoorlab(site, "defend", "brightness", "--run", attack["key"][:8], "--no-retrain", *store)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["metrics"]["auroc"] > 0.95
