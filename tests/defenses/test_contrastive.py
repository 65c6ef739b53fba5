"""Contrastive learning: the loss against a slow loop, its groups by hand, the training and the head."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorlab.data.split import Split
from backdoorlab.defenses.common.contrastive import contrastive_loss, fit_head, learn_features
from backdoorlab.models import Classifier
from backdoorlab.models.anatomy import head
from backdoorlab.tasks import Task
from backdoorlab.testing import tiny_task
from backdoorlab.training import Context, predict
from contract_tools import tiny_model


def projections(count: int, width: int = 5) -> Tensor:
    return F.normalize(torch.randn(2 * count, width, generator=torch.Generator().manual_seed(0)))


def slow(z: Tensor, positives: list[set[int]], temperature: float) -> float:
    """The formula, term by term."""
    total = 0.0
    for i, mine in enumerate(positives):
        below = sum(math.exp(float(z[i] @ z[a]) / temperature) for a in range(len(z)) if a != i)
        logs = [float(z[i] @ z[p]) / temperature - math.log(below) for p in sorted(mine)]
        total -= sum(logs) / len(mine)
    return total / len(positives)


def test_without_groups_it_is_nt_xent() -> None:
    z = projections(4)
    expected = slow(z, [{(i + 4) % 8} for i in range(8)], 0.5)
    assert float(contrastive_loss(z, torch.full((4,), -1), 0.5)) == pytest.approx(expected, rel=1e-5)


def test_samples_of_a_group_are_pulled_together_and_others_to_themselves() -> None:
    """Samples 0 and 2 are a group, 1 has none, 3 is the only one of its group."""
    z = projections(4)
    pulled = [{4, 2, 6}, {5}, {6, 0, 4}, {7}, {0, 2, 6}, {1}, {2, 0, 4}, {3}]
    groups = torch.tensor([1, -1, 1, 0])
    assert float(contrastive_loss(z, groups, 0.1)) == pytest.approx(slow(z, pulled, 0.1), rel=1e-5)


def test_gradients_are_finite_and_the_loss_of_one_sample_is_zero() -> None:
    z = projections(3).requires_grad_()
    contrastive_loss(z, torch.tensor([0, 0, -1]), 0.1).backward()
    assert z.grad is not None
    assert bool(z.grad.isfinite().all())
    assert float(contrastive_loss(projections(1), torch.tensor([-1]), 0.5)) == pytest.approx(0, abs=1e-6)


def learned(
    task: Task, data: Split | None = None, epochs: int = 3, groups: Tensor | None = None
) -> tuple[Classifier, list[float]]:
    model = task.blueprint.build_model(Context(1))
    log = learn_features(
        model,
        data or task.train,
        Context(),
        epochs=epochs,
        batch_size=512,
        lr=0.4,
        weight_decay=1e-4,
        temperature=0.5,
        groups=groups,
        label="test",
    )
    return model, log.loss


def test_features_are_learned_the_head_stays_and_labels_are_not_used() -> None:
    task = tiny_task()
    fresh = task.blueprint.build_model(Context(1))
    model, losses = learned(task)
    assert losses[-1] < losses[0]
    assert not model.training
    assert torch.equal(head(model).weight, head(fresh).weight)
    assert not torch.equal(next(model.parameters()), next(fresh.parameters()))
    other = dataclasses.replace(task.train, labels=task.train.labels.flip(0))
    again = learned(task, data=other)[0]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_groups_change_what_is_learned() -> None:
    task = tiny_task()
    alone, grouped = learned(task, epochs=1)[0], learned(task, epochs=1, groups=task.train.labels)[0]
    assert not torch.equal(next(alone.parameters()), next(grouped.parameters()))


def test_a_head_is_trained_on_fixed_features_of_any_scale() -> None:
    task, model = tiny_task(), copy.deepcopy(tiny_model("image"))
    labels, before = task.train.labels, copy.deepcopy(model.state_dict())
    with torch.no_grad():
        head(model).weight.zero_()
        head(model).bias.fill_(7)
    fit_head(
        model,
        task.train,
        lambda generator: torch.randint(len(labels), (32,), generator=generator),
        lambda logits, rows: F.cross_entropy(logits, labels[rows]),
        Context(),
        steps=150,
        lr=0.02,
        label="test",
    )
    accuracy = (predict(model, task.train.inputs).argmax(1) == labels).float().mean()
    assert float(accuracy) > 0.8
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"net.linear.weight", "net.linear.bias"}
