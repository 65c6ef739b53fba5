"""TUAP: against slow, independent implementations and closed forms; its options; its effect."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attack_tools import bright_task, generator
from backdoorlab.attacks.common.surrogate import clean_surrogate
from backdoorlab.attacks.image.tuap import Tuap, margins, targeted_deepfool, universal_perturbation
from backdoorlab.core.seeding import isolated_rng
from backdoorlab.modalities.filters import expect_images
from backdoorlab.modalities.image import ImageModality
from backdoorlab.models import Classifier
from backdoorlab.models.anatomy import frozen
from backdoorlab.training import Context
from effect_tools import LOST, Numbers, case, effects, least, most, planted

SHARED = Context()
"""One cache, so that each surrogate is trained once."""


def linear_classifier(shape: tuple[int, int, int], classes: int = 4, seed: int = 0) -> Classifier:
    with isolated_rng(seed):
        net = nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))
    return Classifier(net, ImageModality(*shape), "linear", classes).eval().requires_grad_(False)


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
    task = bright_task((3, 29, 31))
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
    task, context = bright_task(), SHARED
    attack = Tuap(target=0, eps=eps, poison_rate=0.1, share=1.0, passes=2)
    trigger = attack.make_trigger(task, context)
    assert torch.equal(trigger.pattern, trigger.pattern.round())
    assert 0 < float(trigger.pattern.abs().max()) <= eps
    images = expect_images(task.train.inputs)
    change = expect_images(trigger(images)).short() - images.short()
    assert int(change.abs().max()) <= eps


def test_universal_perturbation_reaches_its_aim() -> None:
    task, context = bright_task(), SHARED
    model = clean_surrogate(task, context)
    images = expect_images(task.train.inputs)[task.train.labels != 0]
    settings = {"overshoot": 0.02, "steps": 50, "fooling": 0.8, "passes": 20, "batch_size": 8, "ctx": context}
    with frozen(model):
        noise, reached = universal_perturbation(model, images, 0, eps=1.0, **settings)  # type: ignore[arg-type]
        faint, little = universal_perturbation(model, images, 0, eps=1 / 255, **settings)  # type: ignore[arg-type]
    share = float((margins(model, (images.float() / 255 + noise).clamp(0, 1), 0) > 0).float().mean())
    assert reached == pytest.approx(share)
    assert reached >= 0.8 > little
    assert float(255 * faint.abs().max()) == pytest.approx(1)


@case("attack/image/tuap", asr=least(0.6), acc_lost=LOST, benign_asr=most(0.6))
def effect_of_tuap(seed: int) -> Numbers:
    return planted(seed, "tuap", target=1, poison_rate=0.09, eps=76.0)[1]


test_effect = effects(__name__)
