"""The published table: read whole, by our names, and put beside our runs."""

from __future__ import annotations

from typing import Any

import pytest

from backdoorlab.attacks import attacks
from backdoorlab.benchmark.published import beside, published
from backdoorlab.defenses import defenses


def row(**changes: Any) -> dict[str, Any]:
    return {
        "status": "ok",
        "dataset": "cifar10",
        "model": "preact_resnet18",
        "recipe": "reference",
        "attack": "badnets",
        "poison_rate": 0.1,
        "defense": "none",
        "acc": 0.9,
        "asr": 0.96,
        "ra": 0.03,
    } | changes


def test_the_table_is_whole_and_of_shares() -> None:
    table = published()
    assert len(table) == 10_214
    assert all(0 <= value <= 1 for run in table.values() for value in (run.acc, run.asr, run.ra))
    badnets = table["cifar10", "preact_resnet18", "badnets", 0.1, "none"]
    assert (badnets.acc, badnets.asr, badnets.ra) == pytest.approx((0.9132, 0.9503, 0.0467))


def test_attacks_and_defenses_have_names_that_the_library_knows() -> None:
    for name in {place[2] for place in published()}:
        attacks.get(name, "image")
    for name in {place[4] for place in published()} - {"none"} - set(NOT_YET):
        defenses.get(name, "image")


NOT_YET: tuple[str, ...] = ("d_br", "d_st", "dbd", "ibau", "nad", "nc")


def test_ours_beside_theirs() -> None:
    (record,) = beside([row(), row(acc=0.92, asr=None)])
    assert record["n"] == 2
    assert record["acc"] == pytest.approx(0.91)
    assert record["asr"] == 0.96
    assert record["asr_difference"] == pytest.approx(0.96 - record["published_asr"])


def test_a_network_that_was_not_published_stands_beside_the_reference() -> None:
    (record,) = beside([row(model="preact_resnet8")])
    assert (record["model"], record["published_model"]) == ("preact_resnet8", "preact_resnet18")


@pytest.mark.parametrize(
    "changes", [{"status": "failed"}, {"poison_rate": 0.2}, {"dataset": "digits"}, {"attack": "cba"}]
)
def test_what_has_no_counterpart_is_left_out(changes: dict[str, Any]) -> None:
    assert beside([row(**changes)]) == []
