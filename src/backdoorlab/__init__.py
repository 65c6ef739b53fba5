"""backdoorlab: attacks, defenses and fair benchmarks for backdoor learning.

    import backdoorlab as bl

    task = bl.load_task("digits", recipe="smoke")
    backdoor = bl.attacks.BadNets(poison_rate=0.05).plant(task, seed=0)
    repaired = bl.defenses.ANP(iterations=300).repair(backdoor.model, clean=task.clean_subset(0.05))
    print(bl.compare(backdoor, repaired))

Nothing heavy is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backdoorlab import attacks, defenses
    from backdoorlab.api import (
        attack,
        compare,
        defend,
        list_attacks,
        list_datasets,
        list_defenses,
        list_models,
        load,
        load_task,
        wrap,
    )

__version__ = "0.1.0"

__all__ = [
    "attack",
    "attacks",
    "compare",
    "defend",
    "defenses",
    "list_attacks",
    "list_datasets",
    "list_defenses",
    "list_models",
    "load",
    "load_task",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name in ("attacks", "defenses"):
        return importlib.import_module(f"backdoorlab.{name}")
    if name in __all__:
        return getattr(importlib.import_module("backdoorlab.api"), name)
    raise AttributeError(f"module 'backdoorlab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
