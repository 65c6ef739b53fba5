"""Parts of the collision and universal-perturbation attacks against slow references and closed forms."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from backdoorlab.attacks.common.collision import CollisionAttack, greedy_pairs, retrain_head
from backdoorlab.attacks.common.surrogate import clean_surrogate
from backdoorlab.attacks.image.fc import Fc, attract, distance_and_gradient, forward_backward
from backdoorlab.attacks.image.htba import Htba, draw_colours, hide
from backdoorlab.attacks.image.tuap import Tuap, margins, targeted_deepfool, universal_perturbation
from backdoorlab.attacks.poisoning import PoisoningAttack
from backdoorlab.attacks.triggers.patch import PlacedPatchTrigger, corners_from, paste_at
from backdoorlab.core.errors import InputError
from backdoorlab.core.seeding import isolated_rng
from backdoorlab.data.sources import DatasetSpec
from backdoorlab.data.split import Dataset, Split
from backdoorlab.modalities.base import modality_of
from backdoorlab.modalities.filters import expect_images
from backdoorlab.modalities.image import ImageModality
from backdoorlab.models import Classifier
from backdoorlab.models.anatomy import features, frozen, head
from backdoorlab.tasks import Task, TaskSpec
from backdoorlab.training import Context, Recipe
from backdoorlab.training.evaluate import predict_features

SHAPES = [(1, 16, 16), (3, 29, 31)]
SHARED = Context()
"""One cache, so that each surrogate is trained once."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(shape: tuple[int, ...], count: int = 12, seed: int = 0) -> Tensor:
    """Random pictures, the last two black and white."""
    images = torch.randint(0, 256, (count, *shape), generator=generator(seed), dtype=torch.uint8)
    images[-2], images[-1] = 0, 255
    return images


@cache
def tiny_task(shape: tuple[int, int, int] = SHAPES[0], samples: int = 60) -> Task:
    """Random pictures whose brightness tells their class."""
    labels = torch.arange(samples) % 3
    dark = torch.randint(0, 100, (samples, *shape), generator=generator(5))
    split = Split((dark + 70 * labels[:, None, None, None]).to(torch.uint8), labels, ("a", "b", "c"))
    data = Dataset("tiny", "image", split, split[torch.arange(30)])
    spec = TaskSpec(dataset=DatasetSpec(name="tiny"), model="convnet3", recipe="smoke")
    return Task(spec, data, modality_of(data), Recipe(epochs=3, batch_size=16, lr=0.05))


def linear_classifier(shape: tuple[int, int, int], classes: int = 4, seed: int = 0) -> Classifier:
    with isolated_rng(seed):
        net = nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))
    return Classifier(net, ImageModality(*shape), "linear", classes).eval().requires_grad_(False)


# --- pairs and places -------------------------------------------------------------------------------------------------


def slow_pairs(distances: Tensor) -> list[int]:
    """Sort all pairs, take the closest whose two ends are free."""
    rows, columns = distances.shape
    order = sorted((float(distances[i, j]), i, j) for i in range(rows) for j in range(columns))
    found: dict[int, int] = {}
    for _, i, j in order:
        if i not in found and j not in found.values():
            found[i] = j
    return [found[i] for i in range(rows)]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 7), (40, 40), (5, 9)])
@pytest.mark.parametrize("ties", [False, True])
def test_pairing_is_the_greedy_one(rows: int, columns: int, ties: bool) -> None:
    for seed in range(5):
        distances = torch.rand(rows, columns, generator=generator(seed))
        distances = (4 * distances).round() if ties else distances
        before = distances.clone()
        found = greedy_pairs(distances)
        assert found.tolist() == slow_pairs(distances)
        assert len(set(found.tolist())) == rows
        assert torch.equal(distances, before)


