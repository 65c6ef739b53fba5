"""The loop below ``fit``: schedules, several optimisers, stopping, halves side by side, several views, going back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

from backdoorlab.core.errors import BackdoorLabError, InputError
from backdoorlab.tasks import Task
from backdoorlab.training import Batch, Context, Descent, Recipe, cross_entropy, fit, run_steps
from backdoorlab.training.batches import Drawn, Paired, Repeat, Shuffled
from backdoorlab.training.context import Silent
from backdoorlab.training.steps import LossStep
from backdoorlab.training.watch import Watch

T = TypeVar("T")


class Pull:
    """Two numbers pulled to their goals by an optimiser each; records the rates."""

    def __init__(self) -> None:
        self.a, self.b = nn.Linear(1, 1), nn.Linear(1, 1)
        with torch.no_grad():
            for parameter in (*self.a.parameters(), *self.b.parameters()):
                parameter.fill_(1.0)
        self.modules = [self.a, self.b]
        self.optimizers = [torch.optim.SGD(self.a.parameters(), 0.1), torch.optim.SGD(self.b.parameters(), 0.5)]
        self.rates: list[tuple[float, ...]] = []

    def __call__(self, batch: float) -> Tensor:
        self.rates.append(tuple(o.param_groups[0]["lr"] for o in self.optimizers))
        loss = (self.a.bias + self.b.bias - batch).square().sum()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach()


@pytest.fixture
def pull() -> Pull:
    with torch.random.fork_rng():
        return Pull()


def test_the_schedule_is_a_multiple_of_each_optimisers_rate(pull: Pull) -> None:
    log = run_steps(
        pull, Repeat(2, lambda: 0.0), 3, schedule=lambda step: 1 / (step + 1), context=Context(), label="pulling"
    )
    assert pull.rates == [(pytest.approx(0.1 / n), pytest.approx(0.5 / n)) for n in range(1, 7)]
    assert log.lr == [pytest.approx(0.1 / n) for n in (2, 4, 6)]
    assert (log.steps, len(log.loss), len(log.seconds)) == (6, 3, 3)


def test_losses_are_the_means_of_the_epochs() -> None:
    numbers = iter([1.0, 2.0, 3.0, 5.0])
    step = LossStep(lambda value: torch.tensor(value, requires_grad=True), torch.optim.SGD([torch.zeros(1)], 0.1))
    assert run_steps(step, Repeat(2, lambda: next(numbers)), 2, context=Context(), label="x").loss == [1.5, 4.0]


def test_true_ends_the_training(pull: Pull) -> None:
    log = run_steps(
        pull, Repeat(2, lambda: 0.0), 9, on_epoch=lambda epoch: epoch == 2, context=Context(), label="pulling"
    )
    assert (len(log.loss), log.steps) == (2, 4)


def test_fit_ends_when_a_callback_says_so(digits_task: Task) -> None:
    seen = []
    recipe = Recipe(epochs=5, batch_size=32, lr=0.01)
    _, log = digits_task.fit(
        digits_task.train[torch.arange(64)],
        Context(),
        recipe=recipe,
        on_epoch=[lambda epoch, model: epoch == 3, lambda epoch, model: seen.append(epoch)],
    )
    assert len(log.loss) == 3
    assert seen == [1, 2, 3], "every callback is called, whatever another one answers"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_nobody_watches_ends_at_a_loss_that_is_not_finite(value: float) -> None:
    step = LossStep(lambda loss: torch.tensor(loss, requires_grad=True), torch.optim.SGD([torch.zeros(1)], 0.125))
    with pytest.raises(BackdoorLabError, match=r"pulling diverged in epoch 1 .*smaller learning rate than 0\.125"):
        run_steps(step, Repeat(1, lambda: value), 1, context=Context(), label="pulling")


def test_a_collapse_takes_back_everything_that_the_step_trains(pull: Pull) -> None:
    """Epoch 3 ends in infinity: both networks are as after epoch 2, and both rates are halved."""
    states, goals = [], iter([0.0, 0.0, math.inf, 0.0, 0.0])

    def remember(epoch: int) -> bool:
        states.append((pull.a.bias.item(), pull.b.bias.item()))
        return False

    watch = Watch(pull.modules, pull.optimizers)
    watch.APART = 1
    started: list[tuple[float, float]] = []

    class Step(Pull):
        def __init__(self) -> None:
            self.__dict__ = pull.__dict__

        def __call__(self, batch: float) -> Tensor:
            started.append((self.a.bias.item(), self.b.bias.item()))
            return super().__call__(batch)

    log = run_steps(
        Step(), Repeat(1, lambda: next(goals)), 4, watch=watch, on_epoch=remember, context=Context(), label="pulling"
    )
    assert [(c.epoch, c.loss, c.back_to) for c in log.collapses] == [(3, None, 2)]
    assert started[3] == states[1]
    assert pull.rates[3] == (0.05, 0.25)


def test_with_one_epoch_the_bar_counts_steps(pull: Pull) -> None:
    seen: list[tuple[str, int | None]] = []

    class Bars(Silent):
        def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
            seen.append((label, total))
            return iter(items)

    run_steps(pull, Repeat(7, lambda: 0.0), 1, context=Context(reporter=Bars()), label="short")
    run_steps(pull, Repeat(7, lambda: 0.0), 2, context=Context(reporter=Bars()), label="long")
    assert seen == [("short", 7), ("long", 2)]


def test_dropout_follows_the_context_and_leaves_the_global_generator_alone() -> None:
    def masks(seed: int) -> list[float]:
        drawn: list[float] = []

        def loss(batch: Tensor) -> Tensor:
            out = nn.functional.dropout(batch, 0.5)
            drawn.extend(out.tolist())
            return out.sum().requires_grad_()

        step = LossStep(loss, torch.optim.SGD([torch.zeros(1)], 0.1))
        run_steps(step, Repeat(1, lambda: torch.ones(64)), 1, context=Context(seed), label="x")
        return drawn

    before = torch.get_rng_state()
    assert masks(1) == masks(1) != masks(2)
    assert torch.equal(torch.get_rng_state(), before)


def shuffled(task: Task, count: int, batch: int, seed: int = 0, **settings: object) -> Shuffled:
    split, generator = task.train[torch.arange(count)], torch.Generator().manual_seed(seed)
    return Shuffled(split, task.modality, batch, generator, **settings)


def test_views_are_augmented_independently(digits_task: Task) -> None:
    (batch,) = shuffled(digits_task, 32, 32, views=2)
    first, second = batch.views
    assert first.shape == second.shape
    assert not torch.equal(first, second)
    assert batch.inputs is first
    (plain,) = shuffled(digits_task, 32, 32, views=2, augment=False)
    assert torch.equal(*plain.views)
    torch.testing.assert_close(plain.views[0], digits_task.train.inputs[plain.indices].float() / 255)


def test_an_epoch_has_every_sample_once_and_the_next_one_another_order(digits_task: Task) -> None:
    batches = shuffled(digits_task, 50, 16)
    first, second = (torch.cat([batch.indices for batch in batches]) for _ in range(2))
    assert len(batches) == 3
    assert len(first.unique()) == len(second.unique()) == 48
    assert not torch.equal(first, second)


def test_halves_side_by_side_are_as_long_as_the_longer(digits_task: Task) -> None:
    labelled, unlabelled = shuffled(digits_task, 32, 16), shuffled(digits_task, 96, 16, seed=1)
    pairs = list(Paired(labelled, unlabelled))
    assert len(pairs) == len(Paired(labelled, unlabelled)) == 6
    few, many = (torch.cat([pair[side].indices for pair in pairs]) for side in (0, 1))
    assert sorted(many.tolist()) == list(range(96))
    assert torch.bincount(few).tolist() == [3] * 32


def test_draws_with_replacement_have_the_length_that_is_asked_for(digits_task: Task) -> None:
    split = digits_task.train[torch.arange(5)]
    drawn = Drawn(split, digits_task.modality, 64, torch.Generator().manual_seed(0), 3)
    batches = list(drawn)
    assert len(batches) == len(drawn) == 3
    assert all(len(batch) == 5 for batch in batches)
    assert len(torch.cat([b.indices for b in batches]).unique()) <= 5
    assert any(len(b.indices.unique()) < 5 for b in batches)


def test_a_batch_larger_than_the_split_is_refused(digits_task: Task) -> None:
    with pytest.raises(InputError, match="batches of 33 from 32 samples"):
        shuffled(digits_task, 32, 33)


def test_a_step_of_ones_own_runs_in_fit(digits_task: Task) -> None:
    """A step that ascends: the loss grows."""

    class Ascent(Descent):
        def loss(self, batch: Batch) -> Tensor:
            return -super().loss(batch)

    model = digits_task.build_model(Context())
    recipe = Recipe(epochs=3, batch_size=32, lr=0.01, schedule="constant", precision="fp32")
    log = fit(model, digits_task.train[torch.arange(64)], recipe, step=Ascent, chance=math.inf)
    assert log.loss[2] < log.loss[0] < 0
    assert not model.training


def test_compiled_or_not_the_objective_stays_at_hand(digits_task: Task) -> None:
    model = digits_task.build_model(Context())
    assert Descent(model, Recipe(compile=True), cross_entropy).objective is cross_entropy
    assert Descent(model, Recipe(), cross_entropy).compute is cross_entropy
