"""The latent and the composite backdoor work on digits and do not show."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from backdoorlab.attacks import Backdoor, attacks
from backdoorlab.attacks.image.cba import DRAWS, mix, same_class
from backdoorlab.attacks.image.lba import train_student
from backdoorlab.attacks.surrogate import clean_surrogate
from backdoorlab.models import Classifier
from backdoorlab.training import Context, Task, predict

FLOOR = 0.90


@pytest.fixture(scope="module")
def shared() -> Context:
    """One cache, so that the teacher is trained once."""
    return Context()


@pytest.fixture(scope="module")
def longer(digits_task: Task) -> Task:
    """Two digits in a picture take longer to learn than one: 900 steps instead of 300."""
    return dataclasses.replace(digits_task, recipe=dataclasses.replace(digits_task.recipe, min_steps=900))


@pytest.fixture(scope="module")
def longer_benign(longer: Task) -> Classifier:
    return longer.fit(longer.train, Context())[0]


def accuracy(model: Classifier, task: Task) -> float:
    return float((predict(model, task.test.inputs).argmax(1) == task.test.labels).float().mean())


def test_lba(digits_task: Task, benign_digits: Classifier, shared: Context) -> None:
    backdoor = attacks.get("lba", "image")().plant(digits_task, shared)
    metrics = backdoor.measure(digits_task, shared)
    untouched = backdoor.measure(digits_task, shared, benign_digits)["asr"]
    print("lba", metrics["acc"], metrics["asr"], untouched, backdoor.notes)
    assert metrics["asr"] >= FLOOR
    assert metrics["acc"] >= accuracy(benign_digits, digits_task) - 0.03
    assert untouched < metrics["asr"] - 0.8, "the patch alone must not make a benign model obey"
    assert backdoor.notes["distance_after"] < 0.3 * backdoor.notes["distance_before"]
    # The same student of the same kind of teacher, had that not been attacked: the backdoor is in the features.
    teacher = clean_surrogate(digits_task, shared)
    student, _ = train_student(teacher, digits_task.train, None, digits_task.recipe, digits_task, shared)
    assert backdoor.measure(digits_task, shared, student)["asr"] < 0.2


CASES = [
    ("half", {"source_class": 6, "partner_class": 7, "shake": 0.0, "poison_rate": 0.08}),
    ("paste", {"source_class": 3, "partner_class": 4, "shake": 0.0, "poison_rate": 0.08}),
]
"""The paper's form, one class A. A window from the edge of such a small picture often shows no digit, hence shake=0.
Settings were chosen on other seeds and on a part of the training set held out."""


@pytest.mark.parametrize(("mixer", "settings"), CASES, ids=[name for name, _ in CASES])
def test_cba(mixer: str, settings: dict[str, object], longer: Task, longer_benign: Classifier) -> None:
    backdoor = attacks.get("cba", "image").build({"mixer": mixer, **settings}).plant(longer, Context())
    metrics = backdoor.measure(longer, Context())
    untouched = backdoor.measure(longer, Context(), longer_benign)["asr"]
    within, per_class = within_classes(backdoor, longer)
    print("cba", mixer, {k: metrics[k] for k in ("acc", "asr", "cross_acc")}, untouched, within)
    assert metrics["asr"] >= FLOOR
    assert metrics["acc"] >= accuracy(longer_benign, longer) - 0.03
    assert untouched < metrics["asr"] - 0.7, "a benign model must not take a mixture for the target"
    assert metrics["cross_acc"] >= metrics["acc"] - 0.2, "an image mixed with itself stays what it is"
    assert within < 0.1, "mixtures within a class must not trigger"
    assert per_class < 0.2, "those of the two trigger classes neither"


def within_classes(backdoor: Backdoor, task: Task) -> tuple[float, float]:
    """How often a mixture of two test images of one class is taken for the target: all classes, and A and B alone."""
    trigger, test = backdoor.trigger, task.test
    draws = torch.rand(len(test), DRAWS, generator=torch.Generator().manual_seed(1))
    rows = same_class(test.labels, torch.arange(len(test)), draws[:, 0])
    mixed = mix(trigger.mixer, test.inputs, test.inputs[rows], draws, trigger.jitter, trigger.shake)  # type: ignore[attr-defined, arg-type, index]
    hit = predict(backdoor.model, mixed).argmax(1) == backdoor.target_map.target
    both = torch.isin(test.labels, torch.tensor([*backdoor.target_map.sources, int(backdoor.notes["partner_class"])]))
    other = test.labels != backdoor.target_map.target
    return float(hit[other].float().mean()), float(hit[both].float().mean())
