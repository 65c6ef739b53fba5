"""DBD: the head on fixed features, the split before every epoch, and the effect."""

from __future__ import annotations

import copy

import pytest
import torch

from backdoorlab.defenses.training import dbd
from backdoorlab.defenses.training.dbd import DecouplingBackdoorDefense, believed
from backdoorlab.defenses.view import DefenderView
from backdoorlab.models.anatomy import head
from backdoorlab.testing import tiny_task
from backdoorlab.training import Context, predict
from contract_tools import tiny_model
from effect_tools import Numbers, accuracy, benign, case, effects, least, most, task, trained


def test_the_head_learns_and_the_backbone_stays() -> None:
    mine, model = tiny_task(), copy.deepcopy(tiny_model("image"))
    before, conv = float(believed(model, mine.train).mean()), next(model.parameters()).clone()
    with torch.no_grad():
        head(model).weight.zero_()
    DecouplingBackdoorDefense(head_steps=150, head_lr=0.02).learn_head(model, mine.train, Context())
    assert float(believed(model, mine.train).mean()) < before
    assert torch.equal(next(model.parameters()), conv)


def test_before_every_epoch_the_labels_that_the_model_believes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, asked = tiny_task(), []
    usual = dbd.trusted_half

    def split(scores: torch.Tensor, labels: torch.Tensor, share: float) -> torch.Tensor:
        asked.append((scores, share))
        return usual(scores, labels, share)

    monkeypatch.setattr(dbd, "trusted_half", split)
    view = DefenderView(suspicious=mine.train, blueprint=mine.blueprint)
    report = DecouplingBackdoorDefense(head_steps=5, semi=1.5, credible=0.4).run(view, Context())
    epochs = round(1.5 * mine.recipe.resolve(80).epochs)
    assert len(asked) == epochs
    assert {share for _, share in asked} == {0.4}
    assert report.scores is not None
    torch.testing.assert_close(report.scores, believed(report.model, mine.train))
    assert report.isolated is None


def test_the_seed_decides() -> None:
    mine = tiny_task()
    view = DefenderView(suspicious=mine.train, blueprint=mine.blueprint)
    first, other = (
        predict(DecouplingBackdoorDefense(head_steps=5).run(view, Context(seed)).model, mine.test.inputs)
        for seed in (1, 2)
    )
    assert not torch.equal(first, other)


@case("defense/training/dbd", asr_lost=least(0.7), acc_lost=most(0.15))
def effect_of_dbd(seed: int) -> Numbers:
    return trained(seed, DecouplingBackdoorDefense())[2]


@case("defense/training/dbd_benign", acc_lost=most(0.15))
def effect_of_dbd_benign(seed: int) -> Numbers:
    report = DecouplingBackdoorDefense().apply(
        DefenderView(suspicious=task(seed).train, blueprint=task(seed).blueprint), Context(seed)
    )
    assert hasattr(report, "model")
    return {"acc_lost": accuracy(benign(seed), task(seed).test) - accuracy(report.model, task(seed).test)}


test_effect = effects(__name__)
