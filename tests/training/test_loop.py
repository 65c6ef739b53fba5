"""The training loop against a hand-written one, and its promises."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from backdoorlab.core.errors import BackdoorLabError, InputError
from backdoorlab.core.seeding import make_generator, spawn
from backdoorlab.data import Split
from backdoorlab.models import build_model
from backdoorlab.tasks import Task
from backdoorlab.training import Context, Recipe, fit, predict, predict_features, recipe_for


def few(task: Task, count: int = 96) -> Split:
    return task.train[torch.arange(count)]


def test_equals_a_plain_loop_step_by_step(digits_task: Task) -> None:
    split = few(digits_task)
    recipe = Recipe(epochs=3, batch_size=32, lr=0.05, schedule="cosine", augment=False, precision="fp32")
    ours = digits_task.build_model(Context(seed=3))
    plain = copy.deepcopy(ours).train()
    log = fit(ours, split, recipe, context=Context(seed=3))

    generator = make_generator(3, "fit")
    spawn(generator)
    optimizer = torch.optim.SGD(plain.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    losses = []
    for epoch in range(3):
        order = torch.randperm(96, generator=generator)
        for rows in order.split(32):
            optimizer.param_groups[0]["lr"] = 0.05 * 0.5 * (1 + math.cos(math.pi * epoch / 3))
            loss = F.cross_entropy(plain(split.inputs[rows].float() / 255), split.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert log.steps == 9
    assert log.loss == pytest.approx([sum(losses[i : i + 3]) / 3 for i in (0, 3, 6)], rel=1e-4)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_same_seed_same_bits_and_other_seed_other_bits(digits_task: Task) -> None:
    recipe = Recipe(epochs=1, batch_size=32, lr=0.05)

    def weights(seed: int) -> torch.Tensor:
        model, _ = digits_task.fit(few(digits_task), Context(seed=seed), recipe=recipe)
        return torch.cat([p.flatten() for p in model.parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_objective_sees_the_indices_of_its_samples(digits_task: Task) -> None:
    split, seen = few(digits_task, 64), []

    def objective(model, inputs, labels, indices):
        torch.testing.assert_close(inputs, split.inputs[indices].float() / 255)
        assert torch.equal(labels, split.labels[indices])
        seen.extend(indices.tolist())
        return F.cross_entropy(model(inputs), labels)

    recipe = Recipe(epochs=1, batch_size=16, lr=0.01, augment=False)
    digits_task.fit(split, Context(), recipe=recipe, objective=objective)
    assert sorted(seen) == list(range(64))


def test_stamp_edits_raw_batches_before_they_are_prepared(digits_task: Task) -> None:
    split = few(digits_task, 64)

    def stamp(raw, labels, indices, generator):
        assert raw.dtype == torch.uint8
        return torch.full_like(raw, 51), (labels + 1) % 10

    def objective(model, inputs, labels, indices):
        assert float(inputs.min()) == pytest.approx(0.2)
        assert torch.equal(labels, (split.labels[indices] + 1) % 10)
        return F.cross_entropy(model(inputs), labels)

    recipe = Recipe(epochs=1, batch_size=16, lr=0.01, augment=False)
    before = split.inputs.clone()
    digits_task.fit(split, Context(), recipe=recipe, stamp=stamp, objective=objective)
    assert torch.equal(split.inputs, before)


def test_divergence_and_empty_sets_are_errors(digits_task: Task) -> None:
    with pytest.raises(BackdoorLabError, match=r"diverged in epoch 1 .*smaller learning rate than"):
        digits_task.fit(few(digits_task), Context(), objective=lambda m, x, y, i: m(x).sum() * float("nan"))
    with pytest.raises(InputError, match="empty"):
        digits_task.fit(few(digits_task, 0), Context())


def test_clipping_bounds_a_step_and_leaves_small_gradients_alone(digits_task: Task) -> None:
    def step(clip: float) -> torch.Tensor:
        model = digits_task.build_model(Context(seed=2))
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        recipe = Recipe(epochs=1, batch_size=96, lr=1.0, momentum=0.0, weight_decay=0.0, schedule="constant", clip=clip)
        digits_task.fit(few(digits_task), Context(seed=2), model=model, recipe=recipe)
        return torch.cat([p.detach().flatten() for p in model.parameters()]) - before

    free = step(0.0)
    assert torch.equal(step(1e6), free)
    short = step(0.01)
    assert float(short.norm()) == pytest.approx(0.01, rel=1e-3)
    assert float(F.cosine_similarity(short, free, dim=0)) > 0.999


def test_callbacks_and_progress_run_once_an_epoch(digits_task: Task) -> None:
    epochs: list[int] = []
    recipe = Recipe(epochs=3, batch_size=32, lr=0.01)
    digits_task.fit(few(digits_task), Context(), recipe=recipe, on_epoch=[lambda e, m: epochs.append(e)])
    assert epochs == [1, 2, 3]


def test_predictions_do_not_depend_on_the_batch_size(digits_task: Task) -> None:
    model = digits_task.build_model(Context()).train()
    inputs = digits_task.test.inputs
    whole = predict(model, inputs, precision="fp32")
    torch.testing.assert_close(predict(model, inputs, batch_size=7, precision="fp32"), whole, rtol=1e-4, atol=1e-5)
    assert model.training, "predict must leave the mode as it was"
    assert whole.shape == (len(inputs), 10)
    features = predict_features(model, inputs, precision="fp32")
    torch.testing.assert_close(model.net.linear(features), whole, rtol=1e-4, atol=1e-5)


def test_transformers_and_timm_models_train_through_the_same_door() -> None:
    task_modality = Task.load(recipe_spec("vit_tiny_patch16_224")).modality
    assert build_model("vit_tiny_patch16_224", task_modality, 10).num_classes == 10


def recipe_spec(model: str):
    from backdoorlab.tasks import TaskSpec

    return TaskSpec(model=model)


class TestRecipes:
    def test_the_short_image_recipes_clip_and_the_reference_does_not(self) -> None:
        assert [recipe_for("image", name).clip for name in ("reference", "fast", "smoke")] == [0.0, 1.0, 1.0]

    def test_one_cycle_climbs_to_its_peak_and_ends_near_zero(self) -> None:
        recipe = Recipe(epochs=10, lr=1.0, schedule="onecycle", warmup=0.25)
        rates = [recipe.factor(step, 40) for step in range(400)]
        assert max(rates) == pytest.approx(1.0)
        assert rates.index(max(rates)) == pytest.approx(99, abs=1)
        assert rates[0] == pytest.approx(1 / 100)
        assert rates[-1] < 0.005
        assert all(b >= a for a, b in itertools.pairwise(rates[:100]))

    def test_cosine_and_multistep(self) -> None:
        cosine = Recipe(epochs=100, schedule="cosine")
        assert [cosine.factor(10 * e, 10) for e in (0, 50)] == pytest.approx([1.0, 0.5])
        steps = Recipe(epochs=100, schedule="multistep", milestones=(50, 75))
        assert [steps.factor(10 * e, 10) for e in (49, 50, 75)] == pytest.approx([1.0, 0.1, 0.01])

    def test_small_sets_get_more_epochs_and_no_larger_batches(self) -> None:
        recipe = Recipe(epochs=3, batch_size=64, min_steps=300).resolve(640)
        assert (recipe.epochs, recipe.batch_size) == (30, 64)
        assert Recipe(batch_size=128).resolve(20).batch_size == 20

    def test_unknown_names_are_refused_with_the_nearest(self) -> None:
        with pytest.raises(InputError, match="Did you mean 'smoke'"):
            recipe_for("image", "smok")
        with pytest.raises(InputError, match="Did you mean 'epochs'"):
            recipe_for("image", "fast", epoch=3)
        with pytest.raises(InputError, match="optimizer"):
            Recipe(optimizer="adam")
