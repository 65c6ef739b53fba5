"""FT-SAM: its step against the formula, and its effect."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.defenses.repair.ft_sam import (
    SharpnessAwareFineTuning,
    SharpnessAwareStep,
    ascent,
    statistics_kept,
)
from backdoorlab.modalities.image import ImageModality
from backdoorlab.models import Classifier, build_model
from backdoorlab.training import Recipe, cross_entropy
from backdoorlab.training.batches import Batch
from effect_tools import Numbers, blended, case, effects, least, most, repaired


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_ascent_is_on_the_border_of_the_neighbourhood_along_the_scaled_gradient() -> None:
    w, g = [random(3, 2), random(4, seed=1)], [random(3, 2, seed=2), random(4, seed=3)]
    flat_w, flat_g = (torch.cat([t.flatten() for t in tensors]) for tensors in (w, g))
    expected = 2 * flat_w**2 * flat_g / (flat_w.abs() * flat_g).norm()
    step = torch.cat([e.flatten() for e in ascent(w, g, 2.0)])
    torch.testing.assert_close(step, expected)
    torch.testing.assert_close((step / flat_w.abs()).norm(), torch.tensor(2.0))
    plain = torch.cat([e.flatten() for e in ascent(w, g, 0.05, adaptive=False)])
    torch.testing.assert_close(plain, 0.05 * flat_g / flat_g.norm())


def test_without_a_gradient_nothing_moves() -> None:
    (step,) = ascent([random(3)], [torch.zeros(3)], 2.0)
    assert torch.equal(step, torch.zeros(3))


def small() -> tuple[Classifier, Batch]:
    model = build_model("convnet3", ImageModality(1, 8, 8), 4)
    return model, Batch((random(6, 1, 8, 8).sigmoid(),), torch.arange(6) % 4, torch.arange(6))


def test_a_step_descends_from_the_present_weights_along_the_gradient_at_the_worst_ones() -> None:
    model, batch = small()
    recipe = Recipe(lr=0.1, momentum=0.0, weight_decay=0.0, precision="fp32")
    reference = copy.deepcopy(model).train()
    names = [name for name, _ in reference.named_parameters()]
    before = {name: p.detach().clone() for name, p in reference.named_parameters()}

    def slopes() -> list[Tensor]:
        loss = F.cross_entropy(reference(batch.inputs), batch.labels)
        return list(torch.autograd.grad(loss, list(reference.parameters())))

    first = slopes()
    size = torch.cat([(before[n].abs() * g).flatten() for n, g in zip(names, first, strict=True)]).norm()
    with torch.no_grad():
        for name, p, g in zip(names, reference.parameters(), first, strict=True):
            p.add_(0.5 * before[name] ** 2 * g / size)
    second = slopes()
    loss = SharpnessAwareStep(model, recipe, cross_entropy, rho=0.5, adaptive=True)(batch)
    for name, p, g in zip(names, model.parameters(), second, strict=True):
        torch.testing.assert_close(p.detach(), before[name] - 0.1 * g, rtol=1e-4, atol=1e-6)
    assert loss.shape == () and not loss.requires_grad


def test_running_statistics_are_updated_once_a_step() -> None:
    model, batch = small()
    once = copy.deepcopy(model).train()
    once(batch.inputs)
    recipe = Recipe(precision="fp32")
    SharpnessAwareStep(model, recipe, cross_entropy, rho=2.0, adaptive=True)(batch)
    for mine, theirs in zip(model.buffers(), once.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_second_pass_uses_batch_statistics_and_keeps_none() -> None:
    norm = nn.BatchNorm1d(3).train()
    x = random(8, 3)
    expected = F.batch_norm(x, None, None, norm.weight, norm.bias, training=True)
    with statistics_kept(norm):
        torch.testing.assert_close(norm(x), expected)
    assert torch.equal(norm.running_mean, torch.zeros(3)) and norm.num_batches_tracked == 0
    norm(x)
    assert norm.num_batches_tracked == 1


@case("defense/repair/ft_sam", der=least(0.85), acc_lost=most(0.06), benign_lost=most(0.08))
def effect_of_ft_sam(seed: int) -> Numbers:
    return repaired(seed, SharpnessAwareFineTuning(), harmless=True)


@case("defense/repair/ft_sam/blended", der=least(0.85), acc_lost=most(0.1))
def effect_of_ft_sam_on_blended(seed: int) -> Numbers:
    return repaired(seed, SharpnessAwareFineTuning(), backdoor=blended(seed))


test_effect = effects(__name__)