def test_pairing_of_equal_features() -> None:
    assert greedy_pairs(torch.zeros(4, 4)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("shape", SHAPES)
def test_patch_is_pasted_inside_at_its_place(shape: tuple[int, int, int]) -> None:
    images, patch = pictures(shape), pictures((shape[0], 5, 5), 3)[0]
    share = torch.rand(len(images), 2, generator=generator())
    share[0], share[1] = 0.0, 1 - 2**-24
    corners = corners_from(share, images, patch)
    assert corners[0].tolist() == [0, 0]
    assert corners[1].tolist() == [shape[1] - 5, shape[2] - 5]
    wanted = images.clone()
    for image, (top, left) in zip(wanted, corners.tolist(), strict=True):
        image[:, top : top + 5, left : left + 5] = patch
    assert torch.equal(paste_at(images, patch, corners), wanted)


def test_all_places_are_used() -> None:
    images, patch = torch.zeros(600, 1, 8, 9, dtype=torch.uint8), torch.full((1, 7, 7), 255, dtype=torch.uint8)
    stamped = expect_images(PlacedPatchTrigger(patch, 3)(images))
    assert (stamped.flatten(1) == 255).sum(1).unique().tolist() == [49]
    counts = torch.unique(stamped, dim=0, return_counts=True)[1]
    assert len(counts) == 2 * 3
    assert int(counts.min()) > 60
    assert not torch.equal(expect_images(PlacedPatchTrigger(patch, 4)(images)), stamped)


def test_patch_that_does_not_fit() -> None:
    trigger = PlacedPatchTrigger(torch.zeros(3, 9, 9, dtype=torch.uint8), 0)
    for shape in ((2, 3, 8, 20), (2, 1, 20, 20)):
        with pytest.raises(InputError, match="3 channels and at least 9x9"):
            trigger(torch.zeros(shape, dtype=torch.uint8))
    for attack in (Htba(size=17, poison_rate=0.1), Fc(size=17, poison_rate=0.1)):
        with pytest.raises(InputError, match=f"{attack.name}: .* at most 16"):
            attack.make_trigger(tiny_task(), Context())


def test_colours_are_a_smooth_patch() -> None:
    patch = draw_colours(3, 8, generator())
    assert patch.shape == (3, 8, 8)
    assert patch.unique().numel() > 20
    assert torch.equal(draw_colours(1, 4, generator(1)).flatten(), torch.randint(0, 256, (16,), generator=generator(1)))


# --- FC ---------------------------------------------------------------------------------------------------------------


def test_forward_backward_step_is_the_proximal_map() -> None:
    """The backward half minimises |z - moved|^2 / (2 step) + beta / 2 |z - base|^2 in [0, 255]: searched on a grid."""
    z, base = pictures((1, 3, 3), 4).double(), pictures((1, 3, 3), 4, 1).double()
    gradient = 300 * torch.randn(z.shape, generator=generator(), dtype=torch.float64)
    step = torch.tensor([0.1, 0.5, 1.0, 2.0], dtype=torch.float64)[:, None, None, None]
    drift = 20 * torch.randn(z.shape, generator=generator(1), dtype=torch.float64)
    found = forward_backward(z, gradient, base, step, 0.7, drift)
    grid = torch.linspace(0, 255, 25501, dtype=torch.float64)
    for n, i, j in [(n, i, j) for n in range(4) for i in range(3) for j in range(3)]:
        moved = z[n, 0, i, j] - step[n, 0, 0, 0] * gradient[n, 0, i, j] + drift[n, 0, i, j]
        cost = (grid - moved) ** 2 / (2 * step[n, 0, 0, 0]) + 0.35 * (grid - base[n, 0, i, j]) ** 2
        assert abs(float(grid[cost.argmin()] - found[n, 0, i, j])) <= 0.0051


def test_feature_gradient_is_that_of_each_image_alone() -> None:
    task = tiny_task()
    model = clean_surrogate(task, SHARED)
    images, wanted = expect_images(task.train.inputs)[:4].float(), predict_features(model, task.train.inputs[4:8])
    loss, gradient = distance_and_gradient(model, images, wanted)
    one = torch.zeros_like(images[0])
    one[0, 7, 7] = 0.5
    for i in range(4):
        at = [
            float((features(model, (images[i : i + 1] + sign * one) / 255) - wanted[i]).square().sum())
            for sign in (-1, 1)
        ]
        assert float(loss[i]) == pytest.approx(sum(at) / 2, rel=1e-2)
        assert float(gradient[i, 0, 7, 7]) == pytest.approx(at[1] - at[0], rel=0.05, abs=1e-4)


def test_weight_decides_between_features_and_pixels() -> None:
    task, context = tiny_task(), SHARED
    model = clean_surrogate(task, context)
    base = expect_images(task.train.inputs)[task.train.labels == 0][:6]
    wanted = predict_features(model, task.train.inputs[task.train.labels == 2][:6])
    near, changed = [], []
    for beta in (0.0, 0.01, 1e6):
        found = attract(model, base, wanted, beta, 2.0, 30, 0.9, context)
        near.append(float((predict_features(model, found) - wanted).square().sum()))
        changed.append(float((found.float() - base.float()).square().mean().sqrt()))
    start = float((predict_features(model, base) - wanted).square().sum())
    assert near[0] < near[1] < start
    assert near[0] < 0.2 * start
    assert changed[0] > changed[1] > changed[2] == 0


def test_momentum_comes_nearer_in_as_many_steps() -> None:
    task, context = tiny_task(), SHARED
    model = clean_surrogate(task, context)
    base = expect_images(task.train.inputs)[task.train.labels == 0][:12]
    wanted = predict_features(model, task.train.inputs[task.train.labels == 2][:12])
    left = [
        float((predict_features(model, attract(model, base, wanted, 0.0, 2.0, 20, momentum, context)) - wanted).norm())
        for momentum in (0.0, 0.9)
    ]
    assert left[1] < 0.9 * left[0]


# --- HTBA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1, 16])
def test_hidden_images_stay_in_the_box(eps: int) -> None:
    task, context = tiny_task(), SHARED
    model = clean_surrogate(task, context)
    base = expect_images(task.train.inputs)[task.train.labels == 0].clone()
    base[0], base[1] = 0, 255
    aims = predict_features(model, task.train.inputs[task.train.labels == 2])
    found = hide(model, base, aims, eps, 0.01, 40, context)
    change = found.short() - base.short()
    assert int(change.abs().max()) == eps
    before, after = (torch.cdist(predict_features(model, x), aims).mean() for x in (base, found))
    assert float(after) < float(before)


def test_patch_is_hidden() -> None:
    task = tiny_task()
    attack = Htba(target=1, poison_rate=0.1, steps=5, eps=8)
    backdoor = attack.run(task, SHARED)
    clean = expect_images(task.train.inputs)[backdoor.poison.indices].short()
    assert int((expect_images(backdoor.poison.inputs).short() - clean).abs().max()) <= 8
    assert backdoor.notes["largest_change"] <= 8
    assert backdoor.notes["victim"] == "finetune"
    tested = expect_images(task.test.inputs)
    assert int((expect_images(backdoor.trigger(tested)).short() - tested.short()).abs().max()) > 8


# --- victims ----------------------------------------------------------------------------------------------------------


def test_only_the_head_is_retrained() -> None:
    task, context = tiny_task(), SHARED
    model, known = clean_surrogate(task, context), clean_surrogate(task, context)
    log = retrain_head(model, task.train, 1e-3, context, "test")
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, known.state_dict()[name])}
    last = {name for name, module in model.named_modules() if module is head(model)}.pop()
    assert changed == {f"{last}.weight", f"{last}.bias"}
    assert all(p.requires_grad for p in model.parameters())
    assert not model.training
    assert log.loss[-1] < log.loss[0]


