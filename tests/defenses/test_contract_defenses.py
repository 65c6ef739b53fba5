"""What every registered defense promises, on the smallest task of every modality that it declares."""

from __future__ import annotations

import copy
import dataclasses
import math
from functools import cache

import numpy as np
import pytest
import torch

from backdoorlab.core.errors import InputError, NotApplicable
from backdoorlab.data import DatasetSpec, Split
from backdoorlab.defenses import (
    DefenderView,
    Defense,
    InputDefense,
    InputDetector,
    Repair,
    RepairDefense,
    Screening,
    defenses,
)
from backdoorlab.models import Classifier
from backdoorlab.tasks import Task, TaskSpec
from backdoorlab.training import Context, predict

SETS = {"image": "digits", "text": "templated_text", "audio": "tone_words", "video": "moving_digits"}
CHEAP = {"epochs": 1, "iterations": 3, "overlays": 4, "ascent_steps": 1, "isolation": 0.05, "min_steps": 2}
"""Hyper-parameters that suit 80 samples; the contract does not depend on how long a method works."""

CASES = [(cls, modality) for cls in defenses for modality in cls.modalities if modality in SETS]
IDS = [f"{cls.name}-{modality}" for cls, modality in CASES]
every_defense = pytest.mark.parametrize(("cls", "modality"), CASES, ids=IDS)


@cache
def tiny_task(modality: str) -> Task:
    spec = DatasetSpec(name=SETS[modality], train_size=80, test_size=20)
    return Task.load(TaskSpec(dataset=spec, recipe="smoke", recipe_changes=(("min_steps", 2), ("epochs", 1))))


@cache
def tiny_model(modality: str) -> Classifier:
    model, _ = tiny_task(modality).fit(tiny_task(modality).train, Context(seed=1))
    return model


def build(cls: type[Defense]) -> Defense:
    fields = {f.name for f in dataclasses.fields(cls)}
    return cls.build({k: v for k, v in CHEAP.items() if k in fields})


def run(cls: type[Defense], modality: str, model: Classifier, data: Split) -> object:
    """One life of a defense on the tiny task; NotApplicable must give a reason."""
    task = tiny_task(modality)
    view = DefenderView(model=model, clean=data, suspicious=data, blueprint=task.blueprint)
    try:
        outcome = build(cls).apply(view, Context(seed=2))
    except NotApplicable as reason:
        assert len(str(reason)) > 20, "a defense that cannot apply says why"
        pytest.skip(str(reason))
    match outcome:
        case Screening():
            return outcome.scores, outcome.flags
        case Repair():
            return outcome.model
        case InputDetector():
            return outcome.score(task.test.inputs), outcome.threshold
    return outcome


def same_inputs(a: object, b: object) -> bool:
    return bool(np.array_equal(a, b)) if isinstance(a, np.ndarray) else torch.equal(a, b)  # type: ignore[arg-type]


@every_defense
def test_results_have_the_promised_form_and_nothing_else_changes(cls: type[Defense], modality: str) -> None:
    task, model = tiny_task(modality), tiny_model(modality)
    data, weights = task.train, copy.deepcopy(model.state_dict())
    inputs, labels = copy.deepcopy(data.inputs), data.labels.clone()
    result = run(cls, modality, model, data)
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items()), "the given model was changed"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), "hooks were left behind"
    assert all(p.requires_grad for p in model.parameters()), "parameters were left frozen"
    assert same_inputs(inputs, data.inputs) and torch.equal(labels, data.labels), "the given data were changed"
    match cls.stage:
        case "dataset":
            scores, flags = result
            assert (scores.dtype, scores.shape, scores.device.type) == (torch.float32, (len(data),), "cpu")
            assert (flags.dtype, flags.shape) == (torch.bool, (len(data),))
            assert bool(torch.isfinite(scores).all())
        case "training":
            assert isinstance(result.model, Classifier) and not result.model.training
            assert result.scores is None or result.scores.shape == (len(data),)
            assert result.isolated is None or result.isolated.dtype == torch.bool
        case "repair":
            assert isinstance(result, Classifier) and result is not model and not result.training
            assert bool(torch.isfinite(predict(result, task.test.inputs)).all())
        case "input":
            scores, threshold = result
            assert (scores.dtype, scores.shape, scores.device.type) == (torch.float32, (len(task.test),), "cpu")
            assert math.isfinite(threshold)
        case "model":
            assert math.isfinite(result.score) and isinstance(result.backdoored, bool)
            assert all(0 <= t < task.num_classes for t in result.targets)
            assert result.backdoored == bool(result.targets)
            assert len(result.per_class) in (0, task.num_classes)


@every_defense
def test_same_seed_same_result(cls: type[Defense], modality: str) -> None:
    def fingerprint() -> list[torch.Tensor]:
        result = run(cls, modality, tiny_model(modality), tiny_task(modality).train)
        match cls.stage:
            case "dataset":
                return list(result)
            case "training":
                return [p.detach() for p in result.model.parameters()]
            case "repair":
                return [p.detach() for p in result.parameters()]
            case "input":
                return [result[0], torch.tensor(result[1])]
            case _:
                return [torch.tensor([result.score, *result.per_class])]

    first, second = fingerprint(), fingerprint()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("cls", list(defenses), ids=lambda c: c.name)
def test_facts_are_stated_and_parameters_documented(cls: type[Defense]) -> None:
    facts = cls.facts()
    assert facts["stage"] in ("dataset", "training", "repair", "input", "model")
    assert 2000 < facts["year"] <= 2030
    assert len(facts["paper"]) > 10
    assert 0 <= facts["needs_clean_fraction"] <= 1
    for parameter in cls.parameters():
        assert parameter.help, f"{cls.name}.{parameter.name} has no help text"
    assert cls.build(cls().settings()) == cls()


@pytest.mark.parametrize("cls", list(defenses), ids=lambda c: c.name)
def test_numbers_that_make_no_sense_are_refused(cls: type[Defense]) -> None:
    numeric = [f for f in cls.parameters() if f.type.split(" ")[0] in ("int", "float")]
    for parameter in numeric:
        with pytest.raises(InputError, match=parameter.name):
            cls.build({parameter.name: float("nan")})
    with pytest.raises(InputError, match="no hyper-parameter 'no_such'"):
        cls.build({"no_such": 1})


@pytest.mark.parametrize(
    "cls",
    [c for c in defenses if issubclass(c, (RepairDefense, InputDefense)) and c.needs_clean_fraction],
    ids=lambda c: c.name,
)
def test_without_the_clean_samples_that_it_needs_it_says_so(cls: type[Defense]) -> None:
    modality = cls.modalities[0]
    nothing = tiny_task(modality).train[torch.arange(0)]
    with pytest.raises((InputError, NotApplicable), match=r"empty|clean|sample"):
        run(cls, modality, tiny_model(modality), nothing)
