"""D-ST: the loss of the head by hand, what the contrastive stage is given, and the effect."""

from __future__ import annotations

import math

import pytest
import torch

from backdoorlab.defenses.training import d_st
from backdoorlab.defenses.training.d_st import SecureTraining, secure_loss
from backdoorlab.defenses.view import DefenderView
from backdoorlab.testing import tiny_task
from backdoorlab.training import Context
from effect_tools import Numbers, accuracy, benign, case, effects, least, most, task, trained


def test_the_loss_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1], [0.01, 0.99]]))
    labels = torch.tensor([0, 0, 0, 0])
    found = secure_loss(logits, labels, 2, 0.1, cap=2.0)
    expected = (math.log(2) + math.log(4)) / 2 - 0.1 * (-math.log(0.9) + 2.0) / 2  # the last one is capped
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_above_the_cap_nothing_pulls_and_nobody_need_be_suspected() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.5], [0.01, 0.99]])).requires_grad_()
    secure_loss(logits, torch.tensor([0, 0]), 1, 1.0, cap=2.0).backward()
    assert logits.grad is not None
    assert logits.grad[1].tolist() == [0, 0]
    alone = secure_loss(logits.detach()[:1], torch.tensor([0]), 1, 1.0, cap=2.0)
    assert float(alone) == pytest.approx(math.log(2))


def test_only_trusted_labels_reach_the_contrastive_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, given = tiny_task(), {}
    usual = d_st.learn_features

    def learn(*args: object, **settings: object) -> object:
        given.update(settings)
        return usual(*args, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(d_st, "learn_features", learn)
    method = SecureTraining(head_steps=5, contrastive=1.5)
    report = method.run(DefenderView(suspicious=mine.train, blueprint=mine.blueprint), Context())
    assert report.scores is not None
    trusted, suspected = method.divided(report.scores, mine.train.labels)
    groups = given["groups"]
    assert isinstance(groups, torch.Tensor)
    assert torch.equal(groups[trusted], mine.train.labels[trusted])
    assert set(groups[~trusted].tolist()) == {-1}
    assert given["epochs"] == round(1.5 * mine.recipe.resolve(80).epochs)
    assert given["blur"] is False
    assert report.isolated is not None
    assert torch.equal(report.isolated, suspected)
    assert report.notes == {"trusted": int(trusted.sum()), "suspected": int(suspected.sum())}


@case("defense/training/d_st", asr_lost=least(0.5), acc_lost=most(0.2))
def effect_of_d_st(seed: int) -> Numbers:
    return trained(seed, SecureTraining())[2]


@case("defense/training/d_st_benign", acc_lost=most(0.2))
def effect_of_d_st_benign(seed: int) -> Numbers:
    report = SecureTraining().run(
        DefenderView(suspicious=task(seed).train, blueprint=task(seed).blueprint), Context(seed)
    )
    return {"acc_lost": accuracy(benign(seed), task(seed).test) - accuracy(report.model, task(seed).test)}


test_effect = effects(__name__)
