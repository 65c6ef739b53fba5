"""ASD: the three splits and their schedule by hand, the virtual model, and the effect."""

from __future__ import annotations

import copy

import pytest
import torch

from backdoorlab.data.split import Split
from backdoorlab.defenses.training.asd import AdaptiveSplitting, class_aware, later_half, pool_size, stage_of
from backdoorlab.defenses.view import DefenderView
from backdoorlab.models import Classifier
from backdoorlab.testing import tiny_task
from backdoorlab.training import Context
from contract_tools import tiny_model
from effect_tools import Numbers, accuracy, benign, case, clean, effects, least, most, task, trained


def test_stages_are_those_of_the_authors() -> None:
    assert [stage_of(epoch, 120) for epoch in (0, 59, 60, 89, 90, 119)] == [1, 1, 2, 2, 3, 3]
    assert [stage_of(epoch, 4) for epoch in range(4)] == [1, 1, 2, 3]
    assert stage_of(0, 1) == 1


def test_the_pool_grows_every_fifth_of_120_epochs() -> None:
    assert [pool_size(epoch, 120, 10) for epoch in (0, 4, 5, 9, 10, 59)] == [0, 0, 10, 10, 20, 110]


def test_the_first_pool_has_the_lowest_losses_of_each_class() -> None:
    losses = torch.tensor([4.0, 1.0, 3.0, 2.0, 9.0, 8.0, 7.0, 6.0])
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    assert class_aware(losses, labels, 0, 0.5).sum() == 0
    assert class_aware(losses, labels, 1, 0.5).nonzero().flatten().tolist() == [1, 7]
    assert class_aware(losses, labels, 100, 0.5).nonzero().flatten().tolist() == [1, 3, 6, 7]


def test_the_copy_trains_its_later_half_and_the_model_stays() -> None:
    mine, model = tiny_task(), copy.deepcopy(tiny_model("image"))
    weights = copy.deepcopy(model.state_dict())
    after = AdaptiveSplitting().virtual(model, mine.train, Context())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    names = [name for name, _ in model.named_parameters()]
    changed = [name for name, p in after.named_parameters() if not torch.equal(p, weights[name])]
    assert changed == names[(len(names) + 1) // 2 :]
    later_half(after)
    assert [name for name, p in after.named_parameters() if p.requires_grad] == changed


def test_the_last_split_trusts_what_the_copy_learns_least(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss of the model less loss of the copy: a sample whose loss falls is poison."""
    model, after = tiny_model("image"), copy.deepcopy(tiny_model("image"))
    before, later = torch.tensor([5.0, 5.0, 1.0, 1.0]), torch.tensor([5.0, 1.0, 1.0, 0.0])
    monkeypatch.setattr(AdaptiveSplitting, "losses", lambda self, m, data: later if m is after else before)
    monkeypatch.setattr(AdaptiveSplitting, "virtual", lambda self, m, data, ctx: after)
    data = Split(torch.zeros(4, 1, 16, 16, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), ("a", "b"))
    method = AdaptiveSplitting()
    assert method.pool(model, data, 7, 8, Context()).tolist() == [True, False, True, False]
    assert method.pool(model, data, 5, 8, Context()).tolist() == [False, False, True, True]
    assert method.pool(model, data, 0, 8, Context()).tolist() == [False] * 4


def test_clean_samples_are_trusted_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, seen = tiny_task(), []

    def train(self: AdaptiveSplitting, model: Classifier, data: Split, choose: object, *rest: object) -> None:
        assert callable(choose)
        seen.append(data)
        seen.extend(choose(model, epoch) for epoch in (0, 1))

    monkeypatch.setattr(AdaptiveSplitting, "mixmatch", train)
    seeds = mine.train[torch.arange(40)]
    method = AdaptiveSplitting(seeds=2)
    report = method.run(DefenderView(suspicious=mine.train, blueprint=mine.blueprint, clean=seeds), Context())
    data, first, second = seen
    used = sum(min(2, int((seeds.labels == k).sum())) for k in range(10))
    assert len(data) == 80 + used
    assert torch.bincount(data.labels[80:]).max() <= 2
    assert not bool(first[:80].any())
    assert all(bool(pool[80:].all()) for pool in (first, second))
    assert report.notes["seeds"] == used


def told(seed: int, data: Split) -> float:
    report = AdaptiveSplitting().run(
        DefenderView(suspicious=data, blueprint=task(seed).blueprint, clean=clean(seed)), Context(seed)
    )
    return accuracy(benign(seed), task(seed).test) - accuracy(report.model, task(seed).test)


@case("defense/training/asd", asr_lost=least(0.7), acc_lost=most(0.15))
def effect_of_asd(seed: int) -> Numbers:
    return trained(seed, AdaptiveSplitting())[2]


@case("defense/training/asd_benign", acc_lost=most(0.15))
def effect_of_asd_benign(seed: int) -> Numbers:
    return {"acc_lost": told(seed, task(seed).train)}


test_effect = effects(__name__)
