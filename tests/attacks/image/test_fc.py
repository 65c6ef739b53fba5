"""Feature collision: against slow, independent implementations and closed forms; its options; its effect."""

from __future__ import annotations

import pytest
import torch

from attack_tools import bright_task, generator, pictures
from backdoorlab.attacks.common.surrogate import clean_surrogate
from backdoorlab.attacks.image.fc import attract, distance_and_gradient, forward_backward
from backdoorlab.modalities.filters import expect_images
from backdoorlab.models.anatomy import features
from backdoorlab.training import Context
from backdoorlab.training.evaluate import predict_features
from effect_tools import LOST, OBEYS, Numbers, case, effects, least, planted

SHARED = Context()
"""One cache, so that each surrogate is trained once."""


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
    task = bright_task()
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
    task, context = bright_task(), SHARED
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
    task, context = bright_task(), SHARED
    model = clean_surrogate(task, context)
    base = expect_images(task.train.inputs)[task.train.labels == 0][:12]
    wanted = predict_features(model, task.train.inputs[task.train.labels == 2][:12])
    left = [
        float((predict_features(model, attract(model, base, wanted, 0.0, 2.0, 20, momentum, context)) - wanted).norm())
        for momentum in (0.0, 0.9)
    ]
    assert left[1] < 0.9 * left[0]


@case("attack/image/fc", asr=least(0.7), acc_lost=LOST, benign_asr=OBEYS)
def effect_of_fc(seed: int) -> Numbers:
    return planted(seed, "fc", poison_rate=0.09, size=8, steps=200)[1]


test_effect = effects(__name__)
