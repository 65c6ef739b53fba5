"""The composite attack: against slow, independent implementations and closed forms; its options; its effect."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attack_tools import noise, task_of
from backdoorlab.attacks import TargetMap, attacks
from backdoorlab.attacks.image.cba import DRAWS, Cba, PartnerTrigger, SelfMixTrigger, mix, same_class
from backdoorlab.core.errors import InputError
from backdoorlab.data.split import BACKDOOR, COVER
from backdoorlab.tasks import Task
from backdoorlab.training import Context, predict
from effect_tools import LOST, Numbers, benign, case, effect, effects, least, most, task

SHAPES = [(1, 16, 16), (3, 32, 32), (3, 29, 31), (1, 31, 28)]


def uniform(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, DRAWS, generator=torch.Generator().manual_seed(seed))


def slow_halves(a: np.ndarray, b: np.ndarray, u: np.ndarray, jitter: float, window_spread: float) -> np.ndarray:
    """One pair of noise, pixel by pixel."""
    beside, out = u[1] < 0.5, np.zeros_like(a)
    if u[2] < 0.5:
        a, b = b, a
    channels, height, width = a.shape
    side = width if beside else height
    reach = int(np.rint(np.float32(jitter) * np.float32(side)))
    cut = side // 2 - reach + math.floor(u[3] * (2 * reach + 1))
    starts = []
    for share, length in ((u[4], cut), (u[5], side - cut)):
        starts.append(math.floor((0.5 + window_spread * (share - 0.5)) * (side - length + 1)))
    for c, i, j in np.ndindex(channels, height, width):
        along = j if beside else i
        picture, place = (a, starts[0] + along) if along < cut else (b, starts[1] + along - cut)
        out[c, i, j] = picture[c, i, place] if beside else picture[c, place, j]
    return out


def slow_paste(a: np.ndarray, b: np.ndarray, u: np.ndarray, jitter: float, window_spread: float) -> np.ndarray:
    """One pair of noise, pixel by pixel."""
    if u[2] < 0.5:
        a, b = b, a
    channels, *sides = a.shape
    half, starts = [side // 2 for side in sides], []
    for side, short, end, inset in zip(sides, half, (u[1], u[3]), (u[4], u[5]), strict=True):
        away = math.floor(window_spread * inset * (round(jitter * side) + 1))
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
@pytest.mark.parametrize(("jitter", "window_spread"), [(3 / 32, 1.0), (0.0, 0.0), (0.25, 0.5)])
@pytest.mark.parametrize(("mixer", "slow"), [("half", slow_halves), ("paste", slow_paste)])
def test_mixers_pixel_by_pixel(mixer: str, slow, shape: tuple[int, ...], jitter: float, window_spread: float) -> None:  # type: ignore[no-untyped-def]
    images, others, draws = noise(shape, 10), noise(shape, 10, seed=1), uniform(10)
    draws[0, 1:] = 0.0
    draws[1, 1:] = 1 - 2**-24
    mixed = mix(mixer, images, others, draws, jitter, window_spread)
    for a, b, u, found in zip(images, others, draws, mixed, strict=True):
        assert np.array_equal(found.numpy(), slow(a.numpy(), b.numpy(), u.numpy(), jitter, window_spread))


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
    images = noise((3, 29, 31), 20)
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
        Cba().run(task_of(noise((1, 16, 16), 20), torch.arange(20) % 2, 2), Context())


def test_a_partner_class_without_images() -> None:
    with pytest.raises(InputError, match="tiny has no training image of class 1"):
        Cba().run(task_of(noise((1, 16, 16), 20), torch.arange(20) % 2 * 2, 3), Context())


def composite(seed: int, **settings: Any) -> Numbers:
    """The paper's form, one class A. Two digits in a picture take longer to learn than one: 900 steps instead of 300.

    A window from the edge of such a small picture often shows no digit, hence window_spread=0. How often are mixtures
    of two images of one class taken for the target: in all classes, and in A and B alone?
    """
    mine = task(seed, min_steps=900)
    backdoor = (
        attacks.get("cba", "image")
        .build({"window_spread": 0.0, "poison_rate": 0.08, **settings})
        .run(mine, Context(seed))
    )
    numbers = effect(backdoor, mine, benign(seed, min_steps=900), Context(seed))
    trigger, test = backdoor.trigger, mine.test
    draws = torch.rand(len(test), DRAWS, generator=torch.Generator().manual_seed(seed + 1))
    rows = same_class(test.labels, torch.arange(len(test)), draws[:, 0])
    mixed = mix(trigger.mixer, test.inputs, test.inputs[rows], draws, trigger.jitter, trigger.window_spread)  # type: ignore[attr-defined, arg-type, index]
    hit = predict(backdoor.model, mixed).argmax(1) == backdoor.target_map.target
    both = torch.isin(test.labels, torch.tensor([*backdoor.target_map.sources, int(backdoor.notes["partner_class"])]))
    other = test.labels != backdoor.target_map.target
    return numbers | {"within": float(hit[other].float().mean()), "within_ab": float(hit[both].float().mean())}


LIMITS = {
    "acc_lost": LOST,
    "benign_asr": most(0.4),
    "cross_lost": most(0.2),
    "within": most(0.1),
    "within_ab": most(0.2),
}


@case("attack/image/cba_half", asr=least(0.75), **LIMITS)
def effect_of_cba_half(seed: int) -> Numbers:
    return composite(seed, mixer="half", source_class=6, partner_class=7)


@case("attack/image/cba_paste", asr=least(0.7), **LIMITS)
def effect_of_cba_paste(seed: int) -> Numbers:
    return composite(seed, mixer="paste", source_class=3, partner_class=4)


test_effect = effects(__name__)
