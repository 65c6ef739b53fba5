"""A training that breaks down is noticed, taken back once, and never passes for a result."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorlab.core.errors import BackdoorLabError
from backdoorlab.data import Split
from backdoorlab.models.classifier import Classifier
from backdoorlab.tasks import Task
from backdoorlab.training import Context, FitLog, Recipe, cross_entropy
from backdoorlab.training.context import Silent

STEPS = 24  # an epoch
RECIPE = Recipe(epochs=5, batch_size=16, lr=0.05, nesterov=True, schedule="onecycle", precision="fp32")


class Listener(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def few(task: Task) -> Split:
    return task.train[torch.arange(16 * STEPS)]


def harm(
    *steps: int, value: float = 30.0
) -> Callable[[Tensor, Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]:
    """A stamp that does nothing to the batch but makes the head useless just before the given steps."""
    count = 0

    def stamp(raw: Tensor, labels: Tensor, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        nonlocal count
        count += 1
        if count in steps:
            with torch.no_grad():
                harm.model.net.linear.weight.normal_(0, value, generator=torch.Generator().manual_seed(0))
        return raw, labels

    return stamp


def train(task: Task, *steps: int, value: float = 30.0, **settings: object) -> tuple[Classifier, FitLog, list[str]]:
    listener = Listener()
    harm.model = model = task.build_model(Context(seed=1))
    settings = {"recipe": RECIPE, "stamp": harm(*steps, value=value)} | settings
    _, log = task.fit(few(task), Context(seed=1, reporter=listener), model=model, **settings)
    return model, log, listener.notes


def right(task: Task, model: Classifier) -> float:
    split = few(task)
    with torch.no_grad():
        return float((model(split.inputs.float() / 255).argmax(1) == split.labels).float().mean())


def test_goes_back_to_the_last_good_epoch_with_half_the_rate(digits_task: Task) -> None:
    # A step this large into a ruined head cannot be made good in the rest of an epoch.
    model, log, notes = train(digits_task, 2 * STEPS + 3, value=1e4)
    assert len(log.loss) == RECIPE.epochs
    assert log.steps == (RECIPE.epochs + 1) * STEPS
    (collapse,) = log.collapses
    assert (collapse.epoch, collapse.back_to) == (3, 2)
    assert collapse.loss is None or collapse.loss > math.log(10)
    assert log.lr[2] == pytest.approx(collapse.lr / 2)
    assert log.loss[-1] < 1.0
    assert right(digits_task, model) > 0.8
    assert len(notes) == 1
    assert "collapsed in epoch 3" in notes[0]
    assert "epoch 2 with half the learning rate" in notes[0]


def test_what_was_taken_back_leaves_no_trace_in_weights_and_momentum(digits_task: Task) -> None:
    """Weights after the restored epoch: those of a training that stopped there."""
    seen: dict[int, list[Tensor]] = {}

    def remember(epoch: int, model: Classifier) -> None:
        seen.setdefault(epoch, []).append(model.net.linear.weight.detach().clone())

    train(digits_task, 2 * STEPS + 3, value=1e4, on_epoch=[remember])
    assert sorted(seen) == [1, 2, 3, 4, 5]
    assert all(len(found) == 1 for found in seen.values()), "called once for each epoch"
    assert all(float(found[0].abs().max()) < 10 for found in seen.values()), "ruined weights must not survive"


def test_a_weight_that_is_not_finite_is_noticed_although_every_loss_was_finite(digits_task: Task) -> None:
    # The damage of the very last step shows in no loss.
    _, log, _ = train(digits_task, value=float("nan"), objective=spoils(5 * STEPS))
    assert [(c.epoch, c.loss, c.back_to) for c in log.collapses] == [(5, None, 4)]


def spoils(*calls: int) -> Callable[[Classifier, Tensor, Tensor, Tensor], Tensor]:
    """Cross-entropy, with a gradient that is not a number in the given steps (its value stays right)."""
    count = 0

    def objective(model: Classifier, inputs: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        nonlocal count
        count += 1
        loss = F.cross_entropy(model(inputs), labels)
        return loss + (torch.nan_to_num(loss * 0 + 1) - 1 if count not in calls else _Poisoned.apply(loss))

    return objective


class _Poisoned(torch.autograd.Function):
    """Zero, with a gradient that is not a number."""

    @staticmethod
    def forward(ctx: object, loss: Tensor) -> Tensor:
        return torch.zeros_like(loss)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * float("nan")


def test_the_state_before_is_taken_when_the_last_step_of_a_good_epoch_did_the_harm(digits_task: Task) -> None:
    # The head is ruined before the first step of epoch 4, as if by the last step of epoch 3.
    model, log, _ = train(digits_task, 3 * STEPS + 1, value=1e4)
    assert [(c.epoch, c.back_to) for c in log.collapses] == [(4, 2)]
    assert right(digits_task, model) > 0.8


def test_a_loss_that_is_not_a_number_is_taken_back_once(digits_task: Task) -> None:
    model, log, notes = train(digits_task, objective=spoils(2 * STEPS + 5))
    assert [(c.epoch, c.loss, c.back_to) for c in log.collapses] == [(3, None, 2)]
    assert all(map(math.isfinite, log.loss))
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert "nan" in notes[0]


def test_a_second_collapse_is_an_error(digits_task: Task) -> None:
    with pytest.raises(BackdoorLabError, match=r"diverged in epoch 4 .*second time.*smaller learning rate than 0\.05"):
        train(digits_task, objective=spoils(2 * STEPS + 5, 4 * STEPS + 5))


def test_a_jump_above_the_start_counts_for_any_objective(digits_task: Task) -> None:
    def own(model: Classifier, inputs: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        return cross_entropy(model, inputs, labels, indices)

    _, log, _ = train(digits_task, 2 * STEPS + 3, value=1e4, objective=own)
    assert [c.epoch for c in log.collapses] == [3]


def test_ascent_that_is_declared_does_not_count(digits_task: Task) -> None:
    def growing(model: Classifier, inputs: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        growing.factor *= 1.1
        return cross_entropy(model, inputs, labels, indices) * 0 + growing.factor

    growing.factor = 1.0
    _, log, notes = train(digits_task, objective=growing, chance=math.inf)
    assert log.loss[-1] > 50 > log.loss[0]
    assert not log.collapses
    assert not notes
    growing.factor = 1.0
    with pytest.raises(BackdoorLabError, match="diverged"):
        train(digits_task, objective=growing)


def test_a_training_that_learned_nothing_is_no_result(digits_task: Task) -> None:
    frozen = Recipe(epochs=10, batch_size=32, lr=0.0, schedule="constant", precision="fp32")
    with pytest.raises(BackdoorLabError, match=r"learned nothing: its loss ends at 2.*chance is 2.3"):
        digits_task.fit(few(digits_task), Context(seed=1), recipe=frozen)
    digits_task.fit(
        few(digits_task), Context(seed=1), recipe=Recipe(epochs=1, batch_size=32, lr=0.0)
    )  # too short to tell


def test_logs_add_up_and_tell_collapses(digits_task: Task) -> None:
    _, log, _ = train(digits_task, objective=spoils(2 * STEPS + 5))
    both = log + FitLog([0.1], [0.2], [0.3], 4)
    assert len(both.rows()) == RECIPE.epochs + 2
    assert both.steps == log.steps + 4
    assert both.rows()[-1]["back_to"] == 2
    assert both.notes() == {"collapses": [log.collapses[0].row()]}
    assert FitLog([0.1], [0.2], [0.3], 4).notes() == {}


def test_a_first_loss_that_is_not_finite_goes_back_to_the_initial_weights(digits_task: Task) -> None:
    _, log, notes = train(digits_task, objective=spoils(1))
    assert [(c.epoch, c.back_to) for c in log.collapses] == [(1, 0)]
    assert len(log.loss) == RECIPE.epochs
    assert "from the start with half the learning rate" in notes[0]
