"""``backdoorlab export`` and the figure of ``show``: what a person and a script see."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from backdoorlab.analysis.figures import frequency_residual, in_colors
from backdoorlab.modalities.filters import inverse_dct


def test_export_and_train_on_it(cli: Callable[..., Any], lab: Any, tmp_path: Path) -> None:
    place = tmp_path / "poisoned"
    reply = cli("export", lab.attack[:8], "--out", place, "--store", lab.store)
    assert reply.code == 0, reply.err
    assert f"attack/{lab.attack}" in reply.out
    assert f"--dataset folder:{place}" in reply.out
    assert "replay" not in reply.out
    assert len(list((place / "train").rglob("*.png"))) == 1437
    # a benign run on the exported data is a victim: the poison is in the files
    argv = ("attack", "none", "--dataset", f"folder:{place}", *lab.fast, "--store", tmp_path / "s", "--json")
    victim = cli(*argv)
    assert victim.code == 0, victim.err
    stamped = sorted((place / "test_triggered").rglob("*.png"))[:100]
    said = cli("predict", *stamped, "--run", victim.json["key"], "--store", tmp_path / "s", "--json").json
    innocent = cli("predict", *stamped, "--run", lab.benign, "--store", lab.store, "--json").json
    fooled, right = (np.mean([row["class"] == 0 for row in rows]) for rows in (said, innocent))
    assert fooled > 0.8
    assert right < 0.2


def test_export_json(cli: Callable[..., Any], lab: Any, tmp_path: Path) -> None:
    place = tmp_path / "x"
    argv = ("export", f"attack/{lab.attack}", "--out", place, "--format", "npz", "--store", lab.store, "--json")
    told = cli(*argv).json
    assert told["folder"] == str(place)
    assert told == json.loads((place / "export.json").read_text()) | {"folder": str(place)}
    assert sorted(told["sha256"]) == ["test.npz", "test_triggered.npz", "train.npz"]
    assert cli(*argv).code == 2
    assert cli(*argv, "--force").json == told
    assert "not readable as a data set" in cli(*argv[:-1], "--force").out


def test_a_replay_is_announced(cli: Callable[..., Any], tmp_path: Path) -> None:
    short = ("--recipe", "smoke", "--recipe-set", "min_steps=2", "--recipe-set", "epochs=1")
    argv = ("attack", "wanet", "--train-size", "200", "--test-size", "50", *short, "--store", tmp_path / "s", "--json")
    run = cli(*argv).json["key"]
    reply = cli("export", run, "--out", tmp_path / "x", "--store", tmp_path / "s")
    assert reply.code == 0, reply.err
    assert "replay: The attacker controlled training" in " ".join(reply.out.split())
    told = cli("export", run, "--out", tmp_path / "y", "--store", tmp_path / "s", "--json").json
    assert told["replay"] is True
    assert "not the data that the victim was trained on" in " ".join(told["replay_note"].split())


def test_frequency_residual_finds_the_frequency() -> None:
    """A cosine of one frequency is one coefficient, as large as Parseval's theorem says; no change is all zeros."""
    clean = torch.full((2, 3, 24, 16), 128, dtype=torch.uint8)
    coefficients = torch.zeros(24, 16)
    coefficients[5, 9] = 600.0
    stamped = (clean.double() + inverse_dct(coefficients)).round().to(torch.uint8)
    residual = frequency_residual(clean, stamped)
    assert residual.shape == (2, 24, 16)
    assert [int(i) for i in np.unravel_index(int(residual[0].argmax()), (24, 16))] == [5, 9]
    assert float(residual[0, 5, 9]) == pytest.approx(600, rel=0.01)
    change = stamped.double() - clean.double()
    assert float(residual[0].square().sum()) == pytest.approx(float(change[0, 0].square().sum()))
    residual[:, 5, 9] = 0
    assert float(residual.max()) < 2, "what is left is rounding"
    assert float(frequency_residual(clean, clean).max()) == 0


def test_colors_grow_brighter_and_share_one_scale() -> None:
    magnitudes = torch.tensor([[[0.0, 1.0, 10.0]], [[100.0, 1000.0, 1000.0]]])
    painted = in_colors(magnitudes, 1000.0)
    assert (painted.dtype, painted.shape) == (torch.uint8, (2, 3, 1, 3))
    brightness = painted.double().sum(1).flatten()
    assert brightness.diff()[:4].min() > 30
    assert brightness[4] == brightness[5]


def test_the_figure_has_a_row_of_frequencies(cli: Callable[..., Any], lab: Any, tmp_path: Path) -> None:
    figure = tmp_path / "trigger.png"
    assert cli("show", lab.attack, "--figure", figure, "--samples", "3", "--store", lab.store).code == 0
    pixels = np.array(Image.open(figure).convert("RGB")).astype(int)
    colored = (pixels.max(2) - pixels.min(2) > 80).any(1)  # the digits are grey: only the last row has colors
    assert colored.any()
    assert colored.nonzero()[0].min() > len(pixels) * 0.6
