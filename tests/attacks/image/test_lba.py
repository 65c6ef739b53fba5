"""The latent backdoor: against slow, independent implementations and closed forms; its options; its effect."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch.nn import functional as F

from attack_tools import Counting, noise, task_of
from backdoorlab.attacks.common.surrogate import clean_surrogate
from backdoorlab.attacks.image.lba import (
    LatentObjective,
    Lba,
    centre,
    distance,
    modules_after,
    represent,
    train_student,
)
from backdoorlab.core.errors import InputError
from backdoorlab.models import Classifier
from backdoorlab.models.anatomy import features, head
from backdoorlab.models.classifier import build_model
from backdoorlab.tasks import Task
from backdoorlab.training import Context, Recipe
from backdoorlab.training.context import MemoryAssets
from effect_tools import LOST, Numbers, case, context, effects, least, most, planted, task


@pytest.fixture(scope="module")
def lba_task() -> Task:
    return task_of(noise((3, 29, 31), 48), torch.arange(48) % 4)


@pytest.mark.parametrize(
    ("position", "size", "rows", "columns"),
    [
        ("bottom-right", 5, (24, 29), (26, 31)),
        ("bottom-right", None, (24, 29), (26, 31)),
        ("top-left", 3, (0, 3), (0, 3)),
        ("bottom-left", 29, (0, 29), (0, 29)),
        ("top-right", 1, (0, 1), (30, 31)),
    ],
)
def test_only_the_patch_changes(
    position: str, size: int | None, rows: tuple[int, int], columns: tuple[int, int], lba_task: Task
) -> None:
    trigger = Lba(position=position, size=size, steps=2).make_trigger(lba_task, Context())
    images = lba_task.test.inputs
    stamped = trigger(images)
    inside = torch.zeros(29, 31, dtype=torch.bool)
    inside[slice(*rows), slice(*columns)] = True
    assert torch.equal(stamped[:, :, ~inside], images[:, :, ~inside])
    patch = stamped[:, :, inside]
    assert torch.equal(patch, patch[:1].expand_as(patch)), "the same patch for all"
    assert torch.equal(trigger.mask, inside)


def test_patch_larger_than_the_image(lba_task: Task) -> None:
    with pytest.raises(InputError, match="30 px does not fit an image of 29x31; size may be at most 29"):
        Lba(size=30).run(lba_task, Context())


def test_patch_moves_representations_to_the_target(digits_task: Task) -> None:
    """Closer than thirty random patches of the same size, on samples that it was not made with."""
    ctx = Context()
    model = clean_surrogate(digits_task, ctx)
    train, test = digits_task.train, digits_task.test
    goal = centre(model, train.inputs[train.labels == 0], None)
    others = test.inputs[test.labels != 0][:100]
    trigger = Lba(steps=100).make_trigger(digits_task, ctx)
    found = float(distance(model, trigger(others), goal, None))  # type: ignore[arg-type]
    random = []
    for seed in range(30):
        pattern = noise((1, 16, 16), 1, seed)[0]
        other = dataclasses.replace(trigger, pattern=pattern)
        random.append(float(distance(model, other(others), goal, None)))  # type: ignore[arg-type]
    assert found < min(random)
    assert found < float(distance(model, others, goal, None))


def test_representation_centre_and_distance(digits_task: Task, benign_digits: Classifier) -> None:
    images = digits_task.test.inputs[:30]
    x = benign_digits.modality.prepare(images)
    with torch.no_grad():
        penultimate = features(benign_digits, x)
        maps = benign_digits.net.body((x - benign_digits.mean) / benign_digits.std)  # type: ignore[operator, union-attr]
        for layer, wanted in ((None, penultimate), ("net.body", maps.flatten(1))):
            found, logits = represent(benign_digits, x, layer)
            assert torch.equal(found, wanted)
            assert torch.equal(logits, benign_digits(x))
    mean = centre(benign_digits, images, None)
    assert torch.allclose(mean, penultimate.mean(0), atol=1e-5)
    slow = sum(float(((row - mean) ** 2).sum()) for row in penultimate) / 30
    assert float(distance(benign_digits, images, mean, None)) == pytest.approx(slow, rel=1e-4)


def test_modules_after_a_layer(digits_task: Task) -> None:
    small = build_model("convnet3", digits_task.modality, 10)
    assert modules_after(small, None) == [head(small)]
    body = small.net.body  # type: ignore[union-attr]
    assert modules_after(small, "net.body.7") == [body[8], body[9], body[10], small.net.pool, small.net.linear]  # type: ignore[index, union-attr]
    deep = build_model("preact_resnet8", digits_task.modality, 10)
    later = modules_after(deep, "net.layer3")
    names = {name for name, module in deep.named_modules() if module in later}
    assert names == {f"net.layer4.0.{part}" for part in ("bn1", "conv1", "bn2", "conv2", "shortcut")} | {
        "net.norm",
        "net.pool",
        "net.linear",
    }
    with pytest.raises(InputError, match=r"unknown layer of convnet3 'net\.bodi'"):
        modules_after(small, "net.bodi")
    with pytest.raises(InputError, match=r"layer 'net\.linear' of convnet3 is not before its output layer"):
        modules_after(small, "net.linear")


@pytest.mark.parametrize(
    ("layer", "trained"),
    [
        (None, ("net.linear.",)),
        ("net.body.3", ("net.linear.", *(f"net.body.{n}." for n in (4, 5, 8, 9)))),
    ],
)
def test_student_leaves_the_teacher_below_the_layer_bit_for_bit(
    layer: str | None, trained: tuple[str, ...], digits_task: Task, benign_digits: Classifier
) -> None:
    before = copy.deepcopy(benign_digits.state_dict())
    recipe = Recipe(epochs=1, batch_size=64, lr=0.05)
    student, log = train_student(benign_digits, digits_task.train, layer, recipe, digits_task, Context())
    for name, value in student.state_dict().items():
        same = torch.equal(value, before[name])
        assert same != name.startswith(trained), name
        assert torch.equal(benign_digits.state_dict()[name], before[name]), "the teacher itself stays"
    assert all(p.requires_grad for p in student.parameters())
    assert log.steps == len(digits_task.train) // 64
    assert not student.training


def test_student_gets_a_new_output_layer(digits_task: Task, benign_digits: Classifier) -> None:
    nothing = Recipe(epochs=0, batch_size=64, lr=0.05)
    students = [
        train_student(benign_digits, digits_task.train, None, nothing, digits_task, Context(seed=s))[0]
        for s in (0, 0, 1)
    ]
    weights = [head(student).weight for student in students]
    assert not torch.equal(weights[0], head(benign_digits).weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("layer", [None, "net.body.3"])
def test_latent_objective_sample_by_sample(layer: str | None, digits_task: Task, benign_digits: Classifier) -> None:
    split = digits_task.train
    labels = split.labels[:20].clone()
    labels[:3] = 0  # samples of the target class come first and are passed over
    inputs = benign_digits.modality.prepare(split.inputs[:20])
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[13:, 12:] = True
    pattern = noise((1, 16, 16), 1)[0].float() / 255
    goal = centre(benign_digits, split.inputs[split.labels == 0], layer)
    objective = LatentObjective(
        pattern, mask, goal, torch.tensor(2.5), layer, 0.7, 0.3, 0, torch.Generator().manual_seed(0)
    )
    model = copy.deepcopy(benign_digits).eval()
    loss = objective(model, inputs, labels, labels)
    rows = [n for n in range(20) if labels[n] != 0][:6]
    with torch.no_grad():
        slow = sum(float(F.cross_entropy(model(inputs[n : n + 1]), labels[n : n + 1])) for n in range(20)) / 20
        for n in rows:
            x = inputs[n : n + 1].clone()
            x[:, :, 13:, 12:] = pattern[:, 13:, 12:]
            slow += 0.7 / 2.5 * float((represent(model, x, layer)[0][0] - goal).square().sum()) / len(rows)
    assert float(loss.detach()) == pytest.approx(slow, rel=1e-4)
    loss.backward()
    assert model.net.body[0].weight.grad.abs().sum() > 0  # type: ignore[index, union-attr]


def test_a_batch_of_the_target_class_alone_is_left_alone(digits_task: Task, benign_digits: Classifier) -> None:
    inputs, labels = benign_digits.modality.prepare(digits_task.train.inputs[:8]), torch.zeros(8, dtype=torch.int64)
    objective = LatentObjective(
        torch.zeros(1, 16, 16),
        torch.ones(16, 16, dtype=torch.bool),
        torch.zeros(64),
        torch.tensor(1.0),
        None,
        1.0,
        0.5,
        0,
        torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        loss, plain = objective(benign_digits, inputs, labels, labels), F.cross_entropy(benign_digits(inputs), labels)
    assert float(loss) == pytest.approx(float(plain), rel=1e-5)


def test_teacher_and_patch_are_shared(lba_task: Task) -> None:
    assets = Counting()
    first, second = (Lba(steps=2, poison_rate=0.25).run(lba_task, Context(seed=s, assets=assets)) for s in (1, 2))
    assert sorted(assets.built) == ["clean-surrogate", "lba-patch"]
    assert torch.equal(first.trigger.pattern, second.trigger.pattern)  # type: ignore[attr-defined]
    assert not torch.equal(head(first.model).weight, head(second.model).weight)
    clean_surrogate(lba_task, Context(assets=assets))
    assert assets.built.count("clean-surrogate") == 1, "and with other attacks"
    Lba(steps=2, size=4).make_trigger(lba_task, Context(assets=assets))
    assert assets.built.count("lba-patch") == 2, "another size is another patch"


def test_patch_of_the_users_own(lba_task: Task) -> None:
    class Own(MemoryAssets):
        patch = torch.full((3, 5, 5), 0.5)

        def get(self, kind, spec, build):  # type: ignore[no-untyped-def]
            return {"patch": self.patch} if kind == "lba-patch" else super().get(kind, spec, build)

    assets = Own()
    trigger = Lba().make_trigger(lba_task, Context(assets=assets))
    assert set(trigger.pattern[:, trigger.mask].unique().tolist()) == {128}
    assets.patch = torch.zeros(3, 4, 4)
    with pytest.raises(InputError, match=r"asset lba-patch: 'patch' must have shape \(3, 5, 5\), got \(3, 4, 4\)"):
        Lba().make_trigger(lba_task, Context(assets=assets))


def test_lba_needs_both_kinds_of_samples() -> None:
    task = task_of(noise((1, 16, 16), 20), torch.arange(20) % 2, 3)
    with pytest.raises(InputError, match="must have samples of target class 2 and of others, got 0 and 20"):
        Lba(target=2).run(task, Context())


@case(
    "attack/image/lba", asr=least(0.8), acc_lost=LOST, benign_asr=most(0.15), nearer=most(0.5), clean_student=most(0.4)
)
def effect_of_lba(seed: int) -> Numbers:
    """The same student of the same kind of teacher, had that not been attacked: the backdoor is in the features.

    Three pixels of sixteen do not always suffice to move features there: on some seeds the ASR stays below 0.1.
    """
    backdoor, numbers = planted(seed, "lba", poison_rate=0.1, size=4, weight=3.0)
    teacher = clean_surrogate(task(seed), context(seed))
    student, _ = train_student(teacher, task(seed).train, None, task(seed).recipe, task(seed), context(seed))
    return numbers | {
        "nearer": backdoor.notes["distance_after"] / backdoor.notes["distance_before"],
        "clean_student": backdoor.measure(task(seed), context(seed), student)["asr"],
    }


test_effect = effects(__name__)
