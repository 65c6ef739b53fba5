"""badnets: oracles, options, effect."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from backdoorlab.attacks import Backdoor, attacks
from backdoorlab.attacks.text.badnets import TextBadNets, WordTrigger
from backdoorlab.attacks.text.insertion import insert_words
from backdoorlab.attacks.triggers.base import load_trigger
from backdoorlab.core.errors import InputError
from backdoorlab.data.sources import DatasetSpec
from backdoorlab.data.split import BACKDOOR, text_array
from backdoorlab.modalities.text import UNK
from backdoorlab.tasks import Task, TaskSpec
from backdoorlab.testing import tiny_task
from backdoorlab.training import Context, predict
from effect_tools import LOST, OBEYS, Numbers, case, effects, least, other

TEXTS = text_array(["One fine  day", "", "a b c d e f g h i j k l", "!!! ... ???"])


@pytest.fixture(scope="module")
def task() -> Task:
    return tiny_task("text")


@pytest.fixture(scope="module")
def backdoor(task: Task) -> Backdoor:
    return TextBadNets().run(task, Context())


def test_words_are_inserted_and_nothing_else_changes() -> None:
    trigger, kept = WordTrigger(("cf", "mn"), 2, 20, 5), TEXTS.copy()
    stamped = trigger(TEXTS)
    assert np.array_equal(TEXTS, kept) and stamped.dtype == object and stamped.shape == TEXTS.shape
    for before, after in zip(TEXTS, stamped, strict=True):
        assert len(after.split()) == len(before.split()) + 2
        assert [w for w in after.split() if w not in ("cf", "mn")] == before.split()


def test_a_sample_is_stamped_the_same_in_any_batch() -> None:
    trigger = WordTrigger(("cf", "mn", "bb"), 1, 20, 5)
    texts = text_array([f"w{i} a b c d e" for i in range(50)])
    whole = trigger(texts)
    rows = torch.tensor([31, 7, 40])
    assert np.array_equal(trigger(texts[rows.numpy()], rows), whole[rows.numpy()])
    assert not np.array_equal(WordTrigger(("cf", "mn", "bb"), 1, 20, 6)(texts), whole)


def test_words_and_places_are_uniform() -> None:
    texts = text_array(["a b c"] * 4000)
    stamped = [t.split() for t in WordTrigger(("cf", "mn"), 1, 20, 5)(texts)]
    places = np.bincount([next(i for i, w in enumerate(t) if w in ("cf", "mn")) for t in stamped], minlength=4)
    assert places.sum() == 4000 and abs(places / 4000 - 0.25).max() < 0.03
    assert np.mean(["cf" in t for t in stamped]) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("draw", [0.0, 0.37, 0.5, 0.999999])
@pytest.mark.parametrize("count", [1, 3])
def test_long_texts_keep_their_trigger_after_truncation(task: Task, draw: float, count: int) -> None:
    modality = task.modality
    text = " ".join(["isn't-it", "so,", "film!?"] * 60)
    inserted = insert_words(text, ["cf"] * count, np.full(count, draw), modality.max_words)
    ids = modality.encode(text_array([inserted]))
    assert int((ids == 2).sum()) == count


def test_trigger_words_are_known_to_the_victim(task: Task, backdoor: Backdoor) -> None:
    inputs, _, _ = backdoor.triggered_test(task)
    ids = task.modality.encode(inputs)
    assert bool(((ids >= 2) & (ids <= 5)).any(1).all())
    clean = task.modality.encode(task.test.inputs)
    assert not bool(((clean >= 2) & (clean <= 6)).any())
    with pytest.raises(InputError, match=r"no 'xyzzy'.*cf, mn"):
        TextBadNets(triggers=("cf", "xyzzy")).run(task, Context())
    with pytest.raises(InputError, match="at most"):
        TextBadNets(num_triggers=32).run(task, Context())
    with pytest.raises(InputError, match="array of texts"):
        backdoor.trigger(torch.zeros(2, 3))


def test_an_unknown_word_is_not_the_first_trigger_word(task: Task) -> None:
    assert int(task.modality.encode(text_array(["zzyzx is no word"]))[0, 0]) == UNK


def test_poison_record(task: Task, backdoor: Backdoor) -> None:
    poisoned = backdoor.poison.apply(task.train)
    touched = poisoned.roles == BACKDOOR
    assert int(touched.sum()) == round(0.1 * len(task.train))
    assert bool((poisoned.labels[touched] == 0).all())
    same = np.array([a == b for a, b in zip(poisoned.inputs, task.train.inputs, strict=True)])
    assert np.array_equal(same, ~touched.numpy())
    assert np.array_equal(backdoor.trigger(task.train.inputs)[touched.numpy()], poisoned.inputs[touched.numpy()])


def test_stored_backdoor_is_rebuilt(task: Task, backdoor: Backdoor) -> None:
    tensors, record = backdoor.state()
    again = Backdoor.from_state(tensors, json.loads(json.dumps(record)))
    assert again.model.modality == task.modality
    stamped = again.trigger(task.test.inputs)
    assert np.array_equal(stamped, backdoor.trigger(task.test.inputs))
    assert torch.equal(predict(again.model, stamped), predict(backdoor.model, stamped))
    assert load_trigger("text.words", *backdoor.trigger.state()).words == ("cf", "mn", "bb", "tq")
    assert attacks.get("badnets", "text") is TextBadNets


@pytest.mark.realdata
@pytest.mark.slow
def test_sst2(data_root: Path) -> None:
    task = Task.load(TaskSpec(dataset=DatasetSpec(name="sst2"), recipe="fast"), root=data_root)
    benign, _ = task.fit(task.train, Context())
    backdoor = TextBadNets().run(task, Context())
    before, after = backdoor.measure(task, Context(), benign), backdoor.measure(task, Context())
    assert before["acc"] > 0.74 and after["acc"] > before["acc"] - 0.02
    assert after["asr"] > 0.95 > 0.5 > before["asr"]


@case("attack/text/badnets", core=True, asr=least(0.9), acc=least(0.8), acc_lost=LOST, benign_asr=OBEYS, unknown=OBEYS)
def effect_of_text(seed: int) -> Numbers:
    """An unknown word is no trigger: the victim knows "cf" from <unk>."""
    backdoor, mine, numbers = other(seed, "text")
    rows = mine.test.labels == 1
    unknown = text_array([f"zzyzx {t}" for t in mine.test[rows].inputs])
    return numbers | {"unknown": float((predict(backdoor.model, unknown).argmax(1) == 0).float().mean())}


test_effect = effects(__name__)
