"""What every registered attack promises, on every modality that it declares."""

from __future__ import annotations

import dataclasses
import re
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from attack_tools import GREY, ODD, RGB, make, pictures, tiny_task
from backdoorlab.attacks import Attack, PoisoningAttack, Trigger, attacks
from backdoorlab.attacks.image import tuap
from backdoorlab.core.errors import InputError
from backdoorlab.data.split import Poison
from backdoorlab.models.anatomy import head
from backdoorlab.models.classifier import Classifier
from backdoorlab.tasks import Task
from backdoorlab.testing import check_attack, check_method, check_poison, check_trigger
from backdoorlab.testing import tiny_task as embedded_task
from backdoorlab.training import Context
from backdoorlab.training.evaluate import predict
from contract_tools import labelled, pairs

OWN = [cls for cls in attacks if cls.__module__.startswith("backdoorlab.attacks.")]
IMAGE = [cls for cls in OWN if "image" in cls.modalities]
every_attack = pytest.mark.parametrize(("cls", "modality"), pairs(attacks))
every_image_attack = pytest.mark.parametrize("cls", IMAGE, ids=lambda cls: cls.name)
every_shape = pytest.mark.parametrize("shape", [GREY, RGB, ODD], ids=str)


every_clean_label_attack = pytest.mark.parametrize(
    ("cls", "modality"),
    [pair for pair in pairs(attacks) if pair.values[0].label_mode == "clean"],  # type: ignore[attr-defined]
)