@pytest.mark.parametrize("attack", [Htba(poison_rate=0.1, steps=3), Fc(poison_rate=0.1, steps=3)], ids=lambda a: a.name)
def test_victim_from_scratch_is_another_network(attack: PoisoningAttack) -> None:
    task, context = tiny_task(), SHARED
    tuned = attack.run(task, context)
    fresh = dataclasses.replace(attack, victim="scratch").run(task, context)  # type: ignore[call-arg]
    assert torch.equal(tuned.poison.inputs, fresh.poison.inputs)  # type: ignore[arg-type]
    weight = next(iter(clean_surrogate(task, context).state_dict()))
    assert torch.equal(tuned.model.state_dict()[weight], clean_surrogate(task, context).state_dict()[weight])
    assert not torch.equal(fresh.model.state_dict()[weight], tuned.model.state_dict()[weight])
    assert (tuned.notes["victim"], fresh.notes["victim"]) == ("finetune", "scratch")


@pytest.mark.parametrize("attack", [Htba(poison_rate=0.1, steps=3), Fc(poison_rate=0.1, steps=3)], ids=lambda a: a.name)
def test_decay_of_the_new_head_is_the_recipes_unless_given(attack: CollisionAttack) -> None:
    task = tiny_task()
    heads = [
        head(dataclasses.replace(attack, head_decay=decay).run(task, SHARED).model).weight.detach()
        for decay in (None, task.recipe.weight_decay, 0.0, 10.0)
    ]
    assert torch.equal(heads[0], heads[1])
    norms = [float(weight.norm()) for weight in heads]
    assert norms[3] < norms[0] < norms[2]


