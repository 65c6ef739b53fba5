"""Training recipes: optimiser, schedule and length, as data."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from backdoorlab.core.errors import InputError, unknown
from backdoorlab.core.excerpt import shown
from backdoorlab.core.settings import read_settings

_RANGES: dict[str, tuple[float, float]] = {
    "epochs": (0, 10**6),
    "batch_size": (1, 2**31),
    "lr": (0, 10**6),
    "momentum": (0, 1),
    "weight_decay": (0, 10**6),
    "milestones": (0, 10**6),
    "warmup": (0, 1),
    "clip": (0, math.inf),
    "min_steps": (0, 10**9),
}
"""Smallest and largest value of each number in a recipe."""


def typed_changes(kind: type[Any], given: Mapping[str, object], what: str = "recipe") -> dict[str, Any]:
    """Changes of a recipe's fields with values of the right type, whether they were typed or come from a file.

    Args:
        kind: the recipe's dataclass.
        given: values, or text that stands for them, by the name of the field.
        what: name of the kind, for messages.

    Raises:
        InputError: for an unknown field or a value of another type; ranges are checked by the recipe itself.
    """
    hints = {key: hint for key, hint in typing.get_type_hints(kind).items() if key != "name"}
    return read_settings(what, given, hints)


def check_ranges(what: str, recipe: Any, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Look at every number (or tuple of numbers) in a recipe.

    Raises:
        InputError: for one that is out of its range.
    """
    for name, (low, high) in ranges.items():
        value = getattr(recipe, name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
                raise InputError(f"{what}: {name} must be a finite number, got {shown(value)}")
            if not low <= number <= high:
                bound = f"at least {low:g}" if number < low else f"at most {high:g}"
                raise InputError(f"{what}: {name} must be {bound}, got {shown(value)}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained.

    Attributes:
        name: "reference", "fast", "smoke", or "custom".
        epochs: passes over the training set.
        batch_size: samples per step; the last, partial batch of an epoch is dropped.
        optimizer: "sgd" or "adamw".
        lr: peak learning rate.
        momentum: of SGD.
        nesterov: of SGD.
        weight_decay: L2 (SGD) or decoupled (AdamW).
        schedule: "constant", "cosine" (per epoch, to 0), "onecycle" (per step: linear up over ``warmup``, then
            linearly down to 0) or "multistep" (x0.1 at each milestone).
        milestones: epochs of "multistep".
        warmup: share of all steps that "onecycle" climbs.
        clip: largest Euclidean norm of the gradient of all parameters together; 0 leaves it as it is.
        augment: whether batches are augmented.
        min_steps: on small sets epochs are added until there are so many optimiser steps.
        precision: "auto", "bf16" or "fp32".
        compile: use torch.compile (worth it for runs of minutes on a GPU).
    """

    name: str = "custom"
    epochs: int = 10
    batch_size: int = 128
    optimizer: str = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    milestones: tuple[int, ...] = ()
    warmup: float = 0.25
    clip: float = 0.0
    augment: bool = True
    min_steps: int = 0
    precision: str = "auto"
    compile: bool = False

    def __post_init__(self) -> None:
        for name, choices in (
            ("optimizer", ("sgd", "adamw")),
            ("schedule", ("constant", "cosine", "onecycle", "multistep")),
            ("precision", ("auto", "bf16", "fp32")),
        ):
            if getattr(self, name) not in choices:
                raise unknown(name, getattr(self, name), choices)
        check_ranges("recipe", self, _RANGES)
        if self.optimizer == "sgd" and self.nesterov and not self.momentum:
            raise InputError("recipe: nesterov needs a momentum > 0; set nesterov=false with momentum=0")

    def resolve(self, samples: int) -> Recipe:
        """The recipe for a training set of that size: batch no larger than the set, enough epochs for ``min_steps``."""
        batch = min(self.batch_size, samples)
        steps = max(1, samples // batch)
        return dataclasses.replace(
            self, batch_size=batch, epochs=max(self.epochs, math.ceil(self.min_steps / steps)), min_steps=0
        )

    def factor(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of a step, as a multiple of ``lr``."""
        total = self.epochs * steps_per_epoch
        epoch = step // steps_per_epoch
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))
        if self.schedule == "onecycle":
            peak = max(1.0, self.warmup * total)
            return min((step + 1) / peak, max(0.0, (total - step) / max(1.0, total - peak)))
        if self.schedule == "multistep":
            return float(0.1 ** sum(epoch >= m for m in self.milestones))
        return 1.0


_IMAGE = {
    "reference": Recipe(name="reference", epochs=100, batch_size=128, lr=0.01, schedule="cosine"),
    "fast": Recipe(
        name="fast", epochs=10, batch_size=256, lr=0.2, nesterov=True, schedule="onecycle", clip=1.0, min_steps=600
    ),
    "smoke": Recipe(
        name="smoke", epochs=3, batch_size=64, lr=0.1, nesterov=True, schedule="onecycle", clip=1.0, min_steps=300
    ),
}
_ADAM = Recipe(optimizer="adamw", schedule="onecycle", weight_decay=1e-2)
_TEXT = {
    "reference": dataclasses.replace(_ADAM, name="reference", epochs=10, batch_size=32, lr=1e-3),
    "fast": dataclasses.replace(_ADAM, name="fast", epochs=5, batch_size=64, lr=2e-3, min_steps=300),
    "smoke": dataclasses.replace(_ADAM, name="smoke", epochs=3, batch_size=64, lr=5e-3, min_steps=120),
}
_AUDIO = {
    "reference": dataclasses.replace(_ADAM, name="reference", epochs=40, batch_size=64, lr=2e-3),
    "fast": dataclasses.replace(_ADAM, name="fast", epochs=15, batch_size=64, lr=4e-3),
    "smoke": dataclasses.replace(_ADAM, name="smoke", epochs=5, batch_size=32, lr=4e-3, min_steps=150),
}
_VIDEO = {
    "reference": dataclasses.replace(_ADAM, name="reference", epochs=40, batch_size=32, lr=2e-3),
    "fast": dataclasses.replace(_ADAM, name="fast", epochs=10, batch_size=32, lr=4e-3),
    "smoke": dataclasses.replace(_ADAM, name="smoke", epochs=4, batch_size=16, lr=4e-3, min_steps=120),
}
recipes = {"image": _IMAGE, "text": _TEXT, "audio": _AUDIO, "video": _VIDEO}
"""Recipes by modality and name; "reference" for images is the benchmark's, the others are ours."""


def recipe_for(modality: str, name: str, **changes: object) -> Recipe:
    """A recipe by name, with some fields changed.

    Raises:
        InputError: for an unknown recipe or field.
    """
    table = recipes[modality]
    if name not in table:
        raise unknown("recipe", name, table)
    return dataclasses.replace(table[name], **typed_changes(Recipe, changes))
