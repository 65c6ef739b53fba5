"""What every registered defense promises, on every modality that it declares."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch

from backdoorlab.core.errors import InputError, NotApplicable
from backdoorlab.data.split import Split
from backdoorlab.defenses import DefenderView, Defense, defenses
from backdoorlab.models import Classifier
from backdoorlab.tasks import Task
from backdoorlab.testing import check_defense, check_outcome, tiny_task
from backdoorlab.training import Context
from contract_tools import noise, pairs, task_of, tiny_model
from quick import quick

every_defense = pytest.mark.parametrize(("cls", "modality"), pairs(defenses))


@cache
def pictures(shape: tuple[int, int, int]) -> tuple[Task, Classifier]:
    """80 random pictures of four classes, and a model that was trained on them."""
    task = task_of("image", noise(shape, 80, 1), torch.arange(80) % 4, 4)
    return task, task.fit(task.train, Context(1))[0]


def applied(cls: type[Defense], task: Task, model: Classifier, clean: Split) -> None:
    """One run, whose outcome has the promised form."""
    method = quick(cls)
    view = DefenderView(model=model, clean=clean, suspicious=task.train, blueprint=task.blueprint)
    check_outcome(method, method.apply(view, Context(2)), task, model)


def few(split: Split, count: int = 30) -> Split:
    """The defender's clean samples."""
    return split[torch.arange(count)]


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert len(text) > 20
    assert "\n" not in text
    return text


@every_defense
def test_contract(cls: type[Defense], modality: str) -> None:
    task = tiny_task(modality)
    if check_defense(quick(cls), task, model=tiny_model(modality), clean=few(task.train)) is None:
        pytest.skip("not applicable to the smallest network, with a reason")


@pytest.mark.parametrize("shape", [(3, 29, 31), (1, 31, 29)], ids=str)
@pytest.mark.parametrize("cls", [cls for cls in defenses if "image" in cls.modalities], ids=lambda cls: cls.name)
def test_pictures_of_any_size(cls: type[Defense], shape: tuple[int, int, int]) -> None:
    task, model = pictures(shape)
    try:
        applied(cls, task, model, few(task.train))
    except NotApplicable as reason:
        pytest.skip(str(reason))


@every_defense
def test_a_class_without_clean_samples(cls: type[Defense], modality: str) -> None:
    """A right result, or an error of one line that says what is missing."""
    if "clean" not in cls.reads:
        pytest.skip("reads no clean samples")
    task = tiny_task(modality)
    clean = few(task.train)
    try:
        applied(cls, task, tiny_model(modality), clean[clean.labels != 1])
    except NotApplicable as reason:
        pytest.skip(str(reason))
    except InputError as error:
        assert "\n" not in str(error)
        assert "class" in str(error) or "sample" in str(error)


@every_defense
def test_without_the_clean_samples_that_it_needs_it_says_so(cls: type[Defense], modality: str) -> None:
    if not cls.needs_clean_fraction:
        pytest.skip("needs no clean samples")
    task = tiny_task(modality)
    with pytest.raises((InputError, NotApplicable), match=r"empty|clean|sample") as error:
        applied(cls, task, tiny_model(modality), task.train[torch.arange(0)])
    one_line(error)


@every_defense
def test_a_model_that_diverged_is_refused(cls: type[Defense], modality: str) -> None:
    if "model" not in cls.reads:
        pytest.skip("reads no model")
    task = tiny_task(modality)
    for value in (float("nan"), float("inf")):
        model = copy.deepcopy(tiny_model(modality))
        with torch.no_grad():
            next(model.parameters()).flatten()[0] = value
        with pytest.raises(InputError, match=f"^{cls.name} needs a model whose weights are finite numbers") as error:
            applied(cls, task, model, few(task.train))
        one_line(error)
