"""SAU: its losses by hand, its search, and its effect."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from backdoorlab.attacks import Backdoor
from backdoorlab.defenses.repair.sau import (
    SharedStep,
    SharedUnlearning,
    jensen_shannon,
    mean_where,
    search_loss,
    sharing_loss,
)
from backdoorlab.models import Classifier
from backdoorlab.tasks import Task
from backdoorlab.training import Recipe, cross_entropy
from backdoorlab.training.batches import Batch
from effect_tools import Numbers, blended, case, effects, least, most, repaired


def logits(*rows: tuple[float, ...]) -> Tensor:
    """Logits whose softmax has these probabilities."""
    return torch.tensor(rows).log()


def test_the_divergence_of_two_distributions_by_hand() -> None:
    p, q = (0.5, 0.5, 1e-30), (0.25, 0.5, 0.25)
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    by_hand = sum(a * math.log(a / m) + b * math.log(b / m) for a, b, m in zip(p, q, middle, strict=True)) / 2
    found = jensen_shannon(logits(p, p), logits(q, p))
    torch.testing.assert_close(found, torch.tensor([by_hand, 0.0]), rtol=1e-5, atol=1e-7)
    apart = jensen_shannon(torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]]))
    torch.testing.assert_close(apart, torch.tensor([math.log(2)]))


def test_a_mean_over_no_rows_is_zero() -> None:
    assert float(mean_where(torch.tensor([1.0, 2.0]), torch.tensor([False, False]))) == 0


def test_the_search_counts_the_right_samples() -> None:
    """0 is right in both models, 1 is shared, 2 is wrong in both but not alike, 3 is right in the first alone."""
    first = ((0.7, 0.2, 0.1), (0.1, 0.8, 0.1), (0.1, 0.8, 0.1), (0.6, 0.3, 0.1))
    second = ((0.6, 0.3, 0.1), (0.2, 0.7, 0.1), (0.1, 0.2, 0.7), (0.3, 0.6, 0.1))
    labels = torch.zeros(4, dtype=torch.int64)
    misled = (-(math.log(0.7) + math.log(0.6)) / 2 - math.log(0.6)) / 2
    apart = jensen_shannon(logits(*first), logits(*second))[[0, 2, 3]].mean()
    found = search_loss(logits(*first), logits(*second), labels, 0.01, 1.0)
    torch.testing.assert_close(found, apart - 0.01 * misled)


def test_only_samples_that_mislead_the_suspicious_model_are_unlearned() -> None:
    """Sample 0: g is right. 1: g is wrong, as on the clean sample. 2: g is misled to class 2."""
    theirs = logits((0.8, 0.1, 0.1), (0.1, 0.8, 0.1), (0.1, 0.1, 0.8))
    clean = logits((0.8, 0.1, 0.1), (0.1, 0.8, 0.1), (0.8, 0.1, 0.1))
    mine = logits((0.2, 0.3, 0.5), (0.2, 0.3, 0.5), (0.2, 0.3, 0.5)).requires_grad_()
    loss = sharing_loss(mine, theirs, clean, torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(loss.detach(), torch.tensor(-math.log(0.5) / 3), rtol=1e-4, atol=0)
    loss.backward()
    assert mine.grad is not None
    assert torch.equal(mine.grad[:2], torch.zeros(2, 3)) and mine.grad[2, 2] > 0


def shared(model: Classifier, method: SharedUnlearning, inputs: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Perturbed inputs, and the share of them that mislead the model (twice itself here)."""
    step = SharedStep(copy.deepcopy(model), Recipe(optimizer="adamw"), cross_entropy, method=method)
    found = step.perturbed(inputs, labels)
    with torch.no_grad():
        return found, float((model(found).argmax(1) != labels).float().mean())


def test_perturbed_samples_are_valid_close_and_mislead(badnets_digits: Backdoor, digits_task: Task) -> None:
    model = badnets_digits.model
    inputs = model.modality.prepare(digits_task.train.inputs[:40])
    labels = digits_task.train.labels[:40]
    found, misled = shared(model, SharedUnlearning(), inputs, labels)
    assert float(found.min()) >= 0 and float(found.max()) <= 1
    assert float((found - inputs).abs().max()) <= 0.2 + 1e-6
    with torch.no_grad():
        before = float((model(inputs).argmax(1) != labels).float().mean())
    assert misled > before + 0.2


def test_the_model_under_repair_keeps_its_running_statistics(badnets_digits: Backdoor, digits_task: Task) -> None:
    model = copy.deepcopy(badnets_digits.model)
    step = SharedStep(model, Recipe(optimizer="adamw", lr=1e-3), cross_entropy, method=SharedUnlearning())
    inputs = model.modality.prepare(digits_task.train.inputs[:40])
    step(Batch((inputs,), digits_task.train.labels[:40], torch.arange(40)))
    for mine, theirs in zip(model.buffers(), badnets_digits.model.buffers(), strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(next(model.parameters()), next(badnets_digits.model.parameters()))
    for mine, theirs in zip(step.suspicious.parameters(), badnets_digits.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_outer_loss_is_the_weighted_sum(badnets_digits: Backdoor, digits_task: Task, weight: float) -> None:
    model, labels = badnets_digits.model, digits_task.train.labels[:20]
    inputs = model.modality.prepare(digits_task.train.inputs[:20])
    method = SharedUnlearning(clean_weight=0.5, adversarial_weight=weight, sharing_weight=2.0)
    step = SharedStep(copy.deepcopy(model), Recipe(optimizer="adamw", precision="fp32"), cross_entropy, method=method)
    found = step.perturbed(inputs, labels)
    with torch.no_grad():
        clean, moved = model(inputs), model(found)
        expected = 0.5 * torch.nn.functional.cross_entropy(clean, labels)
        expected = expected + weight * torch.nn.functional.cross_entropy(moved, labels)
        expected = expected + 2 * sharing_loss(moved, moved, clean, labels)
    loss = step.loss(Batch((inputs,), labels, torch.arange(20)))
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-5)


@case("defense/repair/sau", asr_lost=least(0.25), acc_lost=most(0.06), benign_lost=most(0.06))
def effect_of_sau(seed: int) -> Numbers:
    return repaired(seed, SharedUnlearning(epochs=30), harmless=True)


@case("defense/repair/sau/blended", der=least(0.85), acc_lost=most(0.1))
def effect_of_sau_on_blended(seed: int) -> Numbers:
    return repaired(seed, SharedUnlearning(epochs=30), backdoor=blended(seed))


test_effect = effects(__name__)
