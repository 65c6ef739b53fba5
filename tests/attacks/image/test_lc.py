"""Label-consistent: against slow, independent implementations and closed forms; its options; its effect."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from attack_tools import GREY, ODD, make, pictures, same_grey, tiny_task
from backdoorlab.attacks import attacks
from backdoorlab.attacks.image.lc import Lc, draw_corners, perturb
from backdoorlab.core.errors import InputError
from backdoorlab.models import Classifier
from backdoorlab.tasks import Task
from backdoorlab.training import Context
from effect_tools import LOST, OBEYS, Numbers, case, effects, least, planted


@pytest.mark.parametrize(("shape", "times"), [((1, 16, 16), 1), ((3, 32, 32), 1), ((3, 29, 31), 1), ((3, 64, 64), 2)])
def test_lc_corners(shape: tuple[int, int, int], times: int) -> None:
    drawn = draw_corners(*shape, 255.0)[0].numpy()
    left = np.kron(np.array([[1, -1, -1], [-1, 1, -1], [1, -1, 1]]), np.ones((times, times))) * 255
    side, (height, width) = 3 * times, shape[1:]
    right = left[:, ::-1]
    for top in (0, height - side):
        assert np.array_equal(drawn[top : top + side, :side], left)
        assert np.array_equal(drawn[top : top + side, width - side :], right)
    assert int((drawn != 0).sum()) == 4 * side**2
    assert np.array_equal(drawn, drawn[:, ::-1]), "mirroring changes nothing"
    with pytest.raises(InputError, match="overlap in an image of 5x9"):
        draw_corners(1, 5, 9, 255.0)


def test_lc_perturbation_step_by_step(digits_task: Task, benign_digits: Classifier) -> None:
    images, labels = digits_task.train.inputs[:12], digits_task.train.labels[:12]
    found = perturb(benign_digits, images, labels, 8.0, 3.0, 4, Context())
    slow = images.double() / 255
    for _ in range(4):
        x = slow.float().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(benign_digits(x), labels, reduction="sum"), x)
        slow = slow + 3 / 255 * gradient.sign()
        slow = torch.minimum(torch.maximum(slow, images / 255 - 8 / 255), images / 255 + 8 / 255).clamp(0, 1)
    assert float((found - (255 * slow).round()).abs().gt(0.5).float().mean()) < 0.01
    assert int((found.int() - images.int()).abs().max()) <= 8
    with torch.no_grad():
        before, after = (F.cross_entropy(benign_digits(i.float() / 255), labels) for i in (images, found))
    assert after > 10 * before


def test_lc_robust_surrogate_withstands_more(digits_task: Task, benign_digits: Classifier) -> None:
    """The same attack on both: the adversarially trained model keeps a higher accuracy."""
    robust = Lc(surrogate_eps=16.0).robust_surrogate(digits_task, Context())
    images, labels = digits_task.test.inputs[:200], digits_task.test.labels[:200]
    kept = []
    for model in (benign_digits, robust):
        hard = perturb(model, images, labels, 16.0, 4.0, 10, Context())
        with torch.no_grad():
            kept.append(float((model(hard.float() / 255).argmax(1) == labels).float().mean()))
    assert kept[1] > kept[0] + 0.1
    assert not any(p.requires_grad for p in robust.parameters())


@pytest.mark.parametrize("amplitude", [255.0, 40.5])
@pytest.mark.parametrize("shape", [*[GREY, ODD], (3, 64, 64)])
def test_lc_corners_are_added_with_clipping(shape: tuple[int, int, int], amplitude: float) -> None:
    rows = ((1, -1, -1), (-1, 1, -1), (1, -1, 1))
    height, width = shape[1:]
    times = max(1, round(min(height, width) / 32))
    images = pictures(shape, 4)
    slow = images.numpy().astype(float)
    for a in range(3 * times):
        for b in range(3 * times):
            value = amplitude * rows[a // times][b // times]
            for i in (a, height - 3 * times + a):
                slow[:, :, i, b] += value
                slow[:, :, i, width - 1 - b] += value
    trigger = make(attacks.get("lc", "image"), amplitude=amplitude).make_trigger(tiny_task(shape), Context())  # type: ignore[attr-defined]
    same_grey(trigger(images), slow)


@case("attack/image/lc", asr=least(0.5), acc_lost=LOST, benign_asr=OBEYS)
def effect_of_lc(seed: int) -> Numbers:
    return planted(seed, "lc", poison_rate=0.08, eps=64.0, step=4.0, steps=40, surrogate_eps=32.0)[1]


test_effect = effects(__name__)
