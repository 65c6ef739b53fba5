"""STRIP: the entropy against a loop, the layout of the blends and the threshold."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from backdoorlab.attacks import Backdoor
from backdoorlab.core.errors import InputError
from backdoorlab.data.split import Split, text_array
from backdoorlab.defenses import DefenderView
from backdoorlab.defenses.dataset.strip import StripDataset
from backdoorlab.defenses.input import strip
from backdoorlab.defenses.input.strip import Overlay, Strip, entropy, overlay_entropy, saturating_sum
from backdoorlab.tasks import Task
from backdoorlab.training import Context, predict
from effect_tools import (
    Numbers,
    case,
    detected,
    effects,
    least,
    most,
    screened,
)


def some_clean(task: Task, count: int = 144) -> Split:
    return task.train[torch.randperm(len(task.train), generator=torch.Generator().manual_seed(5))[:count]]


def test_entropy_is_shannon_in_bits() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [100.0, 0.0, 0.0, 0.0], [math.log(3), 0.0, -1e9, -1e9]])
    p = np.array([0.75, 0.25])
    wanted = [2.0, 0.0, float(-(p * np.log2(p)).sum())]
    assert entropy(logits).tolist() == pytest.approx(wanted, abs=1e-6)


def test_saturating_sum_stays_in_the_range_of_the_dtype() -> None:
    a, b = torch.tensor([250, 10, 0], dtype=torch.uint8), torch.tensor([20, 5, 255], dtype=torch.uint8)
    assert saturating_sum(a, b, 1.0).tolist() == [255, 15, 255]
    assert saturating_sum(a, b, 0.5).tolist() == [255, 12, 128]
    sound = torch.tensor([-32000, 100], dtype=torch.int16)
    assert saturating_sum(sound, sound, 1.0).tolist() == [-32768, 200]
    assert saturating_sum(torch.tensor([0.8, -0.1]), torch.tensor([0.8, -0.1]), 1.0).tolist() == pytest.approx(
        [1, -0.2]
    )


@pytest.mark.parametrize("superimpose", ["add", "blend"])
def test_batched_entropy_equals_a_loop_over_samples(
    badnets_digits: Backdoor, digits_task: Task, monkeypatch: pytest.MonkeyPatch, superimpose: str
) -> None:
    """Sample-major layout: the mean must run over the overlays of one sample, not over samples."""
    model, inputs, overlays = badnets_digits.model, digits_task.test.inputs[:7], digits_task.train.inputs[:5]
    overlay = Overlay(superimpose, weight=0.75, ratio=0.25)  # exact in single and in double precision
    monkeypatch.setattr(strip, "FORWARD_BATCH", 12)  # two samples a pass, the last pass holds one
    fast = overlay_entropy(model, inputs, overlays, overlay, torch.Generator())
    for x, found in zip(inputs.double(), fast.tolist(), strict=True):
        total = 0.0
        for c in overlays.double():
            mixed = (x + 0.75 * c).clamp(0, 255) if superimpose == "add" else 0.75 * x + 0.25 * c
            p = predict(model, mixed.round().to(torch.uint8)[None]).double().softmax(1)[0]
            total += float(-(p * p.log2()).sum())
        assert found == pytest.approx(total / 5, abs=1e-4)


def test_text_is_blended_by_its_modality() -> None:
    class Words:
        def blend(self, a: np.ndarray, b: np.ndarray, ratio: float, generator: torch.Generator) -> np.ndarray:
            return text_array([f"{x}|{y}|{ratio}" for x, y in zip(a, b, strict=True)])

    laid = Overlay("add", 1.0, 0.4)(Words(), text_array(["a"]), text_array(["b"]), torch.Generator())  # type: ignore[arg-type]
    assert laid.tolist() == ["a|b|0.4"]


def test_threshold_keeps_the_false_rejection_rate_on_calibration(badnets_digits: Backdoor, digits_task: Task) -> None:
    ctx, clean = Context(seed=3), some_clean(digits_task, 100)
    detector = Strip(overlays=10, frr=0.1).run(DefenderView(model=badnets_digits.model, clean=clean), ctx)
    order = torch.randperm(100, generator=ctx.generator("overlays"))
    used = {x.numpy().tobytes() for x in detector.overlays}
    held_out = clean.inputs[order[50:]]
    assert not any(x.numpy().tobytes() in used for x in held_out), "overlays and calibration must be disjoint"
    assert detector.flags(detector.score(held_out)).sum() == 4  # as many as 10 % of 50 allow without exceeding it
    again = Strip(overlays=10, frr=0.1).run(DefenderView(model=badnets_digits.model, clean=clean), ctx)
    assert again.threshold == detector.threshold


def test_scores_do_not_depend_on_the_rest_of_the_batch(badnets_digits: Backdoor, digits_task: Task) -> None:
    detector = Strip(overlays=8).run(DefenderView(model=badnets_digits.model, clean=some_clean(digits_task)), Context())
    whole, part = detector.score(digits_task.test.inputs[:40]), detector.score(digits_task.test.inputs[30:40])
    assert torch.allclose(whole[30:], part, atol=1e-4)


def test_too_few_clean_samples_are_refused(badnets_digits: Backdoor, digits_task: Task) -> None:
    with pytest.raises(InputError, match="at least 4 clean samples"):
        Strip().run(DefenderView(model=badnets_digits.model, clean=some_clean(digits_task, 3)), Context())


@case("defense/dataset/strip", auroc=least(0.75), gain=least(2))
def effect_of_strip_dataset(seed: int) -> Numbers:
    """ "gain": share of poisoned samples that are flagged / share of clean ones."""
    numbers = screened(seed, StripDataset(overlays=15))
    return numbers | {"gain": numbers["tpr"] / max(numbers["fpr"], 1e-3)}


@case("defense/input/strip", core=True, auroc=least(0.9), tpr=least(0.7), fpr=most(0.2), benign_gap=most(0.3))
def effect_of_strip(seed: int) -> Numbers:
    return detected(seed, Strip(overlays=30))


test_effect = effects(__name__)
