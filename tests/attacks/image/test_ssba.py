"""SSBA: against slow, independent implementations and closed forms; its options; its effect."""

from __future__ import annotations

import pytest
import torch

from attack_tools import textured_task
from backdoorlab.attacks import attacks
from backdoorlab.attacks.image.ssba import default_bits
from backdoorlab.core.errors import BackdoorLabError
from backdoorlab.training import Context
from effect_tools import LOST, Numbers, case, effects, hidden, least, most

QUICK = {"steps": 2, "batch_size": 4, "width": 4}


def test_default_bits_grow_with_the_picture() -> None:
    assert [default_bits(side, side) for side in (4, 16, 28, 32, 64, 128, 224)] == [1, 2, 6, 8, 32, 100, 100]


def test_divergence_is_an_error() -> None:
    attack = attacks.get("ssba", "image").build({**QUICK, "steps": 12, "lr": 1e30})
    with pytest.raises(BackdoorLabError, match="training encoder and decoder diverged"):
        attack.make_trigger(textured_task(), Context())  # type: ignore[attr-defined]


def test_stored_secret_is_read_from_any_batch() -> None:
    task = textured_task()
    trigger = attacks.get("ssba", "image").build({**QUICK, "bits": 5}).make_trigger(task, Context())  # type: ignore[attr-defined]
    stamped = trigger(task.test.inputs)
    assert torch.equal(torch.cat([trigger.read(part) for part in stamped.split(3)]), trigger.read(stamped))
    assert set(trigger.secret.tolist()) <= {0, 1}


@case(
    "attack/image/ssba", asr=least(0.8), acc_lost=LOST, benign_asr=most(0.1), bit_accuracy=least(0.95), psnr=least(26)
)
def effect_of_ssba(seed: int) -> Numbers:
    return hidden(seed, "ssba", poison_rate=0.1, steps=400, image_weight=5.0)


test_effect = effects(__name__)
