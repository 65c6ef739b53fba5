"""How much of a batch is poisoned by attackers who run the training loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from backdoorlab.attacks import TargetMap, Trigger, attacks
from backdoorlab.attacks.common.batch_poison import BatchPoisoner, FixedPoisoner, batch_share, draw_cover
from backdoorlab.core.errors import InputError
from backdoorlab.data.split import BACKDOOR, COVER, Poison
from backdoorlab.training import Context


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
