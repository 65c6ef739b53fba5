"""Which samples are trusted: the symmetric cross-entropy and the splits by hand."""

from __future__ import annotations

import math

import pytest
import torch

from backdoorlab.defenses.common.trust import lowest, lowest_of_each, symmetric_cross_entropy, trusted_half

LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 2])
SCORES = torch.tensor([4.0, 1.0, 3.0, 2.0, 9.0, 8.0, 20.0])


def rows(chosen: torch.Tensor) -> list[int]:
    return chosen.nonzero().flatten().tolist()


def test_symmetric_cross_entropy_by_hand() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    labels = torch.tensor([0, 1])
    found = symmetric_cross_entropy(p.log(), labels, 0.1, 2.0)
    wrong = -math.log(1e-4)
    expected = [0.1 * -math.log(0.5) + 2 * 0.5 * wrong, 0.1 * -math.log(0.1) + 2 * 0.9 * wrong]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_a_wrong_label_costs_a_bounded_amount() -> None:
    logits = torch.tensor([[100.0, 0.0]], requires_grad=True)
    loss = symmetric_cross_entropy(logits, torch.tensor([1]), alpha=0)
    assert float(loss.detach()) == pytest.approx(-math.log(1e-4), rel=1e-4)
    loss.sum().backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


def test_the_lowest_of_all() -> None:
    assert rows(lowest(SCORES, 0.5)) == [1, 2, 3]
    assert rows(lowest(SCORES, 0.01)) == [1]


def test_the_lowest_of_each_class() -> None:
    assert rows(lowest_of_each(SCORES, LABELS, 0.5)) == [1, 3, 5, 6]
    assert rows(lowest_of_each(SCORES, LABELS, count=3)) == [1, 2, 3, 4, 5, 6]


def test_no_class_vanishes_and_somebody_is_left() -> None:
    assert rows(trusted_half(SCORES, LABELS, 0.5)) == [1, 2, 3, 5, 6]
    assert rows(trusted_half(torch.tensor([1.0, 2.0]), torch.tensor([0, 1]), 0.5)) == [0]
