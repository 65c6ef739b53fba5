"""Spec -> plan -> run -> card: experiments with stable keys, a crash-safe store, resumable grids and tables.

Names are imported when they are first used: tables and cards are read without loading torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from backdoorlab.benchmark.artifact import StoredRun
    from backdoorlab.benchmark.card import Card
    from backdoorlab.benchmark.engine import Engine, LocalEngine
    from backdoorlab.benchmark.grid import Grid, GridReport, Stage, plan, run_grid
    from backdoorlab.benchmark.remote import RemoteStore, open_store
    from backdoorlab.benchmark.results import Refusal, Results, rows, table
    from backdoorlab.benchmark.runner import Runner, RunResult
    from backdoorlab.benchmark.spec import Experiment, MethodSpec, Resolved, attack_key, defense_key, resolve
    from backdoorlab.benchmark.store import Store

__all__ = [
    "Card",
    "Engine",
    "Experiment",
    "Grid",
    "GridReport",
    "LocalEngine",
    "MethodSpec",
    "Refusal",
    "RemoteStore",
    "Resolved",
    "Results",
    "RunResult",
    "Runner",
    "Stage",
    "Store",
    "StoredRun",
    "attack_key",
    "defense_key",
    "open_store",
    "plan",
    "resolve",
    "rows",
    "run_grid",
    "table",
]

_HOME = {
    name: module
    for module, names in {
        "artifact": ("StoredRun",),
        "card": ("Card",),
        "engine": ("Engine", "LocalEngine"),
        "grid": ("Grid", "GridReport", "Stage", "plan", "run_grid"),
        "remote": ("RemoteStore", "open_store"),
        "results": ("Refusal", "Results", "rows", "table"),
        "runner": ("RunResult", "Runner"),
        "spec": ("Experiment", "MethodSpec", "Resolved", "attack_key", "defense_key", "resolve"),
        "store": ("Store",),
    }.items()
    for name in names
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
