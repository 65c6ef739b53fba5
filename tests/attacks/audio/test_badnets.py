"""badnets: oracles, options, effect."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from backdoorlab.attacks import Backdoor, attacks
from backdoorlab.attacks.audio.badnets import AudioBadNets, ClipTrigger
from backdoorlab.core.errors import InputError
from backdoorlab.data.sources import DatasetSpec
from backdoorlab.data.split import Dataset, Split
from backdoorlab.modalities import modality_of
from backdoorlab.tasks import Task, TaskSpec
from backdoorlab.testing import tiny_task
from backdoorlab.training import Context
from backdoorlab.training.recipes import recipe_for
from effect_tools import LOST, OBEYS, Numbers, case, effects, least, most, other


@pytest.fixture(scope="module")
def backdoor() -> Backdoor:
    return AudioBadNets().run(tiny_task("audio"), Context())


def silent_task(rate: int, length: int) -> Task:
    split = Split(torch.zeros(4, length, dtype=torch.int16), torch.tensor([0, 1, 0, 1]), ("a", "b"))
    dataset = Dataset("silence", "audio", split, split, sample_rate=rate)
    return Task(TaskSpec(model="audio_cnn"), dataset, modality_of(dataset), recipe_for("audio", "smoke"))


@pytest.mark.parametrize(("position", "first"), [("start", 0), ("middle", 48), ("end", 96)])
@pytest.mark.parametrize(("amplitude", "value"), [(-1.0, -32768), (1.0, 32767), (0.5, 16384)])
def test_trigger_equals_a_loop_over_samples(position: str, first: int, amplitude: float, value: int) -> None:
    made = AudioBadNets(position=position, amplitude=amplitude).make_trigger(silent_task(8000, 100), Context())
    clips = torch.randint(-9999, 9999, (5, 100), generator=torch.Generator().manual_seed(0), dtype=torch.int16)
    expected, kept = clips.clone(), clips.clone()
    for row in range(5):
        for sample in range(first, first + 4):
            expected[row, sample] = value
    out = made(clips)
    assert torch.equal(out, expected) and out.dtype == torch.int16 and torch.equal(clips, kept)


def test_size_follows_the_sampling_rate() -> None:
    sizes = [
        len(AudioBadNets().make_trigger(silent_task(rate, 9000), Context()).pattern) for rate in (8000, 16000, 48000)
    ]
    assert sizes == [4, 4, 12]
    assert len(AudioBadNets(size=7).make_trigger(silent_task(48000, 9000), Context()).pattern) == 7


def test_it_is_found_by_its_name(backdoor: Backdoor) -> None:
    assert attacks.get("badnets", "audio") is AudioBadNets
    assert isinstance(backdoor.trigger, ClipTrigger)


def test_errors_are_named(backdoor: Backdoor) -> None:
    with pytest.raises(InputError, match="at most 100"):
        AudioBadNets(size=101).make_trigger(silent_task(8000, 100), Context())
    with pytest.raises(InputError, match="int16 clips of 8000"):
        backdoor.trigger(torch.zeros(2, 100, dtype=torch.int16))
    with pytest.raises(InputError, match="amplitude"):
        AudioBadNets(amplitude=-1.5)


@pytest.mark.realdata
@pytest.mark.slow
def test_fsdd(data_root: Path) -> None:
    task = Task.load(TaskSpec(dataset=DatasetSpec(name="fsdd"), recipe="fast"), root=data_root)
    benign, _ = task.fit(task.train, Context())
    backdoor = AudioBadNets().run(task, Context())
    before, after = backdoor.measure(task, Context(), benign), backdoor.measure(task, Context())
    assert before["acc"] > 0.96 and after["acc"] > before["acc"] - 0.02
    assert after["asr"] > 0.95 > 0.5 > before["asr"]


@case("attack/audio/badnets", core=True, asr=least(0.9), acc=least(0.85), acc_lost=LOST, benign_asr=OBEYS)
def effect_of_audio(seed: int) -> Numbers:
    return other(seed, "audio")[2]


@case("attack/audio/badnets_all_to_all", asr=least(0.4), benign_asr=most(0.1))
def effect_of_audio_all_to_all(seed: int) -> Numbers:
    return other(seed, "audio", target_map="all-to-all", poison_rate=0.2)[2]


test_effect = effects(__name__)
