"""Attacks at the edges of what data can be: each gives a right result or an error that says what is wrong."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from attack_tools import ODD, make, noise
from backdoorlab.attacks import Attack, Backdoor, attacks
from backdoorlab.core.errors import BackdoorLabError, InputError
from backdoorlab.data.split import take
from backdoorlab.tasks import Task
from backdoorlab.testing import check_poison
from backdoorlab.training import Context
from contract_tools import labelled, nothing_in_it, pairs, task_of

every_attack = pytest.mark.parametrize(("cls", "modality"), pairs(attacks))

LEVELS = {"black": 0, "white": 255, "one grey": 128, "equal samples": 0}
PICTURES = {"odd size": ODD, "odd grey": (1, 31, 29)}


@cache
def edge(case: str, modality: str, target: int = 0) -> Task:
    """The task of a case; shared by all attacks."""
    if case in LEVELS:
        return task_of(modality, nothing_in_it(modality, LEVELS[case]), torch.arange(24) % 4, 4)
    if case in PICTURES:
        return task_of(modality, noise(PICTURES[case], 24, 1), torch.arange(24) % 4, 4)
    if case == "fewer than a batch":
        return labelled(modality, torch.arange(12) % 4, 4, batch=128)
    if case == "two classes":
        return labelled(modality, torch.arange(16) % 2, 2)
    if case == "one per class":
        return labelled(modality, torch.arange(4), 4)
    if case == "target class only":
        return labelled(modality, torch.full((16,), target), 2)
    assert case == "no target sample"
    return labelled(modality, (torch.arange(16) % 3 + target + 1) % 4, 4)


def check(attack: Attack, task: Task, backdoor: Backdoor, count: int) -> None:
    """Everything that is true of a right result on any data."""
    poison, train = backdoor.poison, task.train
    check_poison(attack, task, poison, count=count)
    assert poison.inputs.shape[1:] == train.inputs.shape[1:]
    for name, weight in backdoor.model.state_dict().items():
        assert bool(torch.isfinite(weight).all()), f"{name} is not finite"
    for trigger in filter(None, (backdoor.trigger, backdoor.cross_trigger)):
        stamped = trigger(task.test.inputs)
        assert type(stamped) is type(task.test.inputs)
        assert stamped.dtype == task.test.inputs.dtype
        assert stamped.shape == task.test.inputs.shape
        assert len(trigger(take(task.test.inputs, torch.arange(0)))) == 0
    metrics = backdoor.measure(task, Context())
    eligible = int(backdoor.target_map.eligible(task.test.labels).sum())
    assert (metrics["asr"] is None) == (eligible == 0)
    assert metrics["asr"] is None or 0 <= metrics["asr"] + metrics["ra"] <= 1


ANY = ("fewer than a batch", "two classes", "one per class", "target class only")
CASES = {"image": ("black", "white", "one grey", "odd size", "odd grey", *ANY)}
"""Cases of a modality; of the others: :data:`ANY`, and samples that are all equal."""
REFUSALS = {
    ("cba", "two classes"): "no class is left to be mixed",
    ("cba", "target class only"): "no class is left to be mixed",
    ("fc", "target class only"): "no samples of other classes than 0",
    ("htba", "target class only"): "no samples of other classes than 0",
    ("tuap", "target class only"): "no samples of other classes than 1",
    ("lba", "target class only"): "must have samples of target class 0 and of others",
    ("lba", "no target sample"): "must have samples of target class 0 and of others",
}
"""(attack, case) -> what its error says; in every other case the result must be right."""
UNTRAINED = {"tuap": "the clean model already says class"}
"""Attacks that may refuse a surrogate that has learned nothing, as one of a single epoch has on any of these sets."""


def outcome(attack: Attack, modality: str, case: str, count: int | None = None) -> None:
    """Plant on a case: the documented refusal, or a right result with so many poisoned samples."""
    task = edge(case, modality, attack.target)
    expected = REFUSALS.get((attack.name, case))
    try:
        backdoor = attack.run(task, Context(seed=2))
    except BackdoorLabError as error:
        allowed = [message for message in (expected, UNTRAINED.get(attack.name)) if message]
        assert str(error).startswith(f"{attack.name}: ")
        assert any(message in str(error) for message in allowed), str(error)
    else:
        assert expected is None, "no longer refuses"
        check(attack, task, backdoor, round(attack.poison_rate * len(task.train)) if count is None else count)


def cases() -> list[object]:
    return [
        pytest.param(*pair.values, case, id=f"{pair.id}-{case}")  # type: ignore[attr-defined]
        for pair in pairs(attacks)
        for case in CASES.get(pair.values[1], ("equal samples", *ANY))  # type: ignore[attr-defined]
    ]


@pytest.mark.parametrize(("cls", "modality", "case"), cases())
def test_edge(cls: type[Attack], modality: str, case: str) -> None:
    outcome(make(cls, poison_rate=0.25), modality, case)


@every_attack
def test_target_class_without_samples(cls: type[Attack], modality: str) -> None:
    """Clean labels need samples of the target class; with new labels the class may be empty."""
    attack = make(cls, poison_rate=0.25)
    if cls.label_mode != "clean":
        outcome(attack, modality, "no target sample", 4)
        return
    for cap in (False, True):
        with pytest.raises(InputError, match=f"{cls.name}: .*no samples .*class {attack.target}"):
            make(cls, poison_rate=0.25, cap_rate=cap).run(edge("no target sample", modality, attack.target), Context())


@every_attack
def test_clean_labels_end_where_the_class_ends(cls: type[Attack], modality: str) -> None:
    """One sample more than the class has is an error that names the largest rate, and can be capped."""
    task = edge("fewer than a batch", modality)
    if cls.label_mode != "clean":
        outcome(make(cls, poison_rate=4 / 12), modality, "fewer than a batch", 4)
        return
    with pytest.raises(InputError, match=rf"{cls.name}: .*needs 4 of 3 samples .*largest possible rate is 0\.25"):
        make(cls, poison_rate=4 / 12).run(task, Context())
    outcome(make(cls, poison_rate=4 / 12, cap_rate=True), modality, "fewer than a batch", 3)


@every_attack
def test_nothing_to_poison(cls: type[Attack], modality: str) -> None:
    """A rate that rounds to no sample at all is an error, whoever runs the training, and before anything is trained."""
    with pytest.raises(InputError, match=rf"{cls.name}: a poison rate of 0\.01 of 12 training samples poisons none"):
        make(cls, poison_rate=0.01).run(edge("fewer than a batch", modality), Context(assets=NoAssets()))


class NoAssets:
    """Fails where a surrogate would be trained."""

    def get(self, kind: str, spec: object, build: object) -> dict[str, Tensor]:
        raise AssertionError(f"{kind} was wanted before the settings had been checked")


@every_attack
def test_target_just_outside(cls: type[Attack], modality: str) -> None:
    with pytest.raises(InputError, match=f"{cls.name}: target 4 is not a class of edge, which has 4: "):
        make(cls, target=4).run(edge("fewer than a batch", modality), Context(assets=NoAssets()))
    with pytest.raises(InputError, match=f"{cls.name}: target must be >= 0, got -1"):
        make(cls, target=-1)


def test_all_candidates_excluded() -> None:
    """With only target-class samples, excluding the target class leaves nothing."""
    attack = make("badnets", exclude_target=True, cap_rate=True)
    with pytest.raises(InputError, match=r"badnets: nothing to poison, .* no samples that are not of target class 0"):
        attack.run(edge("target class only", "image"), Context())
