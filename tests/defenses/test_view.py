"""A defense sees what it declares and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from backdoorlab.core.errors import BackdoorLabError, InputError
from backdoorlab.data import Split
from backdoorlab.defenses import DefenderView, RepairDefense, defenses
from backdoorlab.defenses.view import PARTS
from backdoorlab.models import Classifier
from backdoorlab.tasks import Task
from backdoorlab.training import Context


@dataclass(frozen=True, kw_only=True)
class Peeking(RepairDefense):
    """Declares the model, reads the training set."""

    name: ClassVar[str] = "peeking"
    paper: ClassVar[str] = "none"
    year: ClassVar[int] = 2026
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    reads: ClassVar[tuple[str, ...]] = ("model",)

    def run(self, view: DefenderView, ctx: Context) -> Classifier:
        view.suspicious  # noqa: B018
        return view.model


def test_reading_what_is_not_declared_is_stopped(digits_task: Task) -> None:
    model = digits_task.build_model(Context())
    view = DefenderView(model=model, suspicious=digits_task.train)
    with pytest.raises(BackdoorLabError, match=r"peeking reads 'suspicious'.*declares only: model"):
        Peeking().apply(view, Context())


def test_a_part_that_is_missing_is_named_before_any_work(digits_task: Task) -> None:
    with pytest.raises(InputError, match="peeking needs the suspicious model"):
        Peeking().apply(DefenderView(clean=digits_task.train), Context())


def test_a_view_cannot_be_changed_and_holds_no_truth(digits_task: Task) -> None:
    view = DefenderView(suspicious=digits_task.train, blueprint=digits_task.blueprint)
    with pytest.raises(AttributeError, match="cannot be changed"):
        view.suspicious = digits_task.train  # type: ignore[misc]
    assert isinstance(view.suspicious, Split)
    reachable = {type(getattr(view.blueprint, name)) for name in vars(view.blueprint)}
    assert not reachable & {Split, torch.Tensor}, "a blueprint must hold no data"


def test_an_unknown_part_is_refused_when_the_class_is_made() -> None:
    with pytest.raises(TypeError, match="no part 'roles'"):
        type("Wrong", (RepairDefense,), {"reads": ("roles",)})


@pytest.mark.parametrize("cls", list(defenses), ids=lambda c: c.name)
def test_every_defense_declares_what_it_reads(cls: type[RepairDefense]) -> None:
    assert cls.reads and set(cls.reads) <= set(PARTS)
    assert cls.facts()["reads"] == cls.reads
    assert ("clean" in cls.reads) == (cls.needs_clean_fraction > 0)
