"""LF: against slow, independent implementations and closed forms; its options; its effect."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.fft import dctn
from torch.nn.functional import cross_entropy

from attack_tools import per_pixel, pictures, two_class_task
from backdoorlab.attacks.image.lf import Lf, low_frequency_field, optimise_pattern
from backdoorlab.attacks.triggers.pixels import AdditiveTrigger
from backdoorlab.models import Classifier
from backdoorlab.tasks import Task
from backdoorlab.training import Context
from effect_tools import LOST, OBEYS, Numbers, case, effects, least, planted


def test_lf_addition() -> None:
    images = pictures((3, 16, 16))
    pattern = (12.5 + 13.5 * low_frequency_field(3, 16, 16, 0)).round()
    slow = per_pixel(images, lambda x, c, i, j: x + float(pattern[c, i, j]))
    assert torch.equal(AdditiveTrigger(pattern)(images), slow)


@pytest.mark.parametrize("variant", ["optimised", "random"])
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 32, 32)])
def test_lf_has_the_strength_of_the_published_arrays(shape: tuple[int, int, int], variant: str) -> None:
    """Standard deviation 13.5 and mean 12.5 grey levels in either variant."""
    context = Context()
    pattern = Lf(variant=variant, steps=2).make_trigger(two_class_task(shape), context).pattern
    assert float(pattern.std(unbiased=False)) == pytest.approx(13.5, rel=0.05)
    assert float(pattern.mean()) == pytest.approx(12.5, abs=0.5)
    assert torch.equal(pattern, pattern.round())
    stronger = Lf(variant=variant, steps=2, std=30.0, mean=0.0).make_trigger(two_class_task(shape), context).pattern
    assert float(stronger.std(unbiased=False)) == pytest.approx(30, rel=0.05)


def test_lf_random_field_is_smooth() -> None:
    field = low_frequency_field(1, 24, 20, 3)[0].double().numpy()
    coefficients = dctn(field, norm="ortho")
    u, v = np.indices(coefficients.shape)
    assert np.abs(coefficients[u + v > 6]).max() < 1e-5
    assert np.abs(coefficients[(u + v <= 6) & (u + v > 0)]).min() > 1e-6


def test_lf_optimisation_lowers_the_loss_of_the_target(digits_task: Task, benign_digits: Classifier) -> None:
    images, target = digits_task.train.inputs[:200], torch.zeros(200, dtype=torch.int64)
    pattern = optimise_pattern(benign_digits, images, 0, 0.1, 0.08, 3.2, 100, Context())
    assert float(pattern.mean()) == pytest.approx(0.1, abs=1e-6)
    assert float(pattern.std(unbiased=False)) == pytest.approx(0.08)
    random = 0.1 + 0.08 * low_frequency_field(1, 16, 16, 0)
    with torch.no_grad():
        x = images.float() / 255
        clean, other, found = (
            float(cross_entropy(benign_digits((x + p).clamp(0, 1)), target)) for p in (0 * random, random, pattern)
        )
    assert found < min(clean, other) - 1
    # No pixel differs from its neighbour by more than a blur of this width allows.
    assert float((pattern[:, 1:] - pattern[:, :-1]).abs().max()) < 0.06


def test_lf_optimisation_leaves_the_model_alone(digits_task: Task) -> None:
    model = digits_task.build_model(Context()).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimise_pattern(model, digits_task.train.inputs[:20], 0, 0.1, 0.08, 3.2, 2, Context())
    assert all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@case("attack/image/lf", asr=least(0.9), acc_lost=LOST, benign_asr=OBEYS)
def effect_of_lf(seed: int) -> Numbers:
    return planted(seed, "lf", poison_rate=0.1)[1]


test_effect = effects(__name__)
