"""Spec -> plan -> run -> card: experiments with stable keys, a crash-safe store, resumable grids and tables."""

from backdoorlab.benchmark.card import Card
from backdoorlab.benchmark.engine import Engine, LocalEngine
from backdoorlab.benchmark.grid import Grid, GridReport, Stage, plan, run_grid
from backdoorlab.benchmark.remote import RemoteStore, open_store
from backdoorlab.benchmark.results import Refusal, Results, rows, table
from backdoorlab.benchmark.runner import Runner
from backdoorlab.benchmark.spec import Experiment, MethodSpec, attack_key, defense_key
from backdoorlab.benchmark.store import Store, StoredRun

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
    "Results",
    "Runner",
    "Stage",
    "Store",
    "StoredRun",
    "attack_key",
    "defense_key",
    "open_store",
    "plan",
    "rows",
    "run_grid",
    "table",
]
