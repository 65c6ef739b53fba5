"""How much is poisoned when nobody says how much, and what is said when it is too much."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from backdoorlab.attacks import attacks
from backdoorlab.benchmark import Experiment, MethodSpec, Runner, Store
from backdoorlab.benchmark.results import rows
from backdoorlab.core.errors import InputError
from backdoorlab.data.sources import DatasetSpec
from backdoorlab.data.split import Dataset, Split
from backdoorlab.modalities.base import modality_of
from backdoorlab.tasks import Task, TaskSpec
from backdoorlab.training import Context, Recipe


@cache
def task_of(*sizes: int) -> Task:
    """Random pictures, as many of each class as said."""
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    inputs = torch.randint(0, 256, (len(labels), 1, 8, 8), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    split = Split(inputs, labels, tuple(f"class {k}" for k in range(len(sizes))))
    data = Dataset("pictures", "image", split, split)
    spec = TaskSpec(dataset=DatasetSpec(name="pictures"), model="convnet3", recipe="smoke")
    return Task(spec, data, modality_of(data), Recipe(epochs=1, batch_size=16, lr=0.05))


def test_explicit_rates_and_capacity_stay_what_they_were() -> None:
    task, sig = task_of(*(40,) * 10), attacks.get("sig", "image")
    with pytest.raises(
        InputError, match=r"sig: a poison rate of 0\.2 needs 80 of 40 .* largest possible rate is 0\.1 "
    ):
        sig(poison_rate=0.2).choose(task, Context())
    ctx = Context()
    assert len(sig(poison_rate=0.2, cap_rate=True).choose(task, ctx)) == 40
    assert "40 of the 40" in ctx.warnings[0]


def test_a_class_of_one_sample_is_not_taken_by_default() -> None:
    task, sig = task_of(1, 40, 40), attacks.get("sig", "image")
    with pytest.raises(InputError, match=r"one sample that can be poisoned, .* give a poison rate of 0\.012 or more"):
        sig().choose(task, Context())
    ctx = Context()
    assert len(sig(poison_rate=0.0124).choose(task, ctx)) == 1
    assert "1 of the 1 training samples" in ctx.warnings[0]
    with pytest.raises(InputError, match="nothing to poison"):
        sig().choose(task_of(0, 40, 40), Context())


def test_dirty_labels_that_empty_a_class_are_told() -> None:
    badnets, task = attacks.get("badnets", "image"), task_of(300, 300, 2)
    ctx = Context()
    badnets().choose(task_of(*(100,) * 6), ctx)
    assert not ctx.warnings
    badnets(poison_rate=0.9).choose(task, ctx)
    assert "and of 2 more classes more than half" in ctx.warnings[0] or "and of 1 more" in ctx.warnings[0]
    cba, ctx = attacks.get("cba", "image"), Context()
    ten = task_of(*(40,) * 10)
    assert len(cba(source_class=3).choose(ten, ctx)) == 20  # a tenth of the set would be all of its class
    assert len(cba().choose(ten, ctx)) == 40
    assert not ctx.warnings
    cba(source_class=3, poison_rate=0.1).choose(ten, ctx)
    assert "40 of the 40 training samples of class 3" in ctx.warnings[0]


def test_refool_follows_its_labels() -> None:
    refool, task, ctx = attacks.get("refool", "image"), task_of(*(40,) * 10), Context()
    assert len(refool().choose(task, ctx)) == 40
    assert len(refool(clean_label=True).choose(task, ctx)) == 20
    assert not ctx.warnings


def test_the_card_of_a_clean_label_attack_says_the_rate_and_the_warning(tmp_path: object) -> None:
    told: list[str] = []

    class Listener:
        def track(self, items, label, total=None):  # type: ignore[no-untyped-def]
            return iter(items)

        def note(self, text: str) -> None:
            told.append(text)

    runner = Runner(Store(tmp_path), reporter=Listener())  # type: ignore[arg-type]
    spec = TaskSpec(
        dataset=DatasetSpec(name="digits", train_size=200, test_size=50),
        recipe="smoke",
        recipe_changes=(("epochs", 1),),
    )
    usual = runner.run(Experiment(task=spec, attack=MethodSpec("sig", {}))).card
    assert usual.notes["poisoned"] == 10 and usual.notes["effective_rate"] == 0.05
    assert not any("poisoned" in text for text in told)
    whole = runner.run(Experiment(task=spec, attack=MethodSpec("sig", {"poison_rate": 0.1}))).card
    assert any("20 of the 20 training samples of class 0" in text for text in whole.notes["warnings"])
    assert sum("20 of the 20" in text for text in told) == 1
    assert {row["poison_rate"] for row in rows(runner.store)} == {0.05, 0.1}
