"""Hidden-trigger attack: against slow, independent implementations and closed forms; its options; its effect."""

from __future__ import annotations

import pytest
import torch

from attack_tools import bright_task, generator
from backdoorlab.attacks.common.surrogate import clean_surrogate
from backdoorlab.attacks.image.htba import Htba, draw_colors, hide
from backdoorlab.modalities.filters import expect_images
from backdoorlab.training import Context
from backdoorlab.training.evaluate import predict_features
from effect_tools import LOST, OBEYS, Numbers, case, effects, least, planted

SHARED = Context()
"""One cache, so that each surrogate is trained once."""


def test_colors_are_a_smooth_patch() -> None:
    patch = draw_colors(3, 8, generator())
    assert patch.shape == (3, 8, 8)
    assert patch.unique().numel() > 20
    assert torch.equal(draw_colors(1, 4, generator(1)).flatten(), torch.randint(0, 256, (16,), generator=generator(1)))


@pytest.mark.parametrize("eps", [1, 16])
def test_hidden_images_stay_in_the_box(eps: int) -> None:
    task, context = bright_task(), SHARED
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
    task = bright_task()
    attack = Htba(target=1, poison_rate=0.1, steps=5, eps=8)
    backdoor = attack.run(task, SHARED)
    clean = expect_images(task.train.inputs)[backdoor.poison.indices].short()
    assert int((expect_images(backdoor.poison.inputs).short() - clean).abs().max()) <= 8
    assert backdoor.notes["largest_change"] <= 8
    assert backdoor.notes["victim"] == "finetune"
    tested = expect_images(task.test.inputs)
    assert int((expect_images(backdoor.trigger(tested)).short() - tested.short()).abs().max()) > 8


@case("attack/image/htba", asr=least(0.7), acc_lost=LOST, benign_asr=OBEYS)
def effect_of_htba(seed: int) -> Numbers:
    return planted(seed, "htba", poison_rate=0.09, size=10, eps=48, steps=300)[1]


test_effect = effects(__name__)
