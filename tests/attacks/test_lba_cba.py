"""Pieces of the latent and the composite backdoor against slow, independent implementations and closed forms."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from backdoorlab.attacks import TargetMap, attacks
from backdoorlab.attacks.common.surrogate import clean_surrogate
from backdoorlab.attacks.image.cba import DRAWS, Cba, PartnerTrigger, SelfMixTrigger, mix, same_class
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
from backdoorlab.data.sources import DatasetSpec
from backdoorlab.data.split import BACKDOOR, COVER, Dataset, Split
from backdoorlab.modalities.base import modality_of
from backdoorlab.models import Classifier
from backdoorlab.models.anatomy import features, head
from backdoorlab.models.classifier import build_model
from backdoorlab.tasks import Task, TaskSpec
from backdoorlab.training import Context, Recipe
from backdoorlab.training.context import MemoryAssets

FACTS = {
    # name: (year, threat model, labels, visibility, sample specific, surrogate)
    "lba": (2019, "training", "dirty", "visible", False, True),
    "cba": (2020, "poisoning", "dirty", "visible", True, False),
}
SHAPES = [(1, 16, 16), (3, 32, 32), (3, 29, 31), (1, 31, 28)]


@pytest.mark.parametrize("name", FACTS)
def test_facts(name: str) -> None:
    facts = attacks.get(name, "image").facts()
    keys = ("year", "threat_model", "label_mode", "trigger_visibility", "sample_specific", "needs_surrogate")
    assert tuple(facts[key] for key in keys) == FACTS[name]


def pictures(shape: tuple[int, ...], count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def uniform(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, DRAWS, generator=torch.Generator().manual_seed(seed))


def task_of(images: Tensor, labels: Tensor, classes: int = 4) -> Task:
    """A task of given pictures; one epoch of a small network."""
    split = Split(images, labels, tuple("abcdef"[:classes]))
    data = Dataset("tiny", "image", split, split)
    spec = TaskSpec(dataset=DatasetSpec(name="tiny"), model="convnet3", recipe="smoke")
    return Task(spec, data, modality_of(data), Recipe(epochs=1, batch_size=16, lr=0.05))


# --- CBA: mixers ------------------------------------------------------------------------------------------------------


def slow_halves(a: np.ndarray, b: np.ndarray, u: np.ndarray, jitter: float, shake: float) -> np.ndarray:
    """One pair of pictures, pixel by pixel."""
    beside, out = u[1] < 0.5, np.zeros_like(a)
    if u[2] < 0.5:
        a, b = b, a
    channels, height, width = a.shape
    side = width if beside else height
    reach = int(np.rint(np.float32(jitter) * np.float32(side)))
    cut = side // 2 - reach + math.floor(u[3] * (2 * reach + 1))
    starts = []
    for share, length in ((u[4], cut), (u[5], side - cut)):
        starts.append(math.floor((0.5 + shake * (share - 0.5)) * (side - length + 1)))
    for c, i, j in np.ndindex(channels, height, width):
        along = j if beside else i
        picture, place = (a, starts[0] + along) if along < cut else (b, starts[1] + along - cut)
        out[c, i, j] = picture[c, i, place] if beside else picture[c, place, j]
    return out


def slow_paste(a: np.ndarray, b: np.ndarray, u: np.ndarray, jitter: float, shake: float) -> np.ndarray:
    """One pair of pictures, pixel by pixel."""
    if u[2] < 0.5:
        a, b = b, a
    channels, *sides = a.shape
    half, starts = [side // 2 for side in sides], []
    for side, short, end, inset in zip(sides, half, (u[1], u[3]), (u[4], u[5]), strict=True):
        away = math.floor(shake * inset * (round(jitter * side) + 1))
        starts.append(away if end < 0.5 else side - short - away)
    out = a.copy()
    for c, i, j in np.ndindex(channels, *half):
        rows, columns = (
            slice(math.floor(k * side / short), math.ceil((k + 1) * side / short))
            for k, side, short in zip((i, j), sides, half, strict=True)
        )
        out[c, starts[0] + i, starts[1] + j] = np.rint(b[c, rows, columns].astype(np.float64).mean())
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("jitter", "shake"), [(3 / 32, 1.0), (0.0, 0.0), (0.25, 0.5)])
@pytest.mark.parametrize(("mixer", "slow"), [("half", slow_halves), ("paste", slow_paste)])
def test_mixers_pixel_by_pixel(mixer: str, slow, shape: tuple[int, ...], jitter: float, shake: float) -> None:  # type: ignore[no-untyped-def]
    images, others, draws = pictures(shape, 10), pictures(shape, 10, seed=1), uniform(10)
    draws[0, 1:] = 0.0
    draws[1, 1:] = 1 - 2**-24
    mixed = mix(mixer, images, others, draws, jitter, shake)
    for a, b, u, found in zip(images, others, draws, mixed, strict=True):
        assert np.array_equal(found.numpy(), slow(a.numpy(), b.numpy(), u.numpy(), jitter, shake))


@pytest.mark.parametrize(("mixer", "least"), [("half", 0.4), ("paste", 0.24)])
def test_mixtures_show_both_pictures(mixer: str, least: float) -> None:
    black, white = torch.zeros(400, 3, 32, 32, dtype=torch.uint8), torch.full((400, 3, 32, 32), 255, dtype=torch.uint8)
    share = (mix(mixer, black, white, uniform(400), 3 / 32, 1.0) == 255).float().mean((1, 2, 3))
    assert least <= float(share.min())
    assert float(share.max()) <= 1 - least
    assert float(share.mean()) == pytest.approx(0.5, abs=0.03), "neither comes first more often"


def test_same_class() -> None:
    labels = torch.tensor([2, 0, 2, 1, 2, 0, 2, 3])
    rows = torch.tensor([0, 2, 4, 6, 1, 5, 3, 7]).repeat(200)
    share = torch.rand(len(rows), generator=torch.Generator().manual_seed(0))
    found = same_class(labels, rows, share)
    assert torch.equal(labels[found], labels[rows])
    alone = (labels[rows] == 1) | (labels[rows] == 3)
    assert torch.equal(found == rows, alone)
    for row, others in ((0, {2, 4, 6}), (4, {0, 2, 6}), (1, {5})):
        assert set(found[rows == row].tolist()) == others


# --- CBA: the poisoned set --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def levels_task() -> Task:
    """Picture i is uniformly grey at level i, so that a mixture tells what it was made of; labels i mod 4."""
    levels = torch.arange(96, dtype=torch.uint8)
    return task_of(levels[:, None, None, None].expand(96, 1, 16, 16).contiguous(), torch.arange(96) % 4)


@pytest.mark.parametrize("mixer", ["half", "paste"])
@pytest.mark.parametrize(
    ("settings", "sources", "partner"),
    [
        ({}, {2, 3}, 1),
        ({"source_class": 3}, {3}, 1),
        ({"source_class": 1, "partner_class": 3}, {1}, 3),
        ({"target": 3}, {1, 2}, 0),
        ({"partner_class": 2, "bank": 5}, {1, 3}, 2),
    ],
)
def test_what_mixtures_are_made_of(
    mixer: str, settings: dict[str, object], sources: set[int], partner: int, levels_task: Task
) -> None:
    attack, ctx, labels = Cba.build({"poison_rate": 0.125, "mixer": mixer, **settings}), Context(), torch.arange(96) % 4
    trigger = attack.make_trigger(levels_task, ctx)
    poison = attack.poison(trigger, levels_task, ctx)
    bank = set(trigger.bank[:, 0, 0, 0].tolist())
    assert len(bank) == min(attack.bank, 12)
    assert {n % 4 for n in bank} == {partner}
    assert int((poison.roles == BACKDOOR).sum()) == 12
    assert int((poison.roles == COVER).sum()) == 42, "half of the rest"
    used = set()
    for row, role, label, image in zip(poison.indices, poison.roles, poison.labels, poison.inputs, strict=True):
        shown = set(image.unique().tolist())
        assert int(row) in shown
        assert len(shown) == 2
        (other,) = shown - {int(row)}
        used.add(int(labels[row]))
        if role == BACKDOOR:
            assert label == attack.target
            assert int(labels[row]) in sources
            assert other % 4 == partner
            assert other not in bank, "images for test time are kept apart"
        else:
            assert label == labels[row] == labels[other]
    assert used == {0, 1, 2, 3}, "mixed samples are of all classes"
    shown = trigger(levels_task.test.inputs)
    assert all(set(image.unique().tolist()) - {n} <= bank for n, image in enumerate(shown))


def test_cover_rate_of_cba(levels_task: Task) -> None:
    for rate, count in ((0.0, 0), (0.25, 24)):
        attack = Cba(poison_rate=0.125, cover_rate=rate)
        poison = attack.poison(attack.make_trigger(levels_task, Context()), levels_task, Context())
        assert int((poison.roles == COVER).sum()) == count
    with pytest.raises(InputError, match=r"largest possible cover rate is 0\.875"):
        Cba(poison_rate=0.125, cover_rate=0.9).run(levels_task, Context())


def test_which_samples_count(levels_task: Task) -> None:
    labels = torch.arange(8) % 4
    every, one = (Cba.build(s).target_map_for(levels_task) for s in ({}, {"source_class": 2}))
    assert every.eligible(labels).tolist() == [False, False, True, True] * 2
    assert one.eligible(labels).tolist() == [False, False, True, False] * 2
    assert torch.equal(one(labels), torch.zeros(8, dtype=torch.int64))
    assert TargetMap(**json.loads(json.dumps(dataclasses.asdict(one)))) == one
    old = TargetMap(mode="all-to-one", target=0, num_classes=4)  # as records of earlier runs have it
    assert old.eligible(labels).tolist() == [False, True, True, True] * 2
    assert TargetMap("all-to-all", 0, 4, (1,)).eligible(labels).tolist() == [False, True, False, False] * 2


def test_backdoor_keeps_its_sources(levels_task: Task) -> None:
    backdoor = Cba(poison_rate=0.125, source_class=3, partner_class=2).run(levels_task, Context())
    inputs, wanted, true = backdoor.triggered_test(levels_task)
    assert len(inputs) == len(wanted) == 24
    assert (true == 3).all()
    assert backdoor.notes["partner_class"] == 2
    assert backdoor.notes["source_classes"] == [3]
    tensors, record = backdoor.state()
    restored = type(backdoor).from_state(tensors, json.loads(json.dumps(record)))
    assert restored.target_map == backdoor.target_map
    assert restored.measure(levels_task, Context()) == backdoor.measure(levels_task, Context())
    assert "cross_acc" in restored.measure(levels_task, Context())


@pytest.mark.parametrize("mixer", ["half", "paste"])
def test_an_image_mixed_with_itself_shows_nothing_else(mixer: str, levels_task: Task) -> None:
    cross = SelfMixTrigger(mixer, 3 / 32, 1.0, 7)
    assert torch.equal(cross(levels_task.test.inputs), levels_task.test.inputs)
    images = pictures((3, 29, 31), 20)
    mixed = cross(images)
    assert (mixed != images).flatten(1).any(1).all()
    if mixer == "half":
        for image, found in zip(images, mixed, strict=True):
            assert set(found.unique().tolist()) <= set(image.unique().tolist())
    rows = torch.tensor([4, 17, 2])
    assert torch.equal(cross(images[rows], rows), mixed[rows])


def test_partners_follow_the_index() -> None:
    bank = torch.arange(50, dtype=torch.uint8)[:, None, None, None].expand(50, 1, 16, 16).contiguous() + 100
    trigger = PartnerTrigger(bank, "half", 3 / 32, 1.0, 3)
    black = torch.zeros(500, 1, 16, 16, dtype=torch.uint8)
    chosen = trigger(black).flatten(1).amax(1)
    assert len(chosen.unique()) == 50, "every partner is used"
    assert torch.equal(trigger(black[:9], torch.arange(200, 209)), trigger(black)[200:209])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"partner_class": 0}, "partner_class must be one of the classes 0 to 3 other than the target 0, got 0"),
        ({"partner_class": 4}, "partner_class must be one of the classes 0 to 3"),
        ({"source_class": 0}, "source_class must be one of the 4 classes other than target"),
        ({"source_class": 1}, "source_class must be one of the 4 classes other than target"),
        ({"source_class": 9}, r"target \(0\) and partner, got 9"),
        ({"source_class": 2, "poison_rate": 0.3}, r"largest possible rate is 0\.25"),
    ],
)
def test_classes_that_do_not_fit(settings: dict[str, object], message: str, levels_task: Task) -> None:
    with pytest.raises(InputError, match=message):
        Cba.build(settings).run(levels_task, Context())


def test_two_classes_leave_nothing_to_mix() -> None:
    with pytest.raises(InputError, match="no class is left to be mixed with class 1"):
        Cba().run(task_of(pictures((1, 16, 16), 20), torch.arange(20) % 2, 2), Context())


def test_a_partner_class_without_images() -> None:
    with pytest.raises(InputError, match="tiny has no training image of class 1"):
        Cba().run(task_of(pictures((1, 16, 16), 20), torch.arange(20) % 2 * 2, 3), Context())


# --- LBA --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lba_task() -> Task:
    return task_of(pictures((3, 29, 31), 48), torch.arange(48) % 4)


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
        pattern = pictures((1, 16, 16), 1, seed)[0]
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
    pattern = pictures((1, 16, 16), 1)[0].float() / 255
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


class Counting(MemoryAssets):
    """Notes what is really built."""

    def __init__(self) -> None:
        super().__init__()
        self.built: list[str] = []

    def get(self, kind, spec, build):  # type: ignore[no-untyped-def]
        def watched():  # type: ignore[no-untyped-def]
            self.built.append(kind)
            return build()

        return super().get(kind, spec, watched)


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
    task = task_of(pictures((1, 16, 16), 20), torch.arange(20) % 2, 3)
    with pytest.raises(InputError, match="must have samples of target class 2 and of others, got 0 and 20"):
        Lba(target=2).run(task, Context())
