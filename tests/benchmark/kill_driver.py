"""Run by test_faults.py in a process of its own: forks workers that run a small grid on one store.

``python kill_driver.py STORE SEED TIMES`` kills a worker (SIGKILL) TIMES times, at work and while it writes, and then
lets two finish at once. It prints moment:signal:artifacts finished before it:folders left half-written. Every artifact
that a worker finishes is logged.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from backdoorlab.attacks import attacks
from backdoorlab.benchmark import Grid, MethodSpec, Runner, Store, run_grid
from backdoorlab.data.sources import DatasetSpec
from backdoorlab.defenses import defenses
from backdoorlab.tasks import TaskSpec

GRID = Grid(
    "kill",
    (
        TaskSpec(
            dataset=DatasetSpec(train_size=300, test_size=60),
            recipe="smoke",
            recipe_changes=(("epochs", 1), ("min_steps", 40)),
        ),
    ),
    (MethodSpec("badnets"),),
    (MethodSpec("ft", {"epochs": 10, "batch_size": 8}), MethodSpec("ac"), MethodSpec("strip")),
    (0, 1),
)


def worker(root: Path, log: Path) -> int:
    """Fork a process that runs the grid."""
    child = os.fork()
    if child:
        return child
    torch.set_num_threads(1)
    save = Store.save

    def logged(self: Store, card, *args, **kwargs):
        run = save(self, card, *args, **kwargs)
        with log.open("a") as file:
            file.write(f"{run.id}\n")
        return run

    Store.save = logged
    report = run_grid(GRID, Runner(Store(root)))
    os._exit(0 if not report.refused and all(c.status == "ok" for c in report.cards.values()) else 1)


def done(root: Path) -> int:
    return len(list(root.glob("*/[0-9a-f]*/card.json")))


def wait_for(moment: str, root: Path, before: int, chance: random.Random) -> None:
    """Until an artifact is finished, or one is being written, or (always) some of a second later."""
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        if moment == "writing" and any(root.glob("*/.tmp-*")):
            return
        if moment == "working" and done(root) > before:
            break
        if moment == "anything":
            break
    time.sleep(chance.uniform(0, 0.4))


if __name__ == "__main__":
    root, chance, killed = Path(sys.argv[1]), random.Random(int(sys.argv[2])), []
    log = root.with_name("log.txt")
    attacks.names(), defenses.names()  # import everything once, before forking
    for kill in range(int(sys.argv[3])):
        moment = ("working", "writing", "anything")[kill % 3]
        before, child = done(root), worker(root, log)
        wait_for(moment, root, before, chance)
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        left = len(list(root.glob("*/.tmp-*")))
        killed.append(f"{moment}:{os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0}:{done(root) - before}:{left}")
    print(" ".join(killed), flush=True)
    children = [worker(root, log) for _ in range(2)]
    sys.exit(sum(os.waitpid(child, 0)[1] for child in children) and 1)
