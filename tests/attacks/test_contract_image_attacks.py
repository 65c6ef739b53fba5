"""What every image attack promises, checked for each one in the registry on sets of random pictures."""

from __future__ import annotations

import dataclasses
import json
from functools import cache

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from backdoorlab.attacks import Attack, Backdoor, PoisoningAttack, TrainingAttack, Trigger, attacks
from backdoorlab.attacks.image import tuap
from backdoorlab.attacks.triggers.base import load_trigger, stamp_all
from backdoorlab.core.errors import InputError
from backdoorlab.data.sources import DatasetSpec
from backdoorlab.data.split import BACKDOOR, COVER, Dataset, Poison, Split
from backdoorlab.modalities.base import modality_of
from backdoorlab.models.anatomy import head
from backdoorlab.models.classifier import Classifier
from backdoorlab.tasks import Task, TaskSpec
from backdoorlab.training import Context, Recipe
from backdoorlab.training.evaluate import predict

QUICK: dict[str, dict[str, object]] = {
    "lf": {"steps": 3},
    "refool": {"pool": 6},
    "trojannn": {"steps": 3},
    "blind": {"gate_threshold": 100.0},
    "lc": {"steps": 2},
    "narcissus": {"steps": 30},  # RAdam hardly moves before its sixth step
    "dfst": {"style_steps": 3, "detox_steps": 3},
    "lba": {"steps": 3},
    "ssba": {"steps": 3, "batch_size": 4, "width": 4},
    "poisonink": {"steps": 3, "batch_size": 4, "width": 4},
    "fc": {"steps": 3},
    "htba": {"steps": 3},
    "tuap": {"passes": 2, "target": 1},
}
"""Settings that make an attack's own preparations short; only what the promises do not depend on."""

SHAPES = [(1, 16, 16), (3, 32, 32), (3, 29, 31)]
OTHER_SHAPES = [(1, 28, 28), (3, 64, 64), (3, 224, 224)]
CLASSES, SAMPLES = 4, 48
ALL = [cls for cls in attacks if "image" in cls.modalities and cls.__module__.startswith("backdoorlab.attacks.image.")]
POISONING = [cls for cls in ALL if issubclass(cls, PoisoningAttack)]
TRAINING = [cls for cls in ALL if issubclass(cls, TrainingAttack)]
CLEAN_LABEL = [cls for cls in POISONING if cls.label_mode == "clean"]


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


def named(classes: list[type[Attack]]) -> list[object]:
    return [pytest.param(cls, id=cls.name) for cls in classes]


