"""Cognitive distillation: loss against a slow loop, direction of the score, calibration on clean samples."""

from __future__ import annotations

import copy

import pytest
import torch

from backdoorlab.attacks import attacks
from backdoorlab.core.errors import InputError
from backdoorlab.data.split import BACKDOOR
from backdoorlab.defenses import DefenderView
from backdoorlab.defenses.common.distillation import distillation_loss, total_variation
from backdoorlab.defenses.dataset.cd import CognitiveDistillation
from backdoorlab.testing import tiny_task
from backdoorlab.training import Context
from effect_tools import Numbers, benign, case, clean, effects, found, least, most, task


def test_total_variation_equals_a_slow_loop() -> None:
    masks = torch.rand(2, 1, 4, 5, generator=torch.Generator().manual_seed(0))
    for mask, value in zip(masks[:, 0], total_variation(masks), strict=True):
        total = sum(float((mask[i + 1, j] - mask[i, j]) ** 2) for i in range(3) for j in range(5))
        total += sum(float((mask[i, j + 1] - mask[i, j]) ** 2) for i in range(4) for j in range(4))
        assert float(value) == pytest.approx(total / 20, rel=1e-5)


def test_loss_by_hand() -> None:
    """Mean of |3|, |-1|; a mask of four ones and two halves, with three steps of 1/2."""
    masks = torch.tensor([[[[1.0, 1.0, 0.5], [1.0, 1.0, 0.5]]]])
    loss = distillation_loss(torch.tensor([[4.0, 0.0]]), torch.tensor([[1.0, 1.0]]), masks, 0.1, 6.0)
    assert loss.tolist() == pytest.approx([2 + 0.1 * 5 + 6 * (2 * 0.25) / 6])


def test_masks_are_those_of_a_slow_loop_over_samples() -> None:
    model, inputs = copy.deepcopy(benign(0)).eval(), task(0).test.inputs[:3]
    method = CognitiveDistillation(iterations=1, alpha=0.05)
    together = method.masks(model, inputs, Context(1), "")
    for i in range(3):
        generator = Context(1).generator("cd", "colours")
        x = inputs[i : i + 1].float() / 255
        hidden = torch.ones(1, 1, 16, 16, requires_grad=True)
        optimizer = torch.optim.Adam([hidden], 0.1, betas=(0.1, 0.1))
        wanted = model(x).detach()
        for _ in range(1):
            color = torch.rand(1, 1, 1, 1, generator=generator)
            mask = (hidden.tanh() + 1) / 2
            out = model(x * mask + (1 - mask) * color)
            rough = (mask[..., 1:, :] - mask[..., :-1, :]).square().sum() + (
                mask[..., 1:] - mask[..., :-1]
            ).square().sum()
            loss = (out - wanted).abs().mean() + 0.05 * mask.sum() + 10 * rough / 256
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        # Adam divides by the gradient's size: where that is next to nothing, a last bit moves single values visibly.
        apart = (together[i] - ((hidden.tanh() + 1) / 2)[0].detach()).abs()
        assert float((apart < 2e-3).float().mean()) > 0.8
        assert float(apart.mean()) < 2e-2


def test_a_mask_does_not_depend_on_the_batch() -> None:
    model, inputs = benign(0), task(0).test.inputs[:5]
    one, other = (
        CognitiveDistillation(iterations=3, batch_size=b).masks(model, inputs, Context(0), "") for b in (5, 2)
    )
    assert torch.allclose(one, other, atol=1e-4)


def test_small_masks_are_suspicious_and_clean_ones_are_not() -> None:
    sizes = torch.arange(1.0, 101.0, dtype=torch.float64)
    margin = CognitiveDistillation(frr=0.05).margin(torch.tensor([0.5, 50.0, 200.0]).double(), sizes)
    assert (margin > 0).tolist() == [True, False, False]
    assert margin[0] > margin[1] > margin[2]
    assert float((CognitiveDistillation(frr=0.05).margin(sizes, sizes) > 0).double().mean()) <= 0.05
    paper = CognitiveDistillation(rule="gamma", gamma=1.0).margin(sizes, sizes)
    limit = float(sizes.mean() - sizes.std(correction=0))
    assert torch.equal(paper > 0, sizes < limit)


def test_equal_masks_flag_nothing() -> None:
    assert not (CognitiveDistillation().margin(torch.ones(4).double(), torch.ones(3).double()) > 0).any()


def test_videos_get_one_mask_for_all_frames() -> None:
    mine = tiny_task("video")
    model, _ = mine.fit(mine.train, Context(1))
    masks = CognitiveDistillation(iterations=2).masks(model, mine.train.inputs[:2], Context(0), "")
    assert masks.shape == (2, 1, *mine.train.inputs.shape[-2:])


def test_one_clean_sample_does_not_suffice() -> None:
    view = DefenderView(model=benign(0), suspicious=task(0).test, clean=clean(0)[torch.arange(1)])
    with pytest.raises(InputError, match="cd needs at least 2 clean samples, got 1"):
        CognitiveDistillation().apply(view, Context(0))


@case("defense/dataset/cd", auroc=least(0.9), tpr=least(0.5), fpr=most(0.2))
def effect_of_cd(seed: int) -> Numbers:
    """Of 100 poisoned and 200 clean images: a hundred passes through the model for each."""
    mine, ctx = task(seed), Context(seed)
    backdoor = attacks.get("blended", "image")(poison_rate=0.1).run(mine, ctx)
    data = backdoor.poison.apply(mine.train)
    truth = data.roles == BACKDOOR
    rows = torch.cat([truth.nonzero().flatten()[:100], (~truth).nonzero().flatten()[:200]])
    view = DefenderView(model=backdoor.model, suspicious=data.as_seen()[rows], clean=clean(seed))
    outcome = CognitiveDistillation().apply(view, ctx)
    return found(outcome.flags, outcome.scores, truth[rows])


test_effect = effects(__name__)