@pytest.fixture(autouse=True)
def _surrogate_without_a_favourite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps on noise leave a model that says one class always; tuap then has nothing to push, or nobody to."""
    trained = tuap.clean_surrogate

    def centred(task: Task, ctx: Context) -> Classifier:
        model = trained(task, ctx)
        bias = head(model).bias
        assert bias is not None
        bias.data -= predict(model, task.train.inputs, precision="fp32").mean(0)
        return model

    monkeypatch.setattr(tuap, "clean_surrogate", centred)


# --- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", OWN, ids=lambda cls: f"{cls.name}-{cls.modalities[0]}")
def test_facts_and_hyper_parameters(cls: type[Attack]) -> None:
    check_method(cls())


@every_attack
def test_contract(cls: type[Attack], modality: str) -> None:
    rate = 0.05 if cls.label_mode == "clean" else 0.25
    check_attack(make(cls, poison_rate=rate), embedded_task(modality))


@every_attack
def test_trigger_refuses_samples_of_another_modality(cls: type[Attack], modality: str) -> None:
    task = tiny_task(GREY) if modality == "image" else embedded_task(modality)
    trigger = run(cls, task)[0][0]
    with pytest.raises(InputError):
        trigger(torch.zeros(2, 3) if modality == "text" else np.array(["words"], dtype=object))


@cache
def run(cls: type[Attack], task: Task) -> tuple[list[Trigger], Poison]:
    """Its triggers and its poisoned set; a victim is trained only where that is part of the attack."""
    attack = make(cls, poison_rate=0.125 if cls.label_mode == "clean" else 0.25)
    if isinstance(attack, PoisoningAttack):
        trigger = attack.make_trigger(task, Context(seed=3))
        return [trigger], attack.poison(trigger, task, Context(seed=3))
    backdoor = attack.run(task, Context(seed=3))
    return [t for t in (backdoor.trigger, backdoor.cross_trigger) if t], backdoor.poison


# --- pictures of any size ---------------------------------------------------------------------------------------------


@every_shape
@every_image_attack
def test_triggers_and_poison_of_any_shape(cls: type[Attack], shape: tuple[int, int, int]) -> None:
    task = tiny_task(shape)
    before = task.train.inputs.clone()
    triggers, poison = run(cls, task)
    for trigger in triggers:
        check_trigger(trigger, task.test.inputs)
    check_poison(make(cls), task, poison)
    assert poison.replay == (cls.threat_model == "training")
    assert torch.equal(task.train.inputs, before)


@every_shape
@every_image_attack
def test_no_wrap_around(cls: type[Attack], shape: tuple[int, int, int]) -> None:
    """From one grey level to the next no pixel may jump across the range, least of all at black and white."""
    levels = torch.arange(256, dtype=torch.uint8)[:, None, None, None].expand(256, *shape).contiguous()
    stamped = run(cls, tiny_task(shape))[0][0](levels, torch.zeros(256, dtype=torch.int64)).short()
    assert int((stamped[1:] - stamped[:-1]).abs().max()) <= 128


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 64, 64), (3, 224, 224)], ids=str)
@pytest.mark.parametrize("cls", [c for c in IMAGE if issubclass(c, PoisoningAttack)], ids=lambda cls: cls.name)
def test_larger_pictures(cls: type[PoisoningAttack], shape: tuple[int, int, int]) -> None:
    if cls.needs_surrogate and shape[1] > 64:
        pytest.skip("a surrogate at 224 px is no unit test")
    task = tiny_task(shape, 12)
    attack = make(cls, poison_rate=0.25)
    trigger = attack.make_trigger(task, Context())  # type: ignore[attr-defined]
    poison = attack.poison(trigger, task, Context())  # type: ignore[attr-defined]
    assert poison.inputs.shape[1:] == shape
    assert not torch.equal(poison.inputs, task.train.inputs[poison.indices])
    assert not torch.equal(trigger(task.test.inputs), task.test.inputs)


@every_image_attack
def test_other_sizes_are_stamped_or_refused_by_name(cls: type[Attack]) -> None:
    """No trigger may fail in another way; which ones fit any size is said in test_sizes.py."""
    images = pictures((3, 64, 64), 5, 2)
    try:
        stamped = run(cls, tiny_task(RGB))[0][0](images)
    except InputError as error:
        assert re.search(r"\(3, 32, 32\).*\(3, 64, 64\)", str(error)), str(error)
    else:
        assert isinstance(stamped, Tensor)
        assert (stamped.dtype, stamped.shape) == (torch.uint8, images.shape)
        assert (stamped[:-2] != images[:-2]).flatten(1).any(1).all()


# --- who is poisoned --------------------------------------------------------------------------------------------------


@every_attack
def test_all_to_all(cls: type[Attack], modality: str) -> None:
    """Every attack that takes a map of targets serves this one, or refuses it because its labels are clean."""
    if "target_map" not in {field.name for field in dataclasses.fields(cls)}:
        pytest.skip("has no choice of target maps")
    if cls.label_mode == "clean":
        with pytest.raises(InputError, match=f"{cls.name}: target_map all-to-all needs new labels"):
            cls.build({"target_map": "all-to-all"})
        return
    task = labelled(modality, torch.arange(48) % 4, 4)
    attack = make(cls, target_map="all-to-all")
    backdoor = attack.run(task, Context())
    check_poison(attack, task, backdoor.poison)
    _, wanted, true = backdoor.triggered_test(task)
    assert len(true) == len(task.test)
    assert torch.equal(wanted, (true + 1) % 4)


def test_an_instance_with_clean_labels_refuses_all_to_all() -> None:
    attack = make("refool", clean_label=True)
    object.__setattr__(attack, "target_map", "all-to-all")
    with pytest.raises(InputError, match="refool: target_map all-to-all needs new labels"):
        attack.target_map_for(tiny_task(GREY))


@every_clean_label_attack
@pytest.mark.parametrize(
    ("sizes", "count"),
    [
        ((40,) * 10, 20),  # ten balanced classes: 5 % of the set is half of a class
        ((10,) * 100, 5),  # of a hundred it would be five times the class
        ((7,) + (90,) * 4, 3),  # a small target class
        ((300, 300), 30),  # of two classes it is a tenth of one
        ((2,) + (40,) * 3, 1),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else f"{len(value)} classes, {value[0]} of the target",
)
def test_default_leaves_half_of_the_class_clean(
    cls: type[Attack], modality: str, sizes: tuple[int, ...], count: int
) -> None:
    task, ctx, attack = sized(modality, *sizes), Context(), cls()
    chosen = attack.choose(task, ctx)
    assert len(chosen) == count == round(attack.rate_on(task) * len(task.train))
    assert 2 * count <= sizes[0]
    assert (task.train.labels[chosen] == 0).all()
    assert not ctx.warnings


@every_clean_label_attack
def test_more_than_half_of_the_class_is_told(cls: type[Attack], modality: str) -> None:
    task, ctx = sized(modality, *(40,) * 10), Context()
    cls(poison_rate=0.05).choose(task, ctx)
    assert not ctx.warnings
    cls(poison_rate=0.1).choose(task, ctx)
    (told,) = ctx.warnings
    assert told.startswith(f"{cls.name}: 40 of the 40 training samples of class 0 (class 0) are poisoned")
    assert told.endswith("a poison rate of at most 0.05 leaves half of them clean")


@every_clean_label_attack
def test_an_attack_that_takes_one_class_has_no_fixed_default(cls: type[Attack], modality: str) -> None:
    """A rate of the whole set cannot be a default for attacks whose samples come from one class."""
    assert cls().poison_rate is None
    assert {field.name for field in dataclasses.fields(cls)} >= {"poison_rate", "cap_rate"}


@cache
def sized(modality: str, *sizes: int) -> Task:
    """As many samples of each class as said."""
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return labelled(modality, labels, len(sizes))


# --- the look at a trigger --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", OWN, ids=lambda cls: f"{cls.name}-{cls.modalities[0]}")
def test_advice_names_hyper_parameters(cls: type[Attack]) -> None:
    if not cls.stronger:
        return
    found = re.fullmatch(r"(?:raise|lower) (\w+)(?: and (\w+))?", cls.stronger)
    assert found, cls.stronger
    assert {name for name in found.groups() if name} <= {field.name for field in dataclasses.fields(cls)}


@pytest.mark.parametrize("cls", [c for c in OWN if issubclass(c, PoisoningAttack)], ids=lambda cls: cls.name)
def test_poisoning_attacks_have_one_place_for_it(cls: type[Attack]) -> None:
    assert "poison" not in vars(cls), f"{cls.name} would bypass the look at its trigger"
