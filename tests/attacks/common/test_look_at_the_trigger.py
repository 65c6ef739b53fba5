"""A trigger that the data cannot carry is told before anything is trained, with numbers and a way out."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from backdoorlab.attacks import Attack, attacks
from backdoorlab.attacks import selection as contracts
from backdoorlab.benchmark import Experiment, MethodSpec, Runner, Store
from backdoorlab.data.sources import DatasetSpec
from backdoorlab.data.split import Dataset, Split
from backdoorlab.metrics.visibility import change
from backdoorlab.modalities.base import modality_of
from backdoorlab.tasks import Task, TaskSpec
from backdoorlab.training import Context, Recipe


class Stopped(Exception):
    """Raised where training would begin."""


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise Stopped

    monkeypatch.setattr(Task, "fit", stop)


def task_of(inputs: Tensor) -> Task:
    labels = torch.arange(len(inputs)) % 4
    split = Split(inputs, labels, ("a", "b", "c", "d"))
    data = Dataset("made", "image", split, split)
    spec = TaskSpec(dataset=DatasetSpec(name="made"), model="convnet3")
    return Task(spec, data, modality_of(data), Recipe(epochs=1, batch_size=16, lr=0.05))


@cache
def pictures(kind: str) -> Task:
    """400 pictures of 16 px: noise, black and white, the same with a scanner's noise, or one grey each."""
    draw = torch.Generator().manual_seed(2)
    noise = torch.randint(0, 256, (400, 1, 16, 16), generator=draw)
    if kind == "grey":
        noise = noise[:, :, :1, :1].expand(noise.shape).contiguous()
    if kind in ("black and white", "scanned"):
        noise = (noise > 127).long() * 255
    if kind == "scanned":
        noise = (noise + torch.randint(-1, 2, noise.shape, generator=draw)).clamp(0, 255)
    return task_of(noise.to(torch.uint8))


def told(attack: Attack, task: Task) -> list[str]:
    ctx = Context()
    with pytest.raises(Stopped):
        attack.run(task, ctx)
    return ctx.warnings


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("bpp", "black and white", ("changes 0% of 200 training samples", "lower levels")),
        ("bpp", "scanned", ("changes 100% of 200", "0% noticeably", "PSNR 5", "lower levels")),
        ("wanet", "grey", ("noticeably", "raise s,")),
        ("ftrojan", "black and white", ("changes 100% of", "0% noticeably (PSNR 4", "raise magnitude")),
        ("sig", "black and white", ()),
        ("bpp", "noise", ()),
        ("badnets", "black and white", ()),
        ("wanet", "noise", ()),
    ],
)
def test_what_is_told_before_training(name: str, kind: str, words: tuple[str, ...]) -> None:
    found = told(attacks.get(name, "image")(), pictures(kind))
    assert bool(found) == bool(words)
    for word in words:
        assert word in found[0]


@pytest.mark.usefixtures("untrained")
def test_a_stronger_setting_silences_the_warning() -> None:
    weak, strong = (attacks.get("ftrojan", "image")(magnitude=m) for m in (2.0, 60.0))
    (text,) = told(weak, pictures("noise"))
    assert "raise magnitude" in text
    assert not told(strong, pictures("noise"))


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("name", ["badnets", "blended", "sig", "bpp", "wanet", "blind", "htba", "fc"])
def test_every_kind_of_attack_looks_before_it_trains(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With triggers that do nothing, attacks that poison and attacks that train must both say so in time."""
    monkeypatch.setattr(contracts, "stamp_all", lambda trigger, inputs, **_: inputs)
    assert any("changes 0% of" in text for text in told(attacks.get(name, "image")(), pictures("noise")))


def test_sound_and_text() -> None:
    wave = (8000 * torch.sin(torch.arange(8000) / 9.0)).expand(40, -1).to(torch.int16).contiguous()
    silent = change(wave, wave + 1)
    loud = change(wave, (wave.float() * 1.1).to(torch.int16))
    assert silent.share == 1 and silent.noticed == 0 and silent.audible and silent.ratio_db is not None
    assert silent.ratio_db > 60 > loud.ratio_db > 15 and loud.noticed == 1  # type: ignore[operator]
    words = np.array(["good film", "bad film", "no film"], dtype=object)
    part = change(words, np.array(["good film", "cf bad film", "no film"], dtype=object))
    assert part.share == part.noticed == pytest.approx(1 / 3) and part.ratio_db is None


def test_change_counts_and_measures() -> None:
    clean = torch.full((4, 1, 8, 8), 100, dtype=torch.uint8)
    triggered = clean.clone()
    triggered[0] += 10  # PSNR of one such picture: 20 log10(255 / 10) = 28.1 dB
    triggered[1, 0, 0, 0] += 2
    found = change(clean, triggered)
    assert (found.share, found.noticed, found.audible) == (0.5, 0.25, False)
    power = (64 * 100 + 4) / (4 * 64)
    assert found.ratio_db == pytest.approx(10 * np.log10(255**2 / power))
    assert change(clean, clean).ratio_db is None
    assert change(clean, clean).share == 0


def test_the_warning_is_on_the_card(tmp_path: object) -> None:
    spec = TaskSpec(
        dataset=DatasetSpec(name="digits", train_size=200, test_size=50),
        recipe="smoke",
        recipe_changes=(("epochs", 1),),
    )
    runner = Runner(Store(tmp_path))  # type: ignore[arg-type]
    card = runner.run(Experiment(task=spec, attack=MethodSpec("ftrojan", {"magnitude": 0.5}))).card
    assert any("ftrojan: the trigger changes" in text and "raise magnitude" in text for text in card.notes["warnings"])
    fine = runner.run(Experiment(task=spec, attack=MethodSpec("badnets", {}))).card
    assert "warnings" not in fine.notes
