"""The checks for authors of methods pass what keeps its promises and name the promise that is broken."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from backdoorlab import attacks, defenses
from backdoorlab.attacks import PoisoningAttack, Trigger
from backdoorlab.data.split import Inputs, Poison
from backdoorlab.defenses import DatasetDefense, DefenderView, Defense, InputDefense, InputDetector, RepairDefense
from backdoorlab.models import Classifier
from backdoorlab.tasks import Task
from backdoorlab.testing import check_attack, check_defense, check_trigger, tiny_task
from backdoorlab.training import Context


@dataclass(frozen=True, eq=False)
class Corner(Trigger):
    """A white corner; ``fault`` breaks one promise."""

    kind: ClassVar[str] = "test.corner"

    fault: str = ""

    def __call__(self, inputs, indices=None, generator=None):
        out = inputs if self.fault == "in place" else inputs.clone()
        out[..., -2:, -2:] = 255
        if self.fault == "batch":
            out[0, ..., 0, 0] = 255 - out[0, ..., 0, 0]
        if self.fault == "blind":
            dark = inputs.flatten(1).float().mean(1) < 70  # depends on the sample, as it may, but leaves some out
            out[dark] = inputs[dark]
        return out.float() if self.fault == "dtype" else out


@dataclass(frozen=True, kw_only=True)
class CornerAttack(PoisoningAttack):
    """The plainest attack there is."""

    name: ClassVar[str] = "corner"
    paper: ClassVar[str] = "none: made for this test"
    year: ClassVar[int] = 2026
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    trigger_visibility: ClassVar[str] = "visible"

    def make_trigger(self, task: Task, ctx: Context) -> Trigger:
        return Corner()


@dataclass(frozen=True, kw_only=True)
class Mislabelling(CornerAttack):
    """Says dirty label, yet leaves one label as it was."""

    name: ClassVar[str] = "mislabelling"

    def poison(self, trigger: Trigger, task: Task, ctx: Context) -> Poison:
        poison = super().poison(trigger, task, ctx)
        poison.labels[0] = (poison.labels[0] + 1) % task.num_classes
        return poison


@dataclass(frozen=True, kw_only=True)
class Careless(DatasetDefense):
    """Leaves the model in another state."""

    name: ClassVar[str] = "careless"
    paper: ClassVar[str] = "none: made for this test"
    year: ClassVar[int] = 2026
    modalities: ClassVar[tuple[str, ...]] = ("image",)

    def score(self, view: DefenderView, ctx: Context) -> torch.Tensor:
        next(view.model.parameters()).data.add_(1)
        return torch.zeros(len(view.suspicious))

    def flags(self, scores: torch.Tensor, view: DefenderView) -> torch.Tensor:
        return scores > 0


@dataclass(frozen=True, kw_only=True)
class Hooked(RepairDefense):
    """Its effect lives in a hook, which no store keeps."""

    name: ClassVar[str] = "hooked"
    paper: ClassVar[str] = "none: made for this test"
    year: ClassVar[int] = 2026
    modalities: ClassVar[tuple[str, ...]] = ("image",)

    def run(self, view: DefenderView, ctx: Context) -> Classifier:
        repaired = copy.deepcopy(view.model)
        repaired.register_forward_hook(lambda module, inputs, logits: logits + torch.arange(10))
        return repaired


class Crowded(InputDetector):
    """Scores an input by those beside it."""

    threshold = 0.0

    def score(self, inputs: Inputs) -> torch.Tensor:
        return torch.arange(len(inputs)).float() / len(inputs) + len(inputs)


@dataclass(frozen=True, kw_only=True)
class Crowding(InputDefense):
    """Makes that detector."""

    name: ClassVar[str] = "crowding"
    paper: ClassVar[str] = "none: made for this test"
    year: ClassVar[int] = 2026
    modalities: ClassVar[tuple[str, ...]] = ("image",)

    def run(self, view: DefenderView, ctx: Context) -> InputDetector:
        return Crowded()


def test_what_keeps_its_promises_passes() -> None:
    check_trigger(Corner(), tiny_task().test.inputs)
    assert check_attack(CornerAttack(poison_rate=0.2)).notes["poisoned"] == 16
    assert check_defense(defenses.Spectral()) is not None
    assert check_defense(defenses.FT(epochs=1)) is not None
    check_attack(attacks.BadNets(poison_rate=0.2))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("in place", "changed its input"),
        ("batch", "depends on the others"),
        ("blind", "is not changed"),
        ("dtype", "dtype torch.uint8 became torch.float32"),
    ],
)
def test_a_broken_trigger_is_named(fault: str, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check_trigger(Corner(fault), tiny_task().test.inputs.clone())


def test_a_broken_attack_is_named() -> None:
    with pytest.raises(AssertionError, match="labels are not those of the target map"):
        check_attack(Mislabelling(poison_rate=0.2))


@pytest.mark.parametrize(
    ("defense", "words"),
    [
        (Careless(), "the model was changed"),
        (Hooked(), "the model is another one after storage"),
        (Crowding(), "depends on the others in its batch"),
    ],
    ids=lambda value: value.name if isinstance(value, Defense) else "",
)
def test_a_broken_defense_is_named(defense: Defense, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check_defense(defense)
