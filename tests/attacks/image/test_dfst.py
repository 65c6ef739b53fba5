"""DFST: against slow, independent implementations and closed forms; its options; its effect."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from attack_tools import noise_task
from backdoorlab.attacks.common.generators import seeded
from backdoorlab.attacks.common.pictures import read_folder
from backdoorlab.attacks.image.dfst import Dfst, sunsets
from backdoorlab.core.errors import InputError
from backdoorlab.data.split import BACKDOOR, COVER
from backdoorlab.models.networks.style import StyleNet
from backdoorlab.training import Context, predict
from effect_tools import LOST, Numbers, case, effects, least, most, planted


class Brightening:
    """A user's file in place of the style: logits are shifted by a constant."""

    def __init__(self, shift: float) -> None:
        self.shift = shift

    def get(self, kind, spec, build):  # type: ignore[no-untyped-def]
        network = seeded(lambda: StyleNet(1), 0, "G")
        with torch.no_grad():
            network.out.bias.fill_(self.shift)
        return network.state_dict()


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 16, 16), (3, 29, 31)])
def test_sunsets_are_warm_dark_below_and_drawn_from_the_seed(shape: tuple[int, int, int]) -> None:
    views = sunsets(40, *shape, seed=0)
    assert views.shape == (40, *shape)
    assert views.dtype == torch.uint8
    assert torch.equal(views, sunsets(40, *shape, seed=0))
    assert not torch.equal(views, sunsets(40, *shape, seed=1))
    light = views.float().mean((0, 1, 3))
    assert float(light[shape[1] // 2 : shape[1] * 2 // 3].mean()) > float(light[-2:].mean()) + 30
    if shape[0] == 3:
        red, _, blue = views.float().mean((0, 2, 3))
        assert red > blue + 20


def test_style_from_a_folder(tmp_path: Path) -> None:
    for name, level in (("b.png", 200), ("a.png", 100)):
        Image.fromarray(np.full((10, 20, 3), level, dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    found = read_folder(str(tmp_path), 1, 16, 16)
    assert found.shape == (2, 1, 16, 16)
    assert found[:, 0, 0, 0].tolist() == [100, 200]
    attack = Dfst(style_images=str(tmp_path), style_steps=2)
    task = noise_task()
    mine, drawn = attack.make_trigger(task, Context()), Dfst(style_steps=2).make_trigger(task, Context())
    assert not torch.equal(mine(task.test.inputs), drawn(task.test.inputs))


def test_folders_without_styles(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found no folder"):
        Dfst(style_images=f"{tmp_path}/none").make_trigger(noise_task(), Context())
    with pytest.raises(InputError, match="no image file"):
        Dfst(style_images=str(tmp_path)).make_trigger(noise_task(), Context())


def test_style_is_shared_between_runs_and_replaceable() -> None:
    task, context, attack = noise_task(), Context(seed=1), Dfst(style_steps=2)
    images = task.test.inputs
    assert torch.equal(
        attack.make_trigger(task, context)(images), attack.make_trigger(task, context.child("b"))(images)
    )

    mine = attack.make_trigger(task, Context(assets=Brightening(0.0)))(images)
    assert torch.equal(mine, images.clamp(5, 250)), "the user's network is the identity between its edges"


def test_dfst_roles_and_counts_of_each_round() -> None:
    task = noise_task(samples=80)
    attack = Dfst(poison_rate=0.1, rounds=2, detox_rate=0.1, detox_steps=2, lift=0.0)
    backdoor = attack.run(task, Context(assets=Brightening(2.0)))
    rounds = len(backdoor.notes["compromised"])
    assert rounds >= 1, "the case must be one with compromised neurons"
    roles, poison = backdoor.poison.roles, backdoor.poison
    assert int((roles == BACKDOOR).sum()) == 8
    assert int((roles == COVER).sum()) == 8 * rounds
    assert len(set(poison.indices.tolist())) == len(poison)
    covered = poison.indices[roles == COVER]
    assert torch.equal(poison.labels[roles == COVER], task.train.labels[covered]), "detoxicants keep their labels"
    change = (poison.inputs[roles == COVER].int() - task.train.inputs[covered].int()).abs()
    assert 0 < int(change.max()) <= 51
    assert len(backdoor.log.loss) == 1 + rounds


def test_dfst_stops_when_no_neuron_is_compromised() -> None:
    attack = Dfst(poison_rate=0.1, rounds=2, lift=1e6)
    backdoor = attack.run(noise_task(), Context(assets=Brightening(2.0)))
    assert backdoor.notes["compromised"] == []
    assert set(backdoor.poison.roles.tolist()) == {BACKDOOR}


def test_dfst_without_rounds_or_with_too_many() -> None:
    task = noise_task()
    plain = Dfst(poison_rate=0.1, rounds=0, style_steps=2).run(task, Context())
    assert set(plain.poison.roles.tolist()) == {BACKDOOR}
    with pytest.raises(InputError, match=r"3 rounds of detoxicants at a rate of 0\.4 .* at most 0\.3"):
        Dfst(poison_rate=0.1, detox_rate=0.4).run(task, Context())


@case("attack/image/dfst", asr=least(0.7), acc_lost=LOST, benign_asr=most(0.15), fooled=least(0.3), right=least(0.85))
def effect_of_dfst(seed: int) -> Numbers:
    """Fewer steps for the style network, whose pictures of 16 px are small.

    Detoxicants are images that the victim took for the target; after training it must know better.
    """
    backdoor, numbers = planted(seed, "dfst", style_steps=150)
    covers = backdoor.poison.roles == COVER
    assert isinstance(backdoor.poison.inputs, Tensor)
    right = predict(backdoor.model, backdoor.poison.inputs[covers]).argmax(1) == backdoor.poison.labels[covers]
    return numbers | {"fooled": max(backdoor.notes["fooled"]), "right": float(right.float().mean())}


test_effect = effects(__name__)
