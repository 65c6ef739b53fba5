"""MixMatch: sharpening, mixing and the loss by hand, the weight's ramp, splits that are asked for before each epoch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from backdoorlab.core.errors import InputError
from backdoorlab.defenses.common.semi_supervised import (
    MixMatchStep,
    Resplit,
    fit_semi_supervised,
    mix,
    mixmatch_loss,
    sharpen,
)
from backdoorlab.models import Classifier
from backdoorlab.testing import tiny_task
from backdoorlab.training import Context


def test_sharpening_squares_at_half_a_temperature() -> None:
    sharp = sharpen(torch.tensor([[0.6, 0.3, 0.1], [1.0, 0.0, 0.0]]), 0.5)
    torch.testing.assert_close(sharp[0], torch.tensor([0.36, 0.09, 0.01]) / 0.46)
    assert sharp[1].tolist() == [1, 0, 0]
    same = torch.tensor([[0.2, 0.8]])
    torch.testing.assert_close(sharpen(same, 1.0), same)


def test_mixing_keeps_the_larger_share_of_a_sample_itself() -> None:
    inputs, targets = torch.tensor([[0.0], [10.0]]), torch.eye(2)
    mixed, wanted = mix(inputs, targets, 0.75, torch.tensor([1, 0]))
    assert mixed.tolist() == [[2.5], [7.5]]
    assert wanted.tolist() == [[0.75, 0.25], [0.25, 0.75]]


def test_the_loss_by_hand() -> None:
    """One labelled sample, two unlabelled ones, of two classes with equal logits."""
    targets = torch.tensor([[0.8, 0.2], [1.0, 0.0], [0.5, 0.5]])
    loss = mixmatch_loss(torch.zeros(3, 2), targets, 1, 15.0)
    guessed = (0.25 + 0.25 + 0 + 0) / 4
    assert float(loss) == pytest.approx(math.log(2) + 15 * guessed)


def step_of(model: Classifier, weight: float, ramp: int) -> MixMatchStep:
    return MixMatchStep(
        model, lr=0.0, weight=weight, ramp=ramp, temperature=0.5, alpha=0.75, generator=torch.Generator().manual_seed(1)
    )


def half(model: Classifier, epoch: int) -> Tensor:
    return torch.arange(80) % 2 == 0


def test_the_weight_of_the_unlabelled_grows_to_its_full_value(monkeypatch: pytest.MonkeyPatch) -> None:
    task, weights = tiny_task(), []

    def seen(logits: Tensor, targets: Tensor, labelled: int, weight: float) -> Tensor:
        weights.append(weight)
        assert (len(logits), labelled) == (12, 4)
        torch.testing.assert_close(targets.sum(1), torch.ones(12))
        return mixmatch_loss(logits, targets, labelled, weight)

    monkeypatch.setattr("backdoorlab.defenses.common.semi_supervised.mixmatch_loss", seen)
    model = task.blueprint.build_model(Context())
    step = step_of(model, 15.0, 4)
    with torch.random.fork_rng(devices=[]):
        for batch in Resplit(model, task.train, half, 4, 6, torch.Generator().manual_seed(0)):
            step(batch)
    assert weights == [0, 3.75, 7.5, 11.25, 15, 15]


def test_batches_hold_trusted_samples_with_and_others_without_labels() -> None:
    task = tiny_task()
    batches = Resplit(task.blueprint.build_model(Context()), task.train, half, 16, 5, torch.Generator().manual_seed(0))
    assert len(batches) == 5
    seen = list(batches)
    assert len(seen) == 5
    for labelled, unlabelled in seen:
        assert bool((labelled.indices % 2 == 0).all())
        assert bool((unlabelled.indices % 2 == 1).all())
        assert torch.equal(labelled.labels, task.train.labels[labelled.indices])
        assert (len(labelled.views), len(unlabelled.views)) == (1, 2)
        assert not torch.equal(*unlabelled.views)


def test_a_split_is_asked_for_before_each_epoch() -> None:
    task, asked = tiny_task(), []

    def choose(model: Classifier, epoch: int) -> Tensor:
        asked.append((epoch, next(model.parameters()).sum().item()))
        return half(model, epoch)

    model = task.blueprint.build_model(Context())
    log = fit_semi_supervised(
        model,
        task.train,
        choose,
        Context(),
        epochs=3,
        steps=2,
        batch_size=8,
        lr=0.002,
        weight=15,
        ramp=1,
        temperature=0.5,
        alpha=0.75,
        label="test",
    )
    assert [epoch for epoch, _ in asked] == [0, 1, 2]
    assert len({value for _, value in asked}) == 3, "the model is the one that is being trained"
    assert (len(log.loss), log.steps) == (3, 6)
    assert not model.training


@pytest.mark.parametrize("value", [True, False])
def test_samples_of_both_kinds_are_needed(value: bool) -> None:
    task = tiny_task()
    model = task.blueprint.build_model(Context())
    batches = Resplit(
        model, task.train, lambda model, epoch: torch.full((80,), value), 8, 2, torch.Generator().manual_seed(0)
    )
    with pytest.raises(InputError, match="needs both, got"):
        next(iter(batches))
