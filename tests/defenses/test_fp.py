"""FP: its ranking and stopping rule against slow loops, and its effect on backdoored digits."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from backdoorlab.attacks import Backdoor
from backdoorlab.core.seeding import isolated_rng
from backdoorlab.data.sources import balanced_subset
from backdoorlab.data.split import Split
from backdoorlab.defenses import DefenderView, defenses
from backdoorlab.defenses.common.pruning import hold_out
from backdoorlab.defenses.repair.fp import FinePruning, accuracy_by_step, dormancy, steps_before_the_drop
from backdoorlab.models.anatomy import head
from backdoorlab.tasks import Task
from backdoorlab.training import Context, predict_features
from effect_tools import Numbers, case, effects, least, most, repaired


@pytest.fixture(scope="module")
def clean(digits_task: Task) -> Split:
    return balanced_subset(digits_task.train, 144, 0, "digits training set")


def test_units_are_ranked_by_their_mean_absolute_value() -> None:
    features = np.random.default_rng(0).normal(size=(40, 7))
    activity = [sum(abs(features[i, j]) for i in range(40)) / 40 for j in range(7)]
    expected = sorted(range(7), key=lambda j: activity[j])
    assert dormancy(torch.tensor(features)).tolist() == expected


@pytest.mark.parametrize(("step", "bias"), [(1, True), (2, False), (3, True)])
def test_accuracy_of_each_step_agrees_with_a_layer_that_lost_its_columns(step: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(60, 8, generator=generator), torch.randint(4, (60,), generator=generator)
    with isolated_rng(1):
        layer = torch.nn.Linear(8, 4, bias=bias)
    order = torch.randperm(8, generator=generator)
    found = accuracy_by_step(features, labels, layer, order, step)
    assert len(found) == 1 + 7 // step
    for number, accuracy in enumerate(found):
        pruned = copy.deepcopy(layer)
        with torch.no_grad():
            pruned.weight[:, order[: number * step]] = 0
            expected = (pruned(features).argmax(1) == labels).double().mean()
        assert accuracy.item() == pytest.approx(expected.item())


def test_the_step_that_goes_too_far_is_not_taken() -> None:
    accuracy = torch.tensor([0.9, 0.95, 0.82, 0.80, 0.89])
    assert steps_before_the_drop(accuracy, 0.1) == 2, "0.80 is below 0.81"
    assert steps_before_the_drop(accuracy, 0.0) == 1, "any loss is too much"
    assert steps_before_the_drop(accuracy, 0.5) == 4
    equal = torch.tensor([1.0, 0.9, 0.8], dtype=torch.float64)
    assert steps_before_the_drop(equal, 0.1) == 1, "the tolerance itself is tolerated"


def test_as_many_columns_as_told_are_zero_and_nothing_else_changed(badnets_digits: Backdoor, clean: Split) -> None:
    model = badnets_digits.model
    method = FinePruning(epochs=0, tolerance=0.1)
    repaired_model = method.run(DefenderView(model=model, clean=clean), Context())
    rest, held = hold_out(clean, 0.2, "fp", Context())
    order = dormancy(predict_features(model, rest.inputs))
    step = math.ceil(0.01 * 64)
    accuracy = accuracy_by_step(predict_features(model, held.inputs), held.labels, head(model), order, step)
    gone = order[: step * steps_before_the_drop(accuracy, 0.1)]
    assert 0 < len(gone) < 64
    before, after = head(model).weight, head(repaired_model).weight
    assert torch.equal((after == 0).all(0).nonzero().flatten(), gone.sort().values)
    kept = torch.ones(64, dtype=torch.bool)
    kept[gone] = False
    assert torch.equal(after[:, kept], before[:, kept])
    states = model.state_dict(), repaired_model.state_dict()
    assert [k for k in states[0] if not torch.equal(states[0][k], states[1][k])] == ["net.linear.weight"]


def test_pruned_units_stay_silent_while_the_rest_is_tuned(badnets_digits: Backdoor, clean: Split) -> None:
    model = badnets_digits.model
    pruned = FinePruning(epochs=0).run(DefenderView(model=model, clean=clean), Context())
    tuned = FinePruning(epochs=2, lr=0.1, batch_size=32).run(DefenderView(model=model, clean=clean), Context())
    gone = (head(pruned).weight == 0).all(0)
    assert gone.any() and torch.equal((head(tuned).weight == 0).all(0), gone)
    assert not torch.equal(head(tuned).weight[:, ~gone], head(pruned).weight[:, ~gone])
    assert not head(tuned).weight._backward_hooks


def test_known_by_its_names() -> None:
    for modality in ("image", "text", "audio", "video"):
        assert defenses.get("fp", modality) is FinePruning is defenses.get("fine_pruning", modality)


@case("defense/repair/fp", asr_lost=least(0.5), acc_lost=most(0.1), benign_lost=most(0.08))
def fp(seed: int) -> Numbers:
    return repaired(seed, FinePruning(epochs=60, lr=0.2, batch_size=32), harmless=True)


test_effect = effects(__name__)
