"""What diffusion tasks make once for all runs is told apart by everything that it depends on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from backdoorlab.data.sources import DatasetSpec
from backdoorlab.data.split import Split
from backdoorlab.tasks import TaskSpec
from backdoorlab.tasks.diffusion import DiffusionTask
from backdoorlab.training.context import Context, Tensors

pytest.importorskip("diffusers")


class Reached(Exception):
    """Ends a task where it asks for an asset."""


class Asked:
    """Assets that make nothing and keep the key."""

    key = ""

    def get(self, kind: str, spec: Mapping[str, Any], build: Callable[[], Tensors]) -> Tensors:
        self.key = json.dumps([kind, spec], sort_keys=True)
        raise Reached


def tiny(**changes: Any) -> DiffusionTask:
    dataset = DatasetSpec(size=8, train_size=20, test_size=5)
    spec = TaskSpec(kind="diffusion", dataset=dataset, model="unet_micro", recipe="smoke")
    return DiffusionTask.load(dataclasses.replace(spec, recipe_changes=tuple(changes.items())))


def keys(task: DiffusionTask) -> list[str]:
    """Of the clean model, of its samples, of the classifier."""
    found = []
    for make in (task.clean_model, task.clean_samples, task.classifier):
        assets = Asked()
        with pytest.raises(Reached):
            make(Context(assets=assets))
        found.append(assets.key)
    return found


def test_other_pictures_under_the_same_name_are_other_assets() -> None:
    task = tiny()
    train = task.train
    touched = torch.as_tensor(train.inputs).clone()
    touched[0, 0, 0, 0] ^= 1
    dataset = dataclasses.replace(task.dataset, train=Split(touched, train.labels, train.classes))
    other = dataclasses.replace(task, dataset=dataset)
    assert other.spec == task.spec
    assert all(a != b for a, b in zip(keys(task), keys(other), strict=True))


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("timesteps", 90, [True, True, False]),
        ("steps", 299, [True, True, False]),
        ("lr", 1e-3, [True, True, False]),
        ("batch_size", 32, [True, True, False]),
        ("precision", "auto", [True, True, False]),
        ("samples", 99, [False, True, False]),
        ("classifier_recipe", "fast", [False, False, True]),
        ("tune_steps", 199, [False, False, False]),
        ("tune_lr", 1e-3, [False, False, False]),
        ("ddim_steps", 49, [False, False, False]),
        ("triggered_samples", 49, [False, False, False]),
    ],
)
def test_a_recipe_is_in_the_keys_of_what_depends_on_it(field: str, value: Any, expected: list[bool]) -> None:
    assert [a != b for a, b in zip(keys(tiny()), keys(tiny(**{field: value})), strict=True)] == expected


def test_every_field_of_a_recipe_is_looked_at_above() -> None:
    marks = test_a_recipe_is_in_the_keys_of_what_depends_on_it.pytestmark
    assert {case[0] for case in marks[0].args[1]} | {"name"} == set(tiny().recipe.__dataclass_fields__)
