"""SKELETON (signatures final, bodies follow)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from backdoorlab.benchmark.card import Card
from backdoorlab.benchmark.runner import Runner
from backdoorlab.benchmark.spec import Experiment, MethodSpec
from backdoorlab.training.task import TaskSpec


@dataclass(frozen=True)
class Stage:
    """One node of the plan. ``parent`` is the index of the attack (or benign) stage that a defense stands on."""

    index: int
    experiment: Experiment
    parent: int | None

    @property
    def label(self) -> str:
        """Such as "digits / badnets / anp / seed 0"."""
        raise NotImplementedError


@dataclass(frozen=True)
class Grid:
    """tasks x attacks x defenses x seeds; the undefended and the benign rows are always part of it."""

    name: str
    tasks: tuple[TaskSpec, ...]
    attacks: tuple[MethodSpec, ...]
    defenses: tuple[MethodSpec, ...]
    seeds: tuple[int, ...]
    clean_fraction: float | None = None
    retrain: bool = True

    @classmethod
    def from_yaml(cls, path: str | Path) -> Grid:
        """Read and validate; any mistake is one InputError with the file name and the nearest valid choice."""
        raise NotImplementedError


@dataclass(frozen=True)
class GridReport:
    """cards: by stage index (of stages that have one); refused: (stage, message) of bad input; reused: indices."""

    cards: dict[int, Card]
    refused: list[tuple[Stage, str]]
    reused: frozenset[int]


OnCard = Callable[[Stage, Card, bool], None]
"""(stage, its card, True if the card was in the store already)."""


def plan(grid: Grid) -> list[Stage]:
    """All stages, each after the one that it depends on."""
    raise NotImplementedError


def run_grid(grid: Grid, runner: Runner, *, resume: bool = True, on_card: OnCard | None = None,
             engine: object | None = None) -> GridReport:  # fmt: skip
    """Run the plan; cards already in the store are reused, so an interrupted run continues where it stopped."""
    raise NotImplementedError