# --- TUAP -------------------------------------------------------------------------------------------------------------


def test_margin_is_against_the_best_other_class() -> None:
    model = linear_classifier((1, 4, 4))
    inputs = torch.rand(9, 1, 4, 4, generator=generator())
    for row, logits in zip(margins(model, inputs, 2).tolist(), model(inputs).tolist(), strict=True):
        assert row == pytest.approx(logits[2] - max(logits[0], logits[1], logits[3]), abs=1e-6)


@pytest.mark.parametrize("overshoot", [0.0, 0.02])
def test_deepfool_step_on_two_linear_classes_is_the_closed_form(overshoot: float) -> None:
    model = linear_classifier((1, 4, 4), classes=2)
    inputs = torch.randn(20, 1, 4, 4, generator=generator())
    weight, bias = (p.detach() for p in model.net[1].parameters())  # type: ignore[index]
    w, b = weight[1] - weight[0], bias[1] - bias[0]
    gap = inputs.flatten(1) @ w + b
    assert bool((gap < 0).any())
    assert bool((gap > 0).any())
    wanted = (1 + overshoot) * (-gap).clamp_min(0)[:, None] * w / w.square().sum()
    found = targeted_deepfool(model, inputs, 1, overshoot, 1).flatten(1)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


def test_deepfool_of_a_batch_is_that_of_each_image() -> None:
    """In double precision and over few steps: each linearisation of a network with kinks amplifies what is rounded."""
    task = tiny_task((3, 29, 31))
    model = clean_surrogate(task, SHARED).double()
    inputs = expect_images(task.train.inputs)[:12].double() / 255
    found = targeted_deepfool(model, inputs, 0, 0.02, 50)
    arrived = margins(model, inputs, 0) > 0
    assert float(margins(model, inputs + found, 0).min()) > 0
    assert torch.equal(found.flatten(1).any(1), ~arrived)
    found = targeted_deepfool(model, inputs, 0, 0.02, 8)
    for i in range(12):
        alone, x = torch.zeros_like(inputs[i]), inputs[i]
        for _ in range(8):  # textbook form: two gradients, one image
            z = (x + 1.02 * alone).clone().requires_grad_()
            logits = model(z[None])[0]
            best = int(logits.argmax())
            if best == 0:
                break
            up, down = (torch.autograd.grad(logits[k], z, retain_graph=True)[0] for k in (0, best))
            w = up - down
            alone = alone + (logits[0] - logits[best]).abs().detach() * w / w.square().sum()
        torch.testing.assert_close(found[i], 1.02 * alone, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("eps", [3.0, 10.0, 10.7])
def test_universal_perturbation_is_bounded_and_misleads(eps: float) -> None:
    task, context = tiny_task(), SHARED
    attack = Tuap(target=0, eps=eps, poison_rate=0.1, share=1.0, passes=2)
    trigger = attack.make_trigger(task, context)
    assert torch.equal(trigger.pattern, trigger.pattern.round())
    assert 0 < float(trigger.pattern.abs().max()) <= eps
    images = expect_images(task.train.inputs)
    change = expect_images(trigger(images)).short() - images.short()
    assert int(change.abs().max()) <= eps


def test_universal_perturbation_reaches_its_aim() -> None:
    task, context = tiny_task(), SHARED
    model = clean_surrogate(task, context)
    images = expect_images(task.train.inputs)[task.train.labels != 0]
    settings = {"overshoot": 0.02, "steps": 50, "fooling": 0.8, "passes": 20, "batch": 8, "ctx": context}
    with frozen(model):
        noise, reached = universal_perturbation(model, images, 0, eps=1.0, **settings)  # type: ignore[arg-type]
        faint, little = universal_perturbation(model, images, 0, eps=1 / 255, **settings)  # type: ignore[arg-type]
    share = float((margins(model, (images.float() / 255 + noise).clamp(0, 1), 0) > 0).float().mean())
    assert reached == pytest.approx(share)
    assert reached >= 0.8 > little
    assert float(255 * faint.abs().max()) == pytest.approx(1)
