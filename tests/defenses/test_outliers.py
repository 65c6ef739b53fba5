"""Which classes stand out among the others, and which of these their clean samples excuse."""

from __future__ import annotations

import math
from math import comb

import pytest
import torch

from backdoorlab.core.errors import InputError
from backdoorlab.data.split import Split
from backdoorlab.defenses.common.classes import gated, need_samples, rows_per_class
from backdoorlab.defenses.common.outliers import Evidence, clean_odds, deviations


def test_median_absolute_deviation_by_hand() -> None:
    """Median 3, distances 2 1 0 1 97, their median 1."""
    found = deviations(torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0]))
    assert found.tolist() == pytest.approx([x / 1.4826 for x in (-2, -1, 0, 1, 97)])


def test_the_median_of_an_even_number_is_the_mean_of_the_middle_two() -> None:
    """Median 3.5, distances 2.5 1.5 0.5 0.5 1.5 96.5, their median 1.5."""
    found = deviations(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 100.0]))
    assert float(found[5]) == pytest.approx(96.5 / (1.4826 * 1.5))


def test_classes_that_were_not_judged_do_not_count() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 100.0]
    found = deviations(torch.tensor([math.nan, *values]))
    assert float(found[0]) == 0
    assert torch.equal(found[1:], deviations(torch.tensor(values)))
    assert not deviations(torch.tensor([1.0, 2.0, 3.0, 100.0, math.nan])).any(), (
        "four values have no spread to speak of"
    )


def test_the_floor_keeps_equal_values_from_making_anything_an_outlier() -> None:
    values = torch.tensor([0.0, 0.0, 0.0, 0.0, 2.0])
    assert float(deviations(values, floor=1.0)[4]) == 2


def test_odds_are_those_of_fishers_exact_test() -> None:
    """All ways to draw the 12 that were found among 30 samples, 10 of them clean, with at most 1 clean one."""
    wanted = sum(comb(10, i) * comb(20, 12 - i) for i in (0, 1)) / comb(30, 12)
    assert clean_odds(11, 20, 1, 10) == pytest.approx(wanted)
    assert clean_odds(0, 20, 0, 10) == 1
    assert clean_odds(5, 20, 0, 0) == 1


def evidence(*found: tuple[float, int, int]) -> Evidence:
    """Classes of 100 suspicious and 20 clean samples: (value, found, clean found)."""
    made = Evidence.none(len(found))
    for k, (value, hits, clean_hits) in enumerate(found):
        made.put(k, value, torch.arange(100) < hits, torch.arange(20) < clean_hits)
    return made


QUIET = [(1.0, 5, 1), (1.1, 5, 1), (0.9, 5, 1), (1.2, 5, 1), (0.8, 5, 1)]


def test_a_class_is_suspected_unless_its_clean_samples_excuse_it() -> None:
    assert evidence(*QUIET, (9.0, 40, 0)).suspects(7.4, 0.05) == (5,)
    assert evidence(*QUIET, (9.0, 40, 8)).suspects(7.4, 0.05) == ()
    assert evidence(*QUIET, (9.0, 40, 8)).suspects(7.4, 1.0) == (5,), "a level of 1 asks no clean sample"
    assert evidence(*QUIET, (1.2, 40, 0)).suspects(7.4, 0.05) == (), "no outlier"
    assert evidence(*QUIET, (-9.0, 40, 0)).suspects(7.4, 0.05) == (), "an outlier on the other side"


def test_few_clean_samples_accuse_if_none_of_them_is_found() -> None:
    made = Evidence.none(6)
    for k in range(6):
        made.put(k, 9.0 if k == 5 else 1 + k / 10, torch.arange(100) < 10, torch.zeros(3, dtype=torch.bool))
    assert float(made.odds[5]) > 0.05
    assert made.suspects(7.4, 0.05) == (5,)


def test_among_few_classes_the_clean_samples_decide_alone() -> None:
    assert evidence((1.0, 50, 10), (1.0, 50, 0)).suspects(7.4, 0.05) == (1,)
    assert evidence((1.0, 50, 10), (9.0, 50, 9)).suspects(7.4, 0.05) == ()
    assert evidence((1.0, 50, 10), (9.0, 50, 0)).suspects(7.4, 1.0) == (), "nothing is left that could decide"
    assert 0.99 < evidence((1.0, 50, 10), (1.0, 50, 0)).score <= 1


def test_margins_of_other_classes_lie_below_those_of_suspected_ones_in_their_order() -> None:
    margins, labels = torch.tensor([2.0, -1.0, 3.0, -4.0]), torch.tensor([0, 0, 1, 1])
    assert gated(margins, labels, (1,)).tolist() == [-4, -7, 3, -4]
    assert gated(margins, labels, ()).tolist() == [-1, -4, 0, -7]
    assert gated(margins, labels, (0, 1)).tolist() == margins.tolist()
    assert gated(margins, labels, (0,)).tolist() == [2, -1, -1, -8]


def test_rows_of_each_class_in_their_order() -> None:
    rows = rows_per_class(torch.tensor([2, 0, 2, 0]), 4)
    assert [part.tolist() for part in rows] == [[1, 3], [], [0, 2], []]


def test_too_few_samples_are_named() -> None:
    split = Split(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]), ("a", "b"))
    need_samples("scan", "clean", split, 2)
    with pytest.raises(InputError, match="scan needs at least 3 clean samples, got 2"):
        need_samples("scan", "clean", split, 3)
