"""Contract checks that authors of methods call from their own tests: :func:`check_attack`, :func:`check_defense`,
:func:`check_trigger`.

Each raises an ``AssertionError`` that says which requirement is not met. They take seconds: a tiny task of the method's
modality is made here unless one is given.

    from backdoorlab.testing import check_attack

    def test_my_attack():
        check_attack(MyAttack(width=2))
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from functools import cache
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from backdoorlab.attacks.poisoning import PoisoningAttack
from backdoorlab.attacks.result import Backdoor
from backdoorlab.attacks.selection import ClassificationAttack
from backdoorlab.attacks.triggers.base import Trigger, load_trigger, stamp_all
from backdoorlab.core.errors import InputError, NotApplicable
from backdoorlab.core.method import Method
from backdoorlab.data.sources import DatasetSpec
from backdoorlab.data.split import BACKDOOR, COVER, Inputs, Poison, Split, take
from backdoorlab.defenses.base import Defense, InputDetector, Outcome, Repair, ScanReport, Screening, TrainingReport
from backdoorlab.defenses.view import DefenderView
from backdoorlab.models.classifier import Classifier
from backdoorlab.models.persistence import restore_model
from backdoorlab.tasks import Task, TaskSpec
from backdoorlab.training.context import Context
from backdoorlab.training.evaluate import predict

SETS = {"image": "digits", "text": "templated_text", "audio": "tone_words", "video": "moving_digits"}
"""Embedded data set of each modality."""


@cache
def tiny_task(modality: str = "image") -> Task:
    """80 training and 20 test samples, one epoch of a small network; the same object for every caller."""
    if modality not in SETS:
        raise InputError(f"there is no tiny task for {modality}; give one: choose from {', '.join(SETS)} or pass task=")
    spec = DatasetSpec(name=SETS[modality], train_size=80, test_size=20)
    return Task.load(TaskSpec(dataset=spec, recipe="smoke", recipe_changes=(("epochs", 1), ("min_steps", 2))))


def check_method(method: Method) -> None:
    """Facts and hyper-parameters of any method: stated, documented, checked, and equal after a round trip through JSON.

    Raises:
        AssertionError: naming the requirement that is not met.
    """
    cls = type(method)
    facts = cls.facts()
    assert 1990 < facts["year"] <= 2100, f"{cls.name}: year {facts['year']} is no year"
    assert len(facts["paper"]) > 10, f"{cls.name}: `paper` should name the source"
    json.dumps(facts)
    for parameter in cls.parameters():
        assert parameter.help, f"{cls.name}.{parameter.name} has no help text"
    for field in dataclasses.fields(cls):
        for value in _out_of_range(field):
            _refuses(cls, {field.name: value}, f"{cls.name}: {field.name} must be")
    _refuses(cls, {"no_such_name": 1}, "no hyper-parameter 'no_such_name'")
    assert cls.build(cls().settings()) == cls(), f"{cls.name}: the default settings do not give the default method"
    again = cls.build(json.loads(json.dumps(method.settings())))
    assert again == method, f"{cls.name}: settings() do not give an equal method back"


def check_trigger(trigger: Trigger, samples: Inputs, *, covers_all: bool = True) -> None:
    """A trigger is a pure function of each sample, keeps its form, and survives storage.

    Args:
        trigger: what is checked.
        samples: raw samples that it fits, at least 4.
        covers_all: every sample must come back changed.

    Raises:
        AssertionError: naming the requirement that is not met.
    """
    before, rows = copy.deepcopy(samples), torch.arange(len(samples))
    stamped = trigger(samples, rows)
    assert _equal(samples, before), f"{trigger.kind}: the trigger changed its input"
    assert stamped.dtype == samples.dtype, f"{trigger.kind}: dtype {samples.dtype} became {stamped.dtype}"
    assert stamped.shape == samples.shape, f"{trigger.kind}: {tuple(samples.shape)} became {tuple(stamped.shape)}"
    assert _equal(trigger(samples, rows), stamped), f"{trigger.kind}: two calls differ"
    assert _equal(trigger(samples), stamped), f"{trigger.kind}: no indices must mean counting from 0"
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    assert _equal(trigger(take(samples, order), rows[order]), take(stamped, order)), (
        f"{trigger.kind}: what becomes of a sample depends on the others in its batch"
    )
    assert _equal(stamp_all(trigger, samples, batch_size=3), stamped), f"{trigger.kind}: batches of 3 differ"
    if covers_all:
        for row in range(len(rows)):
            one = torch.tensor([row])
            assert not _equal(take(stamped, one), take(samples, one)), f"{trigger.kind}: sample {row} is not changed"
    tensors, config = trigger.state()
    stored = load_tensors(save_tensors(tensors)) if tensors else {}
    again = load_trigger(trigger.kind, stored, json.loads(json.dumps(config)))
    assert _equal(again(samples), stamped), f"{trigger.kind}: comes back from the store as another trigger"


def check_poison(attack: ClassificationAttack, task: Task, poison: Poison, *, count: int | None = None) -> None:
    """Rate, roles and labels of a poisoned set are exact, and nothing else changed.

    Args:
        attack: that made it.
        task: whose training set was poisoned.
        poison: what is checked.
        count: poisoned samples, where the rate does not say how many (``cap_rate``).

    Raises:
        AssertionError: naming the requirement that is not met.
    """
    backdoor, cover = poison.roles == BACKDOOR, poison.roles == COVER
    expected = round(attack.rate_on(task) * len(task.train)) if count is None else count
    assert int(backdoor.sum()) == expected, (
        f"{attack.name}: {int(backdoor.sum())} poisoned samples instead of {expected}"
    )
    assert bool((backdoor | cover).all()), f"{attack.name}: a touched sample is neither backdoor nor cover"
    assert len(set(poison.indices.tolist())) == len(poison) == len(poison.inputs), f"{attack.name}: a row occurs twice"
    assert poison.inputs.dtype == task.train.inputs.dtype, f"{attack.name}: samples of dtype {poison.inputs.dtype}"
    true = task.train.labels[poison.indices]
    assert torch.equal(poison.labels[cover], true[cover]), f"{attack.name}: a cover sample lost its true label"
    if attack.label_mode == "clean":
        assert bool((true[backdoor] == attack.target).all()), f"{attack.name}: clean label, yet outside of the target"
        assert torch.equal(poison.labels, true), f"{attack.name}: clean label, yet labels changed"
    else:
        mapped = attack.target_map_for(task)(true[backdoor])
        assert torch.equal(poison.labels[backdoor], mapped), f"{attack.name}: labels are not those of the target map"
    applied = poison.apply(task.train)
    same = (applied.roles == 0).nonzero().flatten()
    assert len(same) == len(task.train) - len(poison), f"{attack.name}: {len(poison)} rows, others have a role"
    assert _equal(take(applied.inputs, same), take(task.train.inputs, same)), f"{attack.name}: a clean row changed"
    assert torch.equal(applied.labels[same], task.train.labels[same]), f"{attack.name}: a clean label changed"


def check_attack(attack: ClassificationAttack, task: Task | None = None, *, seed: int = 0) -> Backdoor:
    """All requirements on an attack on classifiers.

    Args:
        attack: what is checked, with settings that suit a small task.
        task: None makes a tiny one of the attack's first modality.
        seed: of the run.

    Returns:
        The backdoor, for further checks.

    Raises:
        AssertionError: naming the requirement that is not met.
    """
    check_method(attack)
    task = task or tiny_task(attack.modalities[0])
    inputs, labels = copy.deepcopy(task.train.inputs), task.train.labels.clone()
    backdoor = attack.run(task, Context(seed))
    assert isinstance(backdoor, Backdoor), f"{attack.name}: run() must return a Backdoor"
    assert _equal(inputs, task.train.inputs), f"{attack.name}: the clean training inputs were changed"
    assert torch.equal(labels, task.train.labels), f"{attack.name}: the clean labels were changed"
    assert not backdoor.model.training, f"{attack.name}: the victim must be in evaluation mode"
    check_poison(attack, task, backdoor.poison)
    assert backdoor.poison.replay == (attack.threat_model == "training"), f"{attack.name}: replay flag"
    check_trigger(backdoor.trigger, task.test.inputs[:12])
    if backdoor.cross_trigger is not None:
        check_trigger(backdoor.cross_trigger, task.test.inputs[:12], covers_all=False)
    again = attack.run(task, Context(seed))
    assert isinstance(again, Backdoor)
    assert _equal(again.trigger(task.test.inputs), backdoor.trigger(task.test.inputs)), (
        f"{attack.name}: the same seed gives another trigger"
    )
    assert _equal(again.poison.inputs, backdoor.poison.inputs), f"{attack.name}: the same seed poisons differently"
    for name, weight in backdoor.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), f"{attack.name}: the same seed, another {name}"
    if isinstance(attack, PoisoningAttack):
        other = attack.poison(backdoor.trigger, task, Context(seed + 1))
        assert not torch.equal(other.indices, backdoor.poison.indices), f"{attack.name}: the seed chooses nothing"
    restored = Backdoor.from_state(*backdoor.stored())
    stamped = backdoor.triggered_test(task)[0]
    assert _equal(restored.triggered_test(task)[0], stamped), f"{attack.name}: other triggered samples after storage"
    assert torch.equal(predict(restored.model, stamped), predict(backdoor.model, stamped)), (
        f"{attack.name}: the victim is another one after storage"
    )
    measured = backdoor.measure(task, Context(seed))
    assert measured["asr"] is None or measured["asr"] + measured["ra"] <= 1, f"{attack.name}: ASR + RA exceed 1"
    assert restored.measure(task, Context(seed)) == measured, f"{attack.name}: measured otherwise after storage"
    _refuses_run(type(attack).build({**attack.settings(), "target": 10**6}), task)
    return backdoor


def check_defense(
    defense: Defense,
    task: Task | None = None,
    *,
    model: Classifier | None = None,
    clean: Split | None = None,
    seed: int = 0,
) -> Outcome | None:
    """All requirements on a defense of any stage.

    Args:
        defense: what is checked, with settings that suit 80 samples.
        task: None makes a tiny one of the defense's first modality; its training set is the suspicious one.
        model: the suspicious model; None trains one on the task.
        clean: the defender's samples; None takes the training set.
        seed: of the run.

    Returns:
        The outcome, for further checks; None if the method does not apply to the task's model (with a reason).

    Raises:
        AssertionError: naming the requirement that is not met.
    """
    name = defense.name
    check_method(defense)
    assert defense.stage in ("dataset", "training", "repair", "input", "model"), f"{name}: no stage {defense.stage!r}"
    assert 0 <= defense.needs_clean_fraction <= 1, f"{name}: needs_clean_fraction {defense.needs_clean_fraction}"
    assert ("clean" in defense.reads) == (defense.needs_clean_fraction > 0), f"{name}: reads and clean fraction"
    task = task or tiny_task(defense.modalities[0])
    model = model or task.fit(task.train, Context(1))[0]
    data, weights = task.train, copy.deepcopy(model.state_dict())
    inputs, labels = copy.deepcopy(data.inputs), data.labels.clone()
    view = DefenderView(model=model, clean=data if clean is None else clean, suspicious=data, blueprint=task.blueprint)
    try:
        outcome = defense.apply(view, Context(seed))
    except NotApplicable as reason:
        assert len(str(reason)) > 20, f"{name}: not applicable, but why?"
        return None
    for tensor, value in model.state_dict().items():
        assert torch.equal(weights[tensor], value), f"{name}: the model was changed ({tensor})"
    left = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not left, f"{name}: hooks were left behind"
    assert all(p.requires_grad for p in model.parameters()), f"{name}: parameters were left frozen"
    assert not model.training, f"{name}: the model was left in training mode"
    assert _equal(inputs, data.inputs), f"{name}: the inputs were changed"
    assert torch.equal(labels, data.labels), f"{name}: the labels were changed"
    check_outcome(defense, outcome, task, model)
    first = _numbers(outcome, task)
    second = _numbers(defense.apply(view, Context(seed)), task)
    same = len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert same, f"{name}: the same seed gives another outcome"
    return outcome


def check_outcome(defense: Defense, outcome: Outcome, task: Task, model: Classifier) -> None:
    """Types, shapes and ranges of what a defense gave.

    Args:
        defense: which one.
        outcome: of :meth:`~backdoorlab.defenses.Defense.apply`.
        task: whose training set was suspicious; the outcome is tried on its test set.
        model: the suspicious one.

    Raises:
        AssertionError: naming the requirement that is not met.
    """
    name = defense.name
    count = len(task.train)
    match outcome:
        case Screening(scores, flags):
            _check_scores(name, scores, count)
            _check_flags(name, flags, count)
        case TrainingReport():
            _check_model(name, outcome.model, model, task)
            if outcome.scores is not None:
                _check_scores(name, outcome.scores, count)
            if outcome.isolated is not None:
                _check_flags(name, outcome.isolated, count)
            json.dumps(outcome.notes, allow_nan=False)
        case Repair():
            _check_model(name, outcome.model, model, task)
        case InputDetector():
            scores = outcome.score(task.test.inputs)
            _check_scores(name, scores, len(task.test))
            _check_flags(name, outcome.flags(scores), len(task.test))
            assert math.isfinite(outcome.threshold), f"{name}: the threshold is not finite"
            alone = outcome.score(task.test.inputs[:1])
            assert torch.allclose(alone, scores[:1], rtol=1e-3, atol=1e-3), (
                f"{name}: the score of an input depends on the others in its batch"
            )
        case ScanReport():
            assert math.isfinite(outcome.score), f"{name}: the score is not finite"
            assert isinstance(outcome.backdoored, bool), f"{name}: the verdict is no bool"
            assert all(0 <= t < task.num_classes for t in outcome.targets), f"{name}: a target is no class"
            assert outcome.backdoored or not outcome.targets, f"{name}: a clean verdict, yet suspected targets"
            assert len(outcome.per_class) in (0, task.num_classes), f"{name}: evidence for K classes or none"


def _check_scores(name: str, scores: Tensor, count: int) -> None:
    assert (scores.dtype, tuple(scores.shape)) == (torch.float32, (count,)), f"{name}: scores must be float32 [N]"
    assert scores.device.type == "cpu", f"{name}: scores must be on the CPU"
    assert bool(torch.isfinite(scores).all()), f"{name}: a score is not finite"


def _check_flags(name: str, flags: Tensor, count: int) -> None:
    assert (flags.dtype, tuple(flags.shape)) == (torch.bool, (count,)), f"{name}: flags must be bool [N]"


def _check_model(name: str, model: Classifier, original: Classifier, task: Task) -> None:
    assert isinstance(model, Classifier) and model is not original, f"{name}: another model is expected"
    assert not model.training, f"{name}: the model must be in evaluation mode"
    logits = predict(model, task.test.inputs)
    assert bool(torch.isfinite(logits).all()), f"{name}: logits are not finite"
    restored = restore_model(model.state())
    assert isinstance(restored, Classifier), f"{name}: storage makes a {type(restored).__name__} of the model"
    assert torch.equal(predict(restored, task.test.inputs), logits), f"{name}: the model is another one after storage"


def _numbers(outcome: Outcome, task: Task) -> list[Tensor]:
    """What two runs of one seed must share."""
    match outcome:
        case Screening(scores, flags):
            return [scores, flags]
        case TrainingReport() | Repair():
            return [p.detach() for p in outcome.model.parameters()]
        case InputDetector():
            return [outcome.score(task.test.inputs), torch.tensor(outcome.threshold)]
        case ScanReport():
            return [torch.tensor([outcome.score, *outcome.per_class])]


def _out_of_range(field: dataclasses.Field[Any]) -> list[object]:
    """Values that the declaration of a hyper-parameter excludes."""
    meta = field.metadata
    if meta.get("choices"):
        return ["no such choice"]
    bad: list[object] = []
    if meta.get("low") is not None:
        bad.append(type(meta["low"])(meta["low"] - 1))
    if meta.get("high") is not None:
        bad.append(meta["high"] + 1)
    if meta.get("above") is not None:
        bad.append(meta["above"])
    if any(kind in str(field.type).split(" | ") for kind in ("int", "float")):
        bad.append(float("nan"))
    return bad


def _refuses(cls: type[Method], settings: dict[str, object], words: str) -> None:
    try:
        cls.build(settings)
    except InputError as error:
        assert words in str(error), f"{cls.name}: {settings} is refused with {str(error)!r}, which lacks {words!r}"
        return
    raise AssertionError(f"{cls.name}: {settings} is accepted")


def _refuses_run(attack: ClassificationAttack, task: Task) -> None:
    try:
        attack.run(task, Context())
    except InputError:
        return
    raise AssertionError(f"{attack.name}: a target outside of the classes is accepted")


def _equal(a: Inputs, b: Inputs) -> bool:
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return bool(np.array_equal(np.asarray(a), np.asarray(b)))
    return torch.equal(a, b)
