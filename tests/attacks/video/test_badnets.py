"""badnets: oracles, options, effect."""

from __future__ import annotations

import pytest
import torch

from backdoorlab.attacks import Backdoor, attacks
from backdoorlab.attacks.video.badnets import VideoBadNets, VideoPatchTrigger
from backdoorlab.core.errors import InputError
from backdoorlab.data.split import Dataset, Split
from backdoorlab.modalities import modality_of
from backdoorlab.tasks import Task, TaskSpec
from backdoorlab.testing import tiny_task
from backdoorlab.training import Context
from backdoorlab.training.recipes import recipe_for
from effect_tools import LOST, OBEYS, Numbers, case, effects, least, most, other


@pytest.fixture(scope="module")
def backdoor() -> Backdoor:
    return VideoBadNets().run(tiny_task("video"), Context())


def black_task(height: int, width: int, channels: int = 3) -> Task:
    split = Split(torch.zeros(4, 5, channels, height, width, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]), ("a", "b"))
    dataset = Dataset("black", "video", split, split)
    return Task(TaskSpec(model="cnn3d_small"), dataset, modality_of(dataset), recipe_for("video", "smoke"))


@pytest.mark.parametrize("position", ["bottom-right", "bottom-left", "top-right", "top-left"])
@pytest.mark.parametrize("pattern", ["solid", "checker"])
def test_trigger_equals_a_loop_over_frames(position: str, pattern: str) -> None:
    attack = VideoBadNets(size=3, offset=1, position=position, pattern=pattern, color=200)
    trigger = attack.make_trigger(black_task(16, 20), Context())
    clips = torch.randint(0, 256, (3, 5, 3, 16, 20), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected, kept = clips.clone(), clips.clone()
    for n in range(3):
        for t in range(5):
            for i in range(3):
                for j in range(3):
                    y = 1 + i if "top" in position else 16 - 4 + i
                    x = 1 + j if "left" in position else 20 - 4 + j
                    expected[n, t, :, y, x] = 0 if pattern == "checker" and (i + j) % 2 else 200
    out = trigger(clips)
    assert torch.equal(out, expected) and out.dtype == torch.uint8 and torch.equal(clips, kept)


@pytest.mark.parametrize(("height", "side"), [(16, 3), (32, 3), (64, 6)])
def test_side_follows_the_height(height: int, side: int) -> None:
    trigger = VideoBadNets().make_trigger(black_task(height, height, 1), Context())
    assert int(trigger.mask.sum()) == side**2


def test_random_pattern_depends_on_the_seed_alone() -> None:
    one, two, other = (
        VideoBadNets(size=4, pattern="random").make_trigger(black_task(16, 16), Context(seed=s)).pattern
        for s in (1, 1, 2)
    )
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_it_is_found_by_its_name(backdoor: Backdoor) -> None:
    assert attacks.get("badnets", "video") is VideoBadNets
    assert isinstance(backdoor.trigger, VideoPatchTrigger)


def test_errors_are_named(backdoor: Backdoor) -> None:
    with pytest.raises(InputError, match="does not fit"):
        VideoBadNets(size=15, offset=3).make_trigger(black_task(16, 20), Context())
    with pytest.raises(InputError, match="uint8 clips of shape"):
        backdoor.trigger(torch.zeros(2, 8, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(InputError, match="uint8 clips of shape"):
        backdoor.trigger(torch.zeros(2, 8, 1, 16, 16))


@case("attack/video/badnets", core=True, asr=least(0.9), acc=least(0.75), acc_lost=LOST, benign_asr=OBEYS)
def effect_of_video(seed: int) -> Numbers:
    return other(seed, "video")[2]


@case("attack/video/badnets_all_to_all", asr=least(0.4), benign_asr=most(0.25))
def effect_of_video_all_to_all(seed: int) -> Numbers:
    return other(seed, "video", target_map="all-to-all", poison_rate=0.2)[2]


test_effect = effects(__name__)
