"""Image attacks at the edges of what data can be: each gives a right result or an error that says what is wrong."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from test_contract_image_attacks import ALL, CLEAN_LABEL, make, named
from torch import Tensor

from backdoorlab.attacks import Attack, Backdoor, attacks
from backdoorlab.core.errors import BackdoorLabError, InputError
from backdoorlab.data.sources import DatasetSpec
from backdoorlab.data.split import BACKDOOR, COVER, Dataset, Split
from backdoorlab.modalities.base import modality_of
from backdoorlab.tasks import Task, TaskSpec
from backdoorlab.training import Context, Recipe

GREY, RGB = (1, 16, 16), (3, 29, 31)


def task_of(inputs: Tensor, labels: Tensor, classes: int, batch: int = 16) -> Task:
    """One epoch of a small network on these samples, which are the test set too."""
    split = Split(inputs, labels, tuple("abcdefgh"[:classes]))
    data = Dataset("edge", "image", split, split)
    spec = TaskSpec(dataset=DatasetSpec(name="edge"), model="convnet3", recipe="smoke")
    return Task(spec, data, modality_of(data), Recipe(epochs=1, batch_size=batch, lr=0.05))


def noise(count: int, shape: tuple[int, int, int]) -> Tensor:
    return torch.randint(0, 256, (count, *shape), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def constant(level: int) -> Task:
    return task_of(torch.full((24, *GREY), level, dtype=torch.uint8), torch.arange(24) % 4, 4)


@cache
def edge(case: str, target: int = 0) -> Task:
    """The task of a case; shared by all attacks."""
    if case in ("black", "white", "one grey"):
        return constant({"black": 0, "white": 255, "one grey": 128}[case])
    if case == "odd size":
        return task_of(noise(24, RGB), torch.arange(24) % 4, 4)
    if case == "odd grey":
        return task_of(noise(24, (1, 31, 29)), torch.arange(24) % 4, 4)
    if case == "fewer than a batch":
        return task_of(noise(12, GREY), torch.arange(12) % 4, 4, batch=128)
    if case == "two classes":
        return task_of(noise(16, GREY), torch.arange(16) % 2, 2)
    if case == "one per class":
        return task_of(noise(4, GREY), torch.arange(4), 4)
    if case == "target class only":
        return task_of(noise(16, GREY), torch.full((16,), target), 2)
    assert case == "no target sample"
    return task_of(noise(16, GREY), (torch.arange(16) % 3 + target + 1) % 4, 4)


def check(attack: Attack, task: Task, backdoor: Backdoor, count: int) -> None:
    """Everything that is true of a right result on any data."""
    poison, train = backdoor.poison, task.train
    assert int((poison.roles == BACKDOOR).sum()) == count
    assert bool(((poison.roles == BACKDOOR) | (poison.roles == COVER)).all())
    assert len(set(poison.indices.tolist())) == len(poison) == len(poison.inputs)
    assert isinstance(poison.inputs, Tensor)
    assert poison.inputs.dtype == torch.uint8
    assert poison.inputs.shape[1:] == train.inputs.shape[1:]
    true, seen = train.labels[poison.indices], poison.roles == COVER
    assert torch.equal(poison.labels[seen], true[seen])
    if attack.label_mode == "clean":
        assert torch.equal(poison.labels, true)
        assert bool((true[~seen] == attack.target).all())
    else:
        assert torch.equal(poison.labels[~seen], backdoor.target_map(true[~seen]))
    for name, weight in backdoor.model.state_dict().items():
        assert bool(torch.isfinite(weight).all()), f"{name} is not finite"
    for trigger in filter(None, (backdoor.trigger, backdoor.cross_trigger)):
        stamped = trigger(task.test.inputs)
        assert isinstance(stamped, Tensor)
        assert stamped.dtype == torch.uint8
        assert stamped.shape == task.test.inputs.shape
        assert len(trigger(task.test.inputs[:0])) == 0
    metrics = backdoor.measure(task, Context())
    eligible = int(backdoor.target_map.eligible(task.test.labels).sum())
    assert (metrics["asr"] is None) == (eligible == 0)
    assert metrics["asr"] is None or 0 <= metrics["asr"] + metrics["ra"] <= 1


CASES = (
    "black",
    "white",
    "one grey",
    "odd size",
    "odd grey",
    "fewer than a batch",
    "two classes",
    "one per class",
    "target class only",
)
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


def outcome(attack: Attack, case: str, count: int | None = None) -> None:
    """Plant on a case: the documented refusal, or a right result with so many poisoned samples."""
    task = edge(case, attack.target)
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


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cls", named(ALL))
def test_edge(cls: type[Attack], case: str) -> None:
    outcome(make(cls, poison_rate=0.25), case)


@pytest.mark.parametrize("cls", named(ALL))
def test_target_class_without_samples(cls: type[Attack]) -> None:
    """Clean labels need samples of the target class; with new labels the class may be empty."""
    attack = make(cls, poison_rate=0.25)
    if cls not in CLEAN_LABEL:
        outcome(attack, "no target sample", 4)
        return
    for cap in (False, True):
        with pytest.raises(InputError, match=f"{cls.name}: .*no samples .*class {attack.target}"):
            make(cls, poison_rate=0.25, cap_rate=cap).run(edge("no target sample", attack.target), Context())


@pytest.mark.parametrize("cls", named(ALL))
def test_clean_labels_end_where_the_class_ends(cls: type[Attack]) -> None:
    """One sample more than the class has is an error that names the largest rate, and can be capped."""
    task = edge("fewer than a batch")
    if cls not in CLEAN_LABEL:
        outcome(make(cls, poison_rate=4 / 12), "fewer than a batch", 4)
        return
    with pytest.raises(InputError, match=rf"{cls.name}: .*needs 4 of 3 samples .*largest possible rate is 0\.25"):
        make(cls, poison_rate=4 / 12).run(task, Context())
    outcome(make(cls, poison_rate=4 / 12, cap_rate=True), "fewer than a batch", 3)


@pytest.mark.parametrize("cls", named(ALL))
def test_nothing_to_poison(cls: type[Attack]) -> None:
    """A rate that rounds to no sample at all is an error, whoever runs the training, and before anything is trained."""
    with pytest.raises(InputError, match=rf"{cls.name}: a poison rate of 0\.01 of 12 training samples poisons none"):
        make(cls, poison_rate=0.01).run(edge("fewer than a batch"), Context(assets=NoAssets()))


class NoAssets:
    """Fails where a surrogate would be trained."""

    def get(self, kind: str, spec: object, build: object) -> dict[str, Tensor]:
        raise AssertionError(f"{kind} was wanted before the settings had been checked")


@pytest.mark.parametrize("cls", named(ALL))
def test_target_just_outside(cls: type[Attack]) -> None:
    with pytest.raises(InputError, match=f"{cls.name}: target 4 is not a class of edge, which has 4: "):
        make(cls, target=4).run(edge("fewer than a batch"), Context(assets=NoAssets()))
    with pytest.raises(InputError, match=f"{cls.name}: target must be >= 0, got -1"):
        make(cls, target=-1)


def test_all_candidates_excluded() -> None:
    """With only target-class samples, excluding the target class leaves nothing."""
    attack = make(attacks.get("badnets", "image"), exclude_target=True, cap_rate=True)
    with pytest.raises(InputError, match=r"badnets: nothing to poison, .* no samples that are not of target class 0"):
        attack.run(edge("target class only"), Context())
