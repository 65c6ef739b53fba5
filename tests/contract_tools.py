"""What contract tests over (method, modality) share: tiny tasks of every modality, with given samples and labels.

A method is covered as soon as it is registered; only :mod:`quick` may have to learn small settings for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor

from attack_tools import noise
from backdoorlab.core.method import Method
from backdoorlab.data.sources import DatasetSpec
from backdoorlab.data.split import Dataset, Inputs, Split, take
from backdoorlab.modalities.base import modality_of
from backdoorlab.models import Classifier
from backdoorlab.tasks import Task, TaskSpec
from backdoorlab.testing import SETS, tiny_task
from backdoorlab.training import Context
from backdoorlab.training.recipes import recipe_for

M = TypeVar("M", bound=Method)


def pairs(registry: Iterable[type[M]]) -> list[object]:
    """(class, modality) of every method of this package on every modality of classifiers that it declares."""
    return [
        pytest.param(cls, modality, id=f"{cls.name}-{modality}")
        for cls in registry
        for modality in cls.modalities
        if modality in SETS and cls.__module__.startswith("backdoorlab.")
    ]


@cache
def tiny_model(modality: str) -> Classifier:
    """Read only."""
    task = tiny_task(modality)
    return task.fit(task.train, Context(1))[0]


def task_of(modality: str, inputs: Inputs, labels: Tensor, classes: int, batch: int = 16) -> Task:
    """One epoch of the smallest network on these samples, which are the test set too."""
    split = Split(inputs, labels, tuple(f"class {k}" for k in range(classes)))
    data = Dataset("edge", modality, split, split, sample_rate=8000 if modality == "audio" else 0)
    model = "convnet3" if modality == "image" else tiny_task(modality).spec.model
    changes = {"epochs": 1, "min_steps": 0, "batch_size": batch}
    if modality == "image":
        changes["lr"] = 0.05
    spec = TaskSpec(dataset=DatasetSpec(name="edge"), model=model, recipe="smoke")
    return Task(spec, data, modality_of(data), recipe_for(modality, "smoke", **changes))


def labelled(modality: str, labels: Tensor, classes: int, batch: int = 16) -> Task:
    """Such a task with these labels: noise for images, samples of the tiny task for other modalities."""
    if modality == "image":
        return task_of(modality, noise((1, 16, 16), len(labels), 1), labels, classes, batch)
    known = tiny_task(modality).train.inputs
    return task_of(modality, take(known, torch.arange(len(labels)) % len(known)), labels, classes, batch)


def nothing_in_it(modality: str, level: int = 0) -> Inputs:
    """24 equal samples: one grey level, silence, one word."""
    known = take(tiny_task(modality).train.inputs, torch.zeros(24, dtype=torch.int64))
    if isinstance(known, np.ndarray):
        return np.array(["word"] * 24, dtype=object)
    return torch.full_like(known, level)
