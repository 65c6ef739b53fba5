"""The commands in good use: JSON shapes, help, determinism, stamping and predicting files, figures."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from backdoorlab.analysis.figures import magnified
from backdoorlab.attacks import attacks
from backdoorlab.benchmark.published import Published
from backdoorlab.core.method import Method
from backdoorlab.data.digits import Digits
from backdoorlab.data.sources import DatasetSpec
from backdoorlab.metrics.visibility import ssim, visibility
from backdoorlab.tasks import Task
from backdoorlab.training import Context

METRICS = ("acc", "asr", "ra", "der", "rir", "auroc", "tpr", "fpr", "precision", "f1", "score", "verdict", "targets")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty test digits that are no 0, as png files."""
    folder = tmp_path_factory.mktemp("digits")
    test = Digits().load(DatasetSpec(), "", (), False).test
    for i in (test.labels != 0).nonzero().flatten()[:20].tolist():
        Image.fromarray(test.inputs[i, 0].numpy()).save(folder / f"{i:03d}-{int(test.labels[i])}.png")  # type: ignore[index]
    return folder


def test_start_up_imports_no_torch() -> None:
    code = "import sys, backdoorlab.cli.main as m; c = m.run(['--help']); sys.exit(c or ('torch' in sys.modules) * 9)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "quickstart" in done.stdout


def test_version_and_no_arguments(cli: Callable[..., Any]) -> None:
    assert cli("--version").out.startswith("backdoorlab ")
    assert "quickstart" in cli().out + cli().err


COMMANDS = ("quickstart", "list", "attack", "defend", "bench", "study", "results", "show", "export", "stamp", "predict")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_teaches(cli: Callable[..., Any], command: str) -> None:
    reply = cli(command, "--help")
    assert reply.code == 0
    assert f"backdoorlab {command}" in reply.out
    assert "Try:" in reply.out


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_pages_name_what_is_expected_and_no_python_types(cli: Callable[..., Any], command: str) -> None:
    page = cli(*command.split(), "--help").out
    assert not re.findall(r"<(bool|str|int|float|list|path|int range|list\[\w+\])>|\[\[|\d{19}", page)
    lines = "\n".join(line.rstrip() for line in page.partition("Try:" if command else "Options")[0].splitlines())
    paragraphs = [paragraph.strip("\n").splitlines() for paragraph in lines.split("\n\n")]
    assert not [line for paragraph in paragraphs for line in paragraph[:-1] if len(line) < 80], "filled to the width"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ("attack", "badnets", "--help"),
            ("poison_rate", "bottom-right", "BackdoorBench", "1708.06733", "0.1", ">= 1"),
        ),
        (("defend", "ft", "--help"), ("epochs", "100", "learning rate", "BackdoorBench", "> 0")),
    ],
)
def test_help_of_a_method_shows_its_parameters(
    cli: Callable[..., Any], argv: tuple[str, ...], words: tuple[str, ...]
) -> None:
    reply = cli(*argv)
    assert reply.code == 0
    assert all(word in reply.out for word in words)


@pytest.mark.parametrize("name", attacks.names("image"))
def test_example_of_an_attacks_help_can_be_run(cli: Callable[..., Any], digits_task: Task, name: str) -> None:
    """As far as the choice of what is poisoned: a rate that the data cannot serve would end there."""
    words = cli("attack", name, "--help").out.split("Example: backdoorlab attack ")[1].splitlines()[0].split()
    assert words[:3] == [name, "--dataset", "digits"]
    given = dict(zip(words[3::2], words[4::2], strict=True))
    key, _, value = given.pop("--set").partition("=")
    settings = {key: value}
    assert not given, "the defaults must do without a rate"
    ctx = Context()
    assert len(attacks.get(name, "image").build(settings).choose(digits_task, ctx)) > 0
    assert not ctx.warnings


@pytest.mark.parametrize("kind", ["attacks", "defenses", "datasets", "models"])
def test_list_json(cli: Callable[..., Any], kind: str) -> None:
    rows = cli("list", kind, "--json").json
    keys = {"name", "modalities"} | ({"paper", "year"} if kind in ("attacks", "defenses") else {"summary"})
    assert rows
    assert all(keys <= set(row) for row in rows)
    images = cli("list", kind, "--modality", "image", "--json").json
    assert 0 < len(images) <= len(rows)
    assert all("image" in row["modalities"] for row in images)
    assert images[0]["name"] in cli("list", kind).out


def test_attack_and_defend_json(lab: Any) -> None:
    attack, repair = lab.attack_json, lab.repair_json
    for record in (attack, repair):
        assert {"key", "status", "reason", "metrics", "seconds"} <= set(record)
        assert set(METRICS) <= set(record["metrics"])
        assert (record["status"], record["reason"]) == ("ok", None)
        assert record["seconds"] > 0
    assert attack["metrics"]["asr"] > 0.8
    assert attack["metrics"]["der"] is None
    assert repair["metrics"]["asr"] < attack["metrics"]["asr"] - 0.3
    assert repair["metrics"]["der"] > 0.6