def shaped(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


@cache
def tiny_task(shape: tuple[int, int, int], samples: int = SAMPLES) -> Task:
    """Random pictures with balanced labels; one epoch of a small network."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randint(0, 256, (samples, *shape), generator=generator, dtype=torch.uint8)
    labels = torch.arange(samples) % CLASSES
    split = Split(inputs, labels, ("a", "b", "c", "d"))
    data = Dataset("tiny", "image", split, split[torch.arange(min(24, samples))])
    spec = TaskSpec(dataset=DatasetSpec(name="tiny"), model="convnet3", recipe="smoke")
    return Task(spec, data, modality_of(data), Recipe(epochs=1, batch_size=16, lr=0.05))


def make(cls: type[Attack], **changes: object) -> Attack:
    rate = 0.125 if cls in CLEAN_LABEL else 0.25
    return cls.build({"poison_rate": rate, **QUICK.get(cls.name, {}), **changes})


@cache
def poisoned(cls: type[PoisoningAttack], shape: tuple[int, int, int], seed: int = 3) -> tuple[Trigger, Poison]:
    attack, task = make(cls), tiny_task(shape)
    assert isinstance(attack, PoisoningAttack)
    trigger = attack.make_trigger(task, Context(seed=seed))
    return trigger, attack.poison(trigger, task, Context(seed=seed))


@cache
def planted(cls: type[Attack], shape: tuple[int, int, int] = SHAPES[0]) -> Backdoor:
    return make(cls).run(tiny_task(shape), Context(seed=3))


def trigger_of(cls: type[Attack], shape: tuple[int, int, int]) -> Trigger:
    return poisoned(cls, shape)[0] if issubclass(cls, PoisoningAttack) else planted(cls, shape).trigger


def triggers_of(cls: type[Attack], shape: tuple[int, int, int]) -> list[Trigger]:
    if issubclass(cls, PoisoningAttack):
        return [poisoned(cls, shape)[0]]
    backdoor = planted(cls, shape)
    return [backdoor.trigger, *([backdoor.cross_trigger] if backdoor.cross_trigger else [])]


def reload(trigger: Trigger) -> Trigger:
    """Through bytes and text, as a store would."""
    tensors, config = trigger.state()
    stored = save_tensors(tensors) if tensors else None
    return load_trigger(trigger.kind, load_tensors(stored) if stored else {}, json.loads(json.dumps(config)))


# --- triggers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=shaped)
@pytest.mark.parametrize("cls", named(ALL))
def test_trigger_keeps_form_and_leaves_its_input_alone(cls: type[Attack], shape: tuple[int, int, int]) -> None:
    images = tiny_task(shape).test.inputs
    before = images.clone()
    for trigger in triggers_of(cls, shape):
        stamped = trigger(images, torch.arange(len(images)))
        assert stamped.dtype == torch.uint8
        assert stamped.shape == images.shape
        assert torch.equal(images, before)
        assert (stamped != images).flatten(1).any(1).all(), "the trigger left a random picture as it was"


@pytest.mark.parametrize("shape", SHAPES, ids=shaped)
@pytest.mark.parametrize("cls", named(ALL))
def test_trigger_depends_on_sample_not_on_batch(cls: type[Attack], shape: tuple[int, int, int]) -> None:
    images = tiny_task(shape).test.inputs
    rows = torch.arange(len(images))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    for trigger in triggers_of(cls, shape):
        whole = trigger(images, rows)
        assert torch.equal(trigger(images[order], rows[order]), whole[order])
        assert torch.equal(stamp_all(trigger, images, batch_size=7), whole)
        assert torch.equal(trigger(images), whole), "no indices must mean counting from 0"


@pytest.mark.parametrize("shape", SHAPES, ids=shaped)
@pytest.mark.parametrize("cls", named(ALL))
def test_trigger_survives_storage(cls: type[Attack], shape: tuple[int, int, int]) -> None:
    images = tiny_task(shape).test.inputs
    for trigger in triggers_of(cls, shape):
        assert torch.equal(reload(trigger)(images), trigger(images))


@pytest.mark.parametrize("shape", SHAPES, ids=shaped)
@pytest.mark.parametrize("cls", named(ALL))
def test_no_wrap_around(cls: type[Attack], shape: tuple[int, int, int]) -> None:
    """From one grey level to the next no pixel may jump across the range, least of all at black and white."""
    levels = torch.arange(256, dtype=torch.uint8)[:, None, None, None].expand(256, *shape).contiguous()
    stamped = trigger_of(cls, shape)(levels, torch.zeros(256, dtype=torch.int64)).short()
    assert int((stamped[1:] - stamped[:-1]).abs().max()) <= 128


@pytest.mark.parametrize("shape", OTHER_SHAPES, ids=shaped)
@pytest.mark.parametrize("cls", named(POISONING))
def test_other_sizes(cls: type[PoisoningAttack], shape: tuple[int, int, int]) -> None:
    if cls.needs_surrogate and shape[1] > 64:
        pytest.skip("a surrogate at 224 px is no unit test")
    task = tiny_task(shape, 12)
    attack = make(cls, poison_rate=0.25)
    trigger = attack.make_trigger(task, Context())  # type: ignore[attr-defined]
    poison = attack.poison(trigger, task, Context())  # type: ignore[attr-defined]
    assert poison.inputs.shape[1:] == shape
    assert not torch.equal(poison.inputs, task.train.inputs[poison.indices])
    assert not torch.equal(trigger(task.test.inputs), task.test.inputs)


@pytest.mark.parametrize("cls", named(ALL))
def test_trigger_refuses_what_is_no_picture(cls: type[Attack]) -> None:
    with pytest.raises(InputError):
        trigger_of(cls, SHAPES[0])(np.array(["words"], dtype=object))


# --- poisoned sets ----------------------------------------------------------------------------------------------------


def check_roles(attack: Attack, task: Task, poison: Poison) -> None:
    backdoor, cover = poison.roles == BACKDOOR, poison.roles == COVER
    assert int(backdoor.sum()) == round(attack.poison_rate * len(task.train))
    assert bool((backdoor | cover).all())
    assert len(set(poison.indices.tolist())) == len(poison) == len(poison.inputs)
    assert poison.inputs.dtype == torch.uint8
    true = task.train.labels[poison.indices]
    assert torch.equal(poison.labels[cover], true[cover])
    if attack.label_mode == "clean":
        assert (true[backdoor] == attack.target).all()
        assert torch.equal(poison.labels, true)
    else:
        assert torch.equal(poison.labels[backdoor], attack.target_map_for(task)(true[backdoor]))
    applied = poison.apply(task.train)
    touched = applied.roles != 0
    assert torch.equal(applied.inputs[~touched], task.train.inputs[~touched])
    assert torch.equal(applied.labels[~touched], task.train.labels[~touched])
    assert int(touched.sum()) == len(poison)


@pytest.mark.parametrize("shape", SHAPES, ids=shaped)
@pytest.mark.parametrize("cls", named(POISONING))
def test_poisoned_set(cls: type[PoisoningAttack], shape: tuple[int, int, int]) -> None:
    task = tiny_task(shape)
    before = task.train.inputs.clone()
    _, poison = poisoned(cls, shape)
    check_roles(make(cls), task, poison)
    assert not poison.replay
    assert torch.equal(task.train.inputs, before)


@pytest.mark.parametrize("cls", named(POISONING))
def test_poisoning_is_a_function_of_the_seed(cls: type[PoisoningAttack]) -> None:
    trigger, poison = poisoned(cls, SHAPES[0])
    again_trigger, again = poisoned.__wrapped__(cls, SHAPES[0])
    images = tiny_task(SHAPES[0]).test.inputs
    assert torch.equal(trigger(images), again_trigger(images))
    assert torch.equal(poison.indices, again.indices)
    assert torch.equal(poison.inputs, again.inputs)
    _, other = poisoned(cls, SHAPES[0], seed=4)
    assert not torch.equal(poison.indices, other.indices)


@pytest.mark.parametrize("cls", named(TRAINING))
def test_training_attack(cls: type[TrainingAttack]) -> None:
    task, backdoor = tiny_task(SHAPES[0]), planted(cls)
    assert backdoor.poison.replay
    check_roles(make(cls), task, backdoor.poison)
    again = planted.__wrapped__(cls)
    assert torch.equal(backdoor.poison.inputs, again.poison.inputs)
    for name, weight in backdoor.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name
    metrics = backdoor.measure(task, Context())
    assert metrics["asr"] + metrics["ra"] <= 1
    tensors, record = backdoor.state()
    restored = Backdoor.from_state(tensors, json.loads(json.dumps(record)))
    assert restored.measure(task, Context()) == metrics


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", named(ALL))
def test_target_outside_the_classes(cls: type[Attack]) -> None:
    with pytest.raises(InputError, match=f"{cls.name}: target 99 is not a class of tiny"):
        make(cls, target=99).run(tiny_task(SHAPES[0]), Context())


@pytest.mark.parametrize("cls", named(POISONING))
def test_a_rate_that_poisons_nothing(cls: type[PoisoningAttack]) -> None:
    with pytest.raises(InputError, match="poisons none"):
        make(cls, poison_rate=0.001).run(tiny_task(SHAPES[0]), Context())


@pytest.mark.parametrize("cls", named(CLEAN_LABEL))
def test_capacity_of_the_target_class(cls: type[PoisoningAttack]) -> None:
    task = tiny_task(SHAPES[0])
    with pytest.raises(InputError, match=r"largest possible rate is 0\.25"):
        make(cls, poison_rate=0.5).run(task, Context())
    capped = make(cls, poison_rate=0.5, cap_rate=True)
    trigger = poisoned(cls, SHAPES[0])[0]
    assert len(capped.poison(trigger, task, Context())) == SAMPLES // CLASSES  # type: ignore[attr-defined]


def out_of_range(field: dataclasses.Field) -> list[object]:
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
    if isinstance(field.default, float):
        bad.append(float("nan"))
    return bad


@pytest.mark.parametrize("cls", named(ALL))
def test_hyper_parameters_are_checked_and_explained(cls: type[Attack]) -> None:
    for field in dataclasses.fields(cls):
        assert field.metadata.get("help"), field.name
        for value in out_of_range(field):
            with pytest.raises(InputError, match=f"{cls.name}: {field.name} must be"):
                cls(**{field.name: value})
    assert cls.build(json.loads(json.dumps(cls().settings()))) == cls()
    with pytest.raises(InputError, match="poison_rate"):
        cls.build({"poisonrate": 0.1})


# --- facts ------------------------------------------------------------------------------------------------------------


# --- what only some attacks have --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("sig", {"frequency": 8.0}, "frequency must be below 8"),
        ("ftrojan", {"window": 17}, "window may be at most 16"),
        ("ftrojan", {"positions": (40,)}, "positions must be numbers from 1 to 31"),
        ("ctrl", {"positions": ()}, "positions must be numbers from 1 to 31"),
        ("blended", {"key": "no/such/file.png"}, "found no image file no/such/file.png"),
        ("badnets", {"size": 17}, "size \\+ offset may be at most 16"),
    ],
)
def test_settings_that_do_not_fit_the_pictures(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(attacks.get(name, "image"), **settings).run(tiny_task(SHAPES[0]), Context())


@pytest.mark.parametrize("cls", [cls for cls in attacks if "image" in cls.modalities and cls.label_mode == "clean"])
def test_clean_labels_and_all_to_all_exclude_each_other(cls: type) -> None:
    with pytest.raises(InputError, match=f"{cls.name}: target_map all-to-all needs new labels"):
        cls.build({"target_map": "all-to-all"})


def test_an_instance_with_clean_labels_refuses_all_to_all() -> None:
    attack = make(attacks.get("refool", "image"), clean_label=True)
    object.__setattr__(attack, "target_map", "all-to-all")
    with pytest.raises(InputError, match="refool: target_map all-to-all needs new labels"):
        attack.target_map_for(tiny_task(SHAPES[0]))


@pytest.mark.parametrize("name", ["badnets", "blended", "wanet", "bpp", "input_aware", "lira"])
def test_all_to_all(name: str) -> None:
    task, attack = tiny_task(SHAPES[0]), make(attacks.get(name, "image"), target_map="all-to-all")
    backdoor = attack.run(task, Context())
    check_roles(attack, task, backdoor.poison)
    _, wanted, true = backdoor.triggered_test(task)
    assert len(true) == len(task.test)
    assert torch.equal(wanted, (true + 1) % 4)
