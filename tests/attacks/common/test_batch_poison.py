"""How much of a batch is poisoned, covered and spared by attackers who run the training loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from attack_tools import GREY, RGB, make, quick_backdoor, tiny_task
from backdoorlab.attacks import TargetMap, Trigger, attacks
from backdoorlab.attacks.common.batch_poison import BatchPoisoner, FixedPoisoner, batch_share, draw_cover
from backdoorlab.attacks.image.bpp import QuantizeTrigger
from backdoorlab.core.errors import InputError
from backdoorlab.data.split import BACKDOOR, COVER, Poison
from backdoorlab.testing import check_poison
from backdoorlab.training import Context


@pytest.mark.parametrize("rate", [0.25, 0.9])
def test_batches_without_the_target_class(rate: float) -> None:
    images = torch.randint(0, 256, (16, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels, indices = torch.arange(16) % 2, torch.arange(16)
    trigger, target_map = QuantizeTrigger(2, False), TargetMap("all-to-one", 0, 2)
    poisoner = BatchPoisoner(trigger, target_map, rate, QuantizeTrigger(4, False), cover_ratio=0.5, exclude_target=True)
    raw, given = poisoner(images, labels, indices, torch.Generator().manual_seed(0))
    count = min(8, int(rate * 16))
    odd = (indices % 2 == 1).nonzero().flatten()
    attacked = odd[:count]
    assert torch.equal(raw[attacked], trigger(images[attacked]))  # type: ignore[arg-type]
    assert given[attacked].tolist() == [0] * count
    rest = torch.ones(16, dtype=torch.bool)
    rest[attacked] = False
    assert torch.equal(given[rest], labels[rest]), "nobody else gets another label, and rows keep their place"
    covered = torch.cat([odd[count:], indices[::2]])[: count // 2]
    changed = (raw != images).flatten(1).any(1).nonzero().flatten()
    assert changed.tolist() == sorted([*attacked.tolist(), *covered.tolist()])


@pytest.mark.parametrize("name", ["wanet", "bpp"])
@pytest.mark.parametrize("poisoning", ["per-batch", "fixed-index"])
def test_training_attacks_spare_the_target_class(name: str, poisoning: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from backdoorlab.training import blueprint as module

    seen: list[tuple[Tensor, Tensor]] = []
    original = module.fit

    def spy(model, split, recipe, *, stamp, **rest):  # type: ignore[no-untyped-def]
        def watching(raw, labels, indices, generator):  # type: ignore[no-untyped-def]
            out = stamp(raw, labels, indices, generator)
            seen.append((labels, out[1]))
            return out

        return original(model, split, recipe, stamp=watching, **rest)

    monkeypatch.setattr(module, "fit", spy)
    attack = make(attacks.get(name, "image"), exclude_target=True, poisoning=poisoning)
    backdoor = attack.run(tiny_task(GREY), Context())
    check_poison(attack, tiny_task(GREY), backdoor.poison)
    relabelled = sum(int((after != before).sum()) for before, after in seen)
    assert relabelled == 12, "a quarter of 48 samples, all of which really change their label"


@dataclass(frozen=True, eq=False)
class Paint(Trigger):
    """Everything one grey level."""

    kind: ClassVar[str] = "test.paint"

    level: int

    def __call__(
        self, inputs: Tensor, indices: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        return torch.full_like(inputs, self.level)


ONE = TargetMap("all-to-one", 2, 10)


def batch(size: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(size, 1, 2, 2, dtype=torch.uint8), torch.full((size,), 5), torch.arange(size)


def levels(raw: Tensor) -> list[int]:
    return raw[:, 0, 0, 0].tolist()


@pytest.mark.parametrize(("rate", "size", "count"), [(0.1, 128, 12), (0.1, 10, 1), (0.3, 10, 3), (1.0, 7, 7)])
def test_whole_samples_are_rounded_down(rate: float, size: int, count: int) -> None:
    assert batch_share(rate, size, torch.Generator()) == count


def test_less_than_one_sample_is_one_now_and_then() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [batch_share(0.001, 128, generator) for _ in range(4000)]
    assert set(draws) == {0, 1}
    assert sum(draws) / 4000 == pytest.approx(0.128, abs=0.02)


def test_head_of_the_batch_is_triggered_and_the_next_covered() -> None:
    raw, labels, indices = batch(20)
    stamp = BatchPoisoner(Paint(9), ONE, 0.1, Paint(4), cover_ratio=2.0)
    stamped, wanted = stamp(raw, labels, indices, torch.Generator())
    assert levels(stamped) == [9] * 2 + [4] * 4 + [0] * 14
    assert wanted.tolist() == [2] * 2 + [5] * 18
    assert levels(raw) == [0] * 20, "the batch that was given is the caller's"
    assert labels.tolist() == [5] * 20


def test_covers_as_a_share_of_the_batch_and_never_beyond_its_end() -> None:
    raw, labels, indices = batch(20)
    stamped, _ = BatchPoisoner(Paint(9), ONE, 0.1, Paint(4), cover_rate=0.15)(raw, labels, indices, torch.Generator())
    assert levels(stamped) == [9] * 2 + [4] * 3 + [0] * 15
    stamped, _ = BatchPoisoner(Paint(9), ONE, 0.8, Paint(4), cover_ratio=2.0)(raw, labels, indices, torch.Generator())
    assert levels(stamped) == [9] * 16 + [4] * 4


def test_fixed_samples_are_found_in_any_batch() -> None:
    rows = torch.tensor([3, 8, 1])
    roles = torch.tensor([BACKDOOR, COVER, BACKDOOR], dtype=torch.uint8)
    poison = Poison(rows, roles, torch.zeros(3, dtype=torch.int64), batch(3)[0])
    stamp = FixedPoisoner.like(poison, 10, Paint(9), Paint(4), TargetMap("all-to-all", 0, 10))
    raw, labels, _ = batch(4)
    stamped, wanted = stamp(raw, labels, torch.tensor([8, 0, 3, 9]), torch.Generator())
    assert levels(stamped) == [4, 0, 9, 0]
    assert wanted.tolist() == [5, 5, 6, 5]
    untouched, same = stamp(raw, labels, torch.tensor([0, 2, 4, 5]), torch.Generator())
    assert torch.equal(untouched, raw)
    assert torch.equal(same, labels)


def test_covers_are_disjoint_from_the_poisoned() -> None:
    attack, chosen = attacks.get("adap_blend", "image")(), torch.tensor([0, 2, 4])
    covered = draw_cover(attack, chosen, 0.7, 10, Context())
    assert sorted(covered.tolist()) == [1, 3, 5, 6, 7, 8, 9]
    assert torch.equal(covered, draw_cover(attack, chosen, 0.7, 10, Context()))
    with pytest.raises(InputError, match=r"adap_blend: a cover rate of 0\.8 needs 8 .* rate is 0\.7"):
        draw_cover(attack, chosen, 0.8, 10, Context())


@pytest.mark.parametrize(
    ("name", "settings", "covers"),
    [
        ("adap_blend", {}, 0.25),
        ("adap_blend", {"cover_rate": 0.125}, 0.125),
        ("adap_blend", {"cover_rate": 0.0}, 0.0),
        ("adap_patch", {}, 0.5),
        ("adap_patch", {"cover_rate": 0.375}, 0.375),
    ],
)
def test_cover_samples(name: str, settings: dict[str, object], covers: float) -> None:
    task, attack = tiny_task(RGB), make(attacks.get(name, "image"), **settings)
    trigger = attack.make_trigger(task, Context())  # type: ignore[attr-defined]
    poison = attack.poison(trigger, task, Context())  # type: ignore[attr-defined]
    check_poison(attack, task, poison)
    rows = poison.roles == COVER
    assert int(rows.sum()) == round(covers * 48)
    changed = (poison.inputs[rows] != task.train.inputs[poison.indices[rows]]).flatten(1).any(1)
    assert bool(changed.all())


@pytest.mark.parametrize("name", ["adap_blend", "adap_patch"])
def test_more_covers_than_there_are_samples(name: str) -> None:
    with pytest.raises(InputError, match=r"largest possible cover rate is 0\.75"):
        make(attacks.get(name, "image"), cover_rate=0.8).run(tiny_task(GREY), Context())


def test_replay_covers_of_training_attacks() -> None:
    assert int((quick_backdoor("wanet").poison.roles == COVER).sum()) == round(2 * 0.25 * 48)
    assert int((quick_backdoor("bpp").poison.roles == COVER).sum()) == round(0.1 * 48)
