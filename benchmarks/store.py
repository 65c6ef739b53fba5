"""Seconds and peak memory of the commands that read a large store.

python benchmarks/store.py --cards 10000

Makes a store with the cards of a finished grid (seeds x attacks x defenses on the digits, written by the store itself
under the keys that the grid has) in a temporary folder, runs each command there as a process of its own with one
thread, and prints the fastest and the slowest of three rounds beside the target for 10,000 cards. One small model is
really trained, for predict.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backdoorlab.benchmark import Card, Grid, Runner, Store, plan
from backdoorlab.benchmark.commands import command_of
from backdoorlab.benchmark.measure import finish
from backdoorlab.benchmark.meter import environment
from backdoorlab.benchmark.spec import resolve
from backdoorlab.metrics.result import Metrics

ATTACKS = ("badnets", "blended", "sig", "wanet", "bpp", "ftrojan", "ctrl", "lf", "refool")
DEFENSES = ("ft", "strip_dataset", "anp", "clp", "ac", "spectral", "strip", "neural_cleanse", "abl")
PER_SEED = (1 + len(ATTACKS)) * (1 + len(DEFENSES))

TARGETS = {"results": 3.0, "bench --resume": 10.0, "show": 2.0, "predict": 2.0}
"""Seconds at 10,000 cards, one core."""
MEMORY_MB = 500


def grid_file(folder: Path, seeds: int) -> Path:
    """The grid that the store is filled with."""
    path = folder / "grid.yaml"
    path.write_text(
        "tasks: [{dataset: digits, recipe: smoke, train_size: 200, test_size: 50}]\n"
        f"attacks: [{', '.join(ATTACKS)}]\n"
        f"defenses: [{', '.join(DEFENSES)}]\n"
        f"seeds: [{', '.join(map(str, range(seeds)))}]\n"
    )
    return path


def fill(store: Store, grid: Grid) -> int:
    """One card per cell, with made-up numbers; how many."""
    runner, place, ids = Runner(store), environment(torch.device("cpu")), {}
    chance = np.random.default_rng(0)
    stages = plan(grid)
    for stage in stages:
        experiment = stage.experiment
        task = runner.task(experiment.task)
        resolved = resolve(experiment, task)
        ids[stage.index] = f"{resolved.stage}/{resolved.key}"
        parents = [] if stage.parent is None else [ids[stage.parent]]
        numbers: dict[str, Any] = dict(zip(("acc", "asr", "ra", "der", "rir"), chance.random(5).tolist(), strict=True))
        numbers |= {"acc_per_class": chance.random(10).tolist(), "n_clean": 50, "n_triggered": 45}
        metrics = finish(
            Metrics(numbers), attacked=experiment.attack is not None, defended=experiment.defense is not None
        )
        card = Card.model_validate(
            {"stage": resolved.stage, "key": resolved.key, "status": "ok", "spec": resolved.spec, "parents": parents}
            | {"metrics": dict(metrics), "null_reasons": dict(metrics.reasons), "modality": task.methods}
            | {"command": command_of(resolved), "changed": resolved.changed}
            | {"seconds": {"attack": 1.5, "measure": 0.25}}
            | {"peak_memory_mb": 812.5, "notes": {"poisoned": 20, "cover": 0, "effective_rate": 0.1}}
            | place
        )
        store.save(card)
    return len(stages)


def measured(command: list[str], store: Path) -> tuple[float, float, float]:
    """Wall seconds, processor seconds and peak resident memory in MB of one command line."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "BACKDOORLAB_STORE": str(store)}
    with tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        child = subprocess.run(
            [sys.executable, "-c", _MEASURED, *command],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=os.environ | threads,
            check=False,
        )
        seconds = time.perf_counter() - started
        errors.seek(0)
        told = errors.read().decode()
        if child.returncode:
            raise SystemExit(f"{' '.join(command)} failed: {told[-2000:]}")
    busy, peak = map(float, told.split()[-2:])
    return seconds, busy, peak / 1024


_MEASURED = """
import resource, sys, time
from backdoorlab.cli.main import run
code = run(sys.argv[1:])
try:  # what getrusage says on Linux includes the parent at the time of the fork
    peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
except OSError:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(time.process_time(), peak, file=sys.stderr)
sys.exit(code)
"""


def main() -> None:
    """Fill a store, then time the commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cards", type=int, default=10_000, help=f"rounded up to a multiple of {PER_SEED}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="only commands that begin like this")
    parser.add_argument("--store", help="keep the store here, and use what an earlier call left")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given.store or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        path = grid_file(folder, -(-given.cards // PER_SEED))
        store = Store(folder / "store")
        if not (folder / "filled.json").exists():
            started = time.perf_counter()
            count = fill(store, Grid.from_yaml(path))
            (folder / "filled.json").write_text(json.dumps(count))
            print(f"{count} cards written in {time.perf_counter() - started:.0f} s")
            trained = folder / "trained"
            measured(["attack", "none", "--recipe", "smoke", "--train-size", "200", "--device", "cpu"], trained)
            np.save(folder / "digit.npy", np.zeros((1, 1, 16, 16), dtype=np.uint8))
        trained = Store(folder / "trained").runs("benign")[0]
        key = store.runs("defense")[0].key
        commands = [
            ("results", ["results"]),
            ("results", ["results", "--json"]),
            ("results", ["results", "--csv"]),
            ("results", ["results", "--group-by", "attack,defense", "--metric", "der"]),
            ("results", ["results", "--group-by", "dataset", "--metric", "asr"]),
            ("show", ["show", key]),
            ("predict", ["predict", "--run", str(trained.path), "--device", "cpu", str(folder / "digit.npy")]),
            ("bench --resume", ["bench", "--resume", "--device", "cpu", str(path)]),
        ]
        print(f"{'command':52} {'seconds':>13} {'of processor':>13} {'target':>7} {'peak MB':>8} {'target':>7}")
        for name, command in commands:
            if not name.startswith(given.only):
                continue
            found = [measured(command, store.root) for _ in range(given.rounds)]
            seconds, busy, memory = zip(*found, strict=True)
            shown = " ".join(part if "/" not in part else "..." for part in command)
            spans = " ".join(f"{f'{min(found):.2f}-{max(found):.2f}':>13}" for found in (seconds, busy))
            print(f"{shown[:52]:52} {spans} {TARGETS[name]:>7.1f} {max(memory):>8.0f} {MEMORY_MB:>7}", flush=True)


if __name__ == "__main__":
    main()
