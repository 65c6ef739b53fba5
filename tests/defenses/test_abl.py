"""ABL: the objectives against their formulas, the guards, the isolation and the report."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from backdoorlab.attacks import Backdoor
from backdoorlab.core.errors import InputError
from backdoorlab.data.split import BACKDOOR, Split
from backdoorlab.defenses import DefenderView
from backdoorlab.defenses.training import abl
from backdoorlab.defenses.training.abl import (
    AntiBackdoorLearning,
    AscentStep,
    capped_ascent,
    flooding_loss,
    lga_loss,
    sample_losses,
    unlikelihood,
)
from backdoorlab.models import Classifier
from backdoorlab.tasks import Task
from backdoorlab.training import Context, Recipe, cross_entropy, predict
from effect_tools import Numbers, accuracy, benign, case, effects, least, most, task, trained

LOSSES = [0.1, 0.5, 0.9, 2.0]


def test_lga_follows_the_formula_sample_by_sample() -> None:
    losses = torch.tensor(LOSSES, requires_grad=True)
    value = lga_loss(losses, 0.6)
    assert float(value.detach()) == pytest.approx(sum((1 if x > 0.6 else -1) * x for x in LOSSES) / 4)
    value.backward()
    assert losses.grad is not None
    assert losses.grad.tolist() == [-0.25, -0.25, 0.25, 0.25]  # the magnitude stays, only the sign flips


def test_batch_mean_applies_one_sign_to_all() -> None:
    losses = torch.tensor(LOSSES, requires_grad=True)
    lga_loss(losses, 1.0, "batch_mean").backward()  # the mean is 0.875
    assert losses.grad is not None
    assert losses.grad.tolist() == [-0.25] * 4


def test_flooding_follows_the_formula() -> None:
    losses = torch.tensor(LOSSES)
    assert float(flooding_loss(losses, 1.0)) == pytest.approx(abs(0.875 - 1) + 1)
    assert float(flooding_loss(losses, 0.5, "per_sample")) == pytest.approx(sum(abs(x - 0.5) + 0.5 for x in LOSSES) / 4)


def test_ascent_ignores_samples_above_the_cap() -> None:
    losses = torch.tensor(LOSSES, requires_grad=True)
    capped_ascent(losses, 1.0).backward()
    assert losses.grad is not None
    assert losses.grad.tolist() == [-0.25, -0.25, -0.25, 0]


def test_the_gradient_of_each_parameter_is_bounded_by_itself(digits_task: Task) -> None:
    model = digits_task.build_model(Context())
    step = AscentStep(model, Recipe(clip=0.0), cross_entropy, bound=2.0)
    before = {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        parameter.grad = torch.full_like(parameter, 1e-4 if number % 2 else 50.0)
        before[name] = parameter.grad.clone()
    step.clip()
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if number % 2:
            assert torch.equal(parameter.grad, before[name]), name
        else:
            assert float(parameter.grad.norm()) == pytest.approx(2, rel=1e-3), name
            assert float(parameter.grad.min()) == pytest.approx(float(parameter.grad.max())), name


def test_sample_losses_keep_the_order_of_the_data(benign_digits: Classifier, digits_task: Task) -> None:
    data = digits_task.test
    logits = predict(benign_digits, data.inputs)
    wanted = [float(-logits[i].log_softmax(0)[data.labels[i]]) for i in range(20)]
    assert sample_losses(benign_digits, data)[:20].tolist() == pytest.approx(wanted, abs=1e-5)


def test_joint_objective_is_the_difference_of_two_means(benign_digits: Classifier, digits_task: Task) -> None:
    """In evaluation mode, where samples do not influence each other, L2 is E_Dc[l] - E_Db[min(l, cap)]."""
    suspects, one = digits_task.train[torch.arange(10)], digits_task.train[torch.tensor([77])]
    x, modality = digits_task.modality.prepare(suspects.inputs), digits_task.modality
    flat = replace(one, inputs=torch.full_like(one.inputs, 200))  # cropping leaves the inside of a flat image alone
    no_crop = copy.deepcopy(benign_digits)
    no_crop.modality = replace(modality, crop=0)
    with torch.no_grad():
        ascended = F.cross_entropy(benign_digits(x), suspects.labels, reduction="none")
        descended = F.cross_entropy(benign_digits(modality.prepare(flat.inputs)), flat.labels)
        for mode, wanted in (("joint", descended - ascended.mean()), ("sequential", -ascended.mean())):
            objective = AntiBackdoorLearning(mode=mode, cap=100).unlearning_objective(no_crop, flat, 6, Context())
            value = objective(no_crop, x, suspects.labels, torch.arange(10))
            assert float(value) == pytest.approx(float(wanted), abs=1e-4)


def test_unlikelihood_follows_the_formula_and_does_not_vanish_on_certain_samples() -> None:
    probabilities = torch.tensor([0.2, 0.9, 0.9999])
    logits = torch.log(probabilities / (1 - probabilities)).requires_grad_()
    losses = F.softplus(-logits)  # -log p
    value = unlikelihood(losses)
    assert float(value.detach()) == pytest.approx(float(-torch.log(1 - probabilities).mean()), rel=1e-3)
    value.backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, probabilities / 3, rtol=1e-2, atol=1e-4)


def test_unlearning_stops_once_the_suspects_are_forgotten(
    badnets_digits: Backdoor, digits_task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(badnets_digits.model)
    suspects = digits_task.train[torch.arange(20)]
    suspects = replace(suspects, labels=(suspects.labels + 1) % 10)  # already answered otherwise
    monkeypatch.setattr(abl, "fit", lambda *a, **k: pytest.fail("nothing is left to unlearn"))
    assert AntiBackdoorLearning().unlearn(model, suspects, suspects, digits_task.recipe.resolve(1000), Context()) == 0


def test_an_isolation_of_nothing_is_refused(digits_task: Task) -> None:
    with pytest.raises(InputError, match=r"isolates none; the smallest useful value is 0\.02"):
        AntiBackdoorLearning(isolation=0.01).run(
            DefenderView(suspicious=digits_task.train[torch.arange(50)], blueprint=digits_task.blueprint), Context()
        )


@pytest.mark.parametrize(("epochs", "kept"), [(1, [1]), (2, [2]), (3, [2, 3]), (4, [3, 4])])
def test_samples_are_ranked_by_the_mean_loss_of_the_later_epochs(
    digits_task: Task, monkeypatch: pytest.MonkeyPatch, epochs: int, kept: list[int]
) -> None:
    data, calls = digits_task.train[torch.arange(64)], []
    task = replace(digits_task, recipe=replace(digits_task.recipe, epochs=10 * epochs, min_steps=0))

    def losses(model: Classifier, split: Split) -> torch.Tensor:
        calls.append(len(calls))
        return torch.arange(64.0) * 10.0 ** calls[-1]

    monkeypatch.setattr(abl, "sample_losses", losses)
    _, found = AntiBackdoorLearning(turning=0.1).isolate(data, task, Context())
    assert len(calls) == len(kept)
    torch.testing.assert_close(found, torch.arange(64.0) * sum(10.0**i for i in calls) / len(calls))


def test_report_ranks_by_loss(badnets_digits: Backdoor, digits_task: Task) -> None:
    report = AntiBackdoorLearning(ascent_loss="unlikelihood", ascent_lr=1e-3).run(
        DefenderView(
            suspicious=badnets_digits.poison.apply(digits_task.train).as_seen(), blueprint=digits_task.blueprint
        ),
        Context(4),
    )
    assert report.isolated is not None
    assert report.scores is not None
    assert report.isolated.sum() == int(0.01 * len(digits_task.train)) == report.notes["isolated"]
    assert report.scores[report.isolated].min() >= report.scores[~report.isolated].max()
    assert report.notes["isolated_loss_after"] > report.notes["isolated_loss"]


def isolated(seed: int, **settings: Any) -> Numbers:
    """ABL: precision of the isolation, ASR and ACC before and after."""
    report, backdoor, numbers = trained(seed, AntiBackdoorLearning.build(settings))
    assert report.isolated is not None
    poisoned = backdoor.poison.apply(task(seed).train)
    return numbers | {
        "precision": float((poisoned.roles[report.isolated] == BACKDOOR).float().mean()),
        "unlearned": report.notes["isolated_loss_after"] - report.notes["isolated_loss"],
    }


@case("defense/training/abl_joint", precision=least(0.4), asr_lost=least(0.3), acc_lost=most(0.3), unlearned=least(0.2))
def effect_of_abl_joint(seed: int) -> Numbers:
    """With the loss that suits digits; clean accuracy pays for it (see the limits in the module's docstring)."""
    return isolated(seed, turning=0.35, ascent_loss="unlikelihood", ascent_lr=3e-3, ascent_steps=100)


@case("defense/training/abl_sequential", core=True, precision=least(0.4), asr=most(0.2), acc=least(0.5))
def effect_of_abl_sequential(seed: int) -> Numbers:
    return isolated(seed, turning=0.35, mode="sequential")


@case("defense/training/abl_benign", acc_lost=most(0.15))
def effect_of_abl_benign(seed: int) -> Numbers:
    """What it costs on benign data: what is isolated there are clean samples, which are then unlearned."""
    report = AntiBackdoorLearning().run(
        DefenderView(suspicious=task(seed).train, blueprint=task(seed).blueprint), Context(seed)
    )
    return {"acc_lost": accuracy(benign(seed), task(seed).test) - accuracy(report.model, task(seed).test)}


test_effect = effects(__name__)