def test_a_command_builds_each_method_once(
    cli: Callable[..., Any], lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = shutil.copytree(lab.store, tmp_path / "store")  # other tests count what the common one holds
    built: list[str] = []
    build = Method.build.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(Method, "build", classmethod(lambda cls, given: built.append(cls.name) or build(cls, given)))
    assert cli("defend", "ft", "--run", lab.attack, "--set", "epochs=9", "--store", store).code == 0
    assert built == ["badnets", "ft"]


def test_a_stored_result_is_reused(cli: Callable[..., Any], lab: Any) -> None:
    again = cli("attack", "badnets", *lab.fast, "--store", lab.store, "--json").json
    assert again["reused"]
    assert again["metrics"] == lab.attack_json["metrics"]


def test_the_same_command_gives_the_same_bits(cli: Callable[..., Any], lab: Any, tmp_path: Path) -> None:
    again = cli("attack", "badnets", *lab.fast, "--store", tmp_path, "--json").json
    assert not again["reused"]
    assert again["key"] == lab.attack
    assert again["metrics"] == lab.attack_json["metrics"]
    first, second = (  # the log holds wall times
        {k: v for k, v in record["digests"].items() if k != "log.jsonl"} for record in (lab.attack_json, again)
    )
    assert "model.safetensors" in first
    assert first == second


def test_results_beside_published_numbers(cli: Callable[..., Any], lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "none of these runs has a counterpart" in cli("results", "--published", "--store", lab.store).out
    refused = cli("results", "--published", "--metric", "asr", "--store", lab.store)
    assert (refused.code, "--published has a row" in refused.err) == (2, True)
    place = ("digits", "preact_resnet18", "badnets", 0.1, "none")
    monkeypatch.setattr("backdoorlab.benchmark.published.published", lambda: {place: Published(0.9, 0.5, 0.25)})
    (row,) = cli("results", "--published", "--json", "--store", lab.store).json
    assert (row["attack"], row["defense"], row["published_asr"]) == ("badnets", "none", 0.5)
    assert row["asr_difference"] == pytest.approx(row["asr"] - 0.5)
    table = cli("results", "--published", "--store", lab.store).out
    assert "p.asr" in table
    assert "http://backdoorbench.com" in table


def test_results(cli: Callable[..., Any], lab: Any) -> None:
    rows = cli("results", "--json", "--store", lab.store).json
    assert {row["key"] for row in rows} == {lab.benign, lab.attack, lab.repair}
    assert all(not isinstance(v, dict) for row in rows for v in row.values())
    table = list(csv.DictReader(io.StringIO(cli("results", "--csv", "--store", lab.store).out)))
    assert {row["key"] for row in table} == {lab.benign, lab.attack, lab.repair}
    shown = cli("results", "--store", lab.store).out
    assert lab.attack[:8] in shown
    assert max(map(len, shown.splitlines())) <= 100
    grouped = cli("results", "--group-by", "defense", "--metric", "asr", "--json", "--store", lab.store).json
    assert {row["defense"] for row in grouped} >= {"ft"}
    assert cli("results", "--group-by", "defense", "--metric", "asr", "--store", lab.store).code == 0


def test_show_and_its_figure(cli: Callable[..., Any], lab: Any, tmp_path: Path) -> None:
    card = cli("show", lab.attack[:6], "--json", "--store", lab.store).json
    assert card["key"] == lab.attack
    assert card["spec"]["attack"]["name"] == "badnets"
    figure = tmp_path / "trigger.png"
    shown = cli("show", f"attack/{lab.attack}", "--figure", figure, "--store", lab.store)
    assert shown.code == 0, shown.err
    assert "PSNR" in shown.out
    assert "backdoorlab attack badnets" in shown.out
    with Image.open(figure) as image:
        assert image.size[0] > 800
    assert cli("show", lab.store / "defense" / lab.repair, "--store", lab.store).code == 0


def test_stamp_and_predict_round_trip(cli: Callable[..., Any], lab: Any, digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "stamped"
    reply = cli("stamp", digits, "--run", lab.attack, "--out", out, "--store", lab.store)
    assert reply.code == 0, reply.err
    before = {p.name: np.array(Image.open(p)) for p in sorted(digits.iterdir())}
    after = {p.name: np.array(Image.open(p)) for p in sorted(out.iterdir())}
    assert before.keys() == after.keys()
    for name, image in after.items():
        changed = np.argwhere(image != before[name])
        assert image.shape == (16, 16)
        assert (changed >= 14).all()  # the patch of 2 px is in the corner
        assert (image[14:, 14:] == 255).all()
    clean = cli("predict", digits, "--run", lab.attack, "--store", lab.store, "--json").json
    right = np.mean([row["class"] == int(row["input"][-5]) for row in clean])
    stamped = cli("predict", out, "--run", lab.attack, "--store", lab.store, "--json").json
    repaired = cli("predict", out, "--run", lab.repair, "--store", lab.store, "--json").json
    fooled, still = (np.mean([row["class"] == 0 for row in rows]) for rows in (stamped, repaired))
    assert right > 0.8
    assert fooled > 0.8
    assert still < fooled
    assert all(0 <= row["confidence"] <= 1 and row["name"] == str(row["class"]) for row in clean)
    assert "confidence" in cli("predict", out, "--run", lab.attack, "--store", lab.store).out


def test_stamp_jpg_bmp_npy_and_other_sizes(cli: Callable[..., Any], lab: Any, digits: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    image = Image.open(next(iter(sorted(digits.iterdir()))))
    image.save(source / "a.jpg")
    image.save(source / "b.bmp")
    image.resize((40, 40)).save(source / "c.png")
    batch = np.random.default_rng(0).integers(0, 255, (3, 1, 16, 16), dtype=np.uint8)
    np.save(source / "d.npy", batch)
    reply = cli("stamp", source, "--run", lab.attack, "--out", out, "--resize", "--store", lab.store)
    assert reply.code == 0, reply.err
    assert sorted(p.name for p in out.iterdir()) == ["a.png", "b.bmp", "c.png", "d.npy"]
    assert "JPEG compression would destroy the trigger" in reply.err
    assert Image.open(out / "c.png").size == (16, 16)
    stamped = np.load(out / "d.npy")
    assert stamped.shape == batch.shape
    assert (stamped[..., 14:, 14:] == 255).all()
    assert (stamped[..., :14, :] == batch[..., :14, :]).all()


def test_interrupt_and_bugs(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import backdoorlab.benchmark.runner as runner

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    def broken(*_: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(runner.Runner, "run", interrupted)
    reply = cli("attack", "badnets", "--store", tmp_path)
    assert (reply.code, "run the same command again to resume" in reply.err) == (130, True)
    monkeypatch.setattr(runner.Runner, "run", broken)
    reply = cli("attack", "badnets", "--store", tmp_path)
    assert reply.code == 1
    assert "division by zero" in reply.err
    assert "--debug" in reply.err
    assert "Traceback" not in reply.err
    assert "Traceback" in cli("--debug", "attack", "badnets", "--store", tmp_path).err
    assert "Traceback" not in cli("attack", "badnets", "--store", tmp_path).err


def test_failed_work_is_exit_code_1(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, lab: Any) -> None:
    from backdoorlab.defenses.repair.ft import FineTuning

    def explode(*_: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(FineTuning, "run", explode)
    reply = cli("defend", "ft", "--run", lab.attack, "--set", "epochs=3", "--store", lab.store, "--json")
    assert reply.code == 1
    assert reply.json["status"] == "failed"
    assert "out of luck" in reply.json["reason"]
    assert "out of luck" in reply.err
    (lab.store / "defense" / reply.json["key"]).rename(lab.store.parent / f"failed-{reply.json['key']}")


def test_bench(cli: Callable[..., Any], lab: Any, tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text(
        "name: tiny\ntasks:\n- {dataset: digits, recipe: smoke, recipe_changes: {min_steps: 120}}\n"
        "attacks: [badnets]\ndefenses:\n- {name: ft, settings: {lr: 0.2}}\nseeds: [0]\n"
    )
    reply = cli("bench", grid, "--store", lab.store, "--json")
    assert reply.code == 0, reply.err
    summary = reply.json
    assert summary["failed"] == 0
    assert {run["key"] for run in summary["runs"]} >= {lab.benign, lab.attack, lab.repair}
    assert summary["reused"] >= 3
    assert json.dumps(summary)


def test_ssim_and_psnr_agree_with_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(0, 256, (3, 3, 24, 20), generator=generator, dtype=torch.uint8)
    noise = torch.randint(-9, 10, clean.shape, generator=generator)
    other = (clean + noise).clamp(0, 255).to(torch.uint8)
    ours = ssim(clean.double(), other.double())
    for i in range(3):
        _, theirs = metrics.structural_similarity(
            clean[i].numpy(),
            other[i].numpy(),
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
            full=True,
        )
        assert float(ours[i]) == pytest.approx(theirs.mean(), abs=1e-6)
    seen = visibility(clean, other)
    assert seen.psnr == pytest.approx(metrics.peak_signal_noise_ratio(clean.numpy(), other.numpy(), data_range=255))
    assert visibility(clean, clean).psnr is None
    assert seen.linf == int((clean.int() - other.int()).abs().max())
    change, factor = magnified(clean, other)
    assert factor == 127 // seen.linf
    assert int(change.max()) <= 255


def test_quickstart_in_short(cli: Callable[..., Any], tmp_path: Path) -> None:
    argv = ("quickstart", "--recipe", "smoke", "--defenses", "ft", "--out", tmp_path / "q", "--store", tmp_path / "s")
    reply = cli(*argv)
    assert reply.code == 0, reply.err
    assert "backdoored" in reply.out
    assert "what happened" in reply.out
    assert max(len(line) for line in reply.out.splitlines() if str(tmp_path) not in line) <= 100
    with Image.open(tmp_path / "q" / "quickstart.png") as image:
        assert image.size[0] > 1000
    again = cli(*argv, "--json").json
    assert [run["status"] for run in again["runs"]] == ["ok"] * 3
    assert again["runs"][2]["metrics"]["asr"] < again["runs"][1]["metrics"]["asr"]
    assert Path(again["figure"]).is_file()
