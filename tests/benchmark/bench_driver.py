"""Run by test_engine.py in a process of its own: ``python bench_driver.py STORE`` runs a parallel bench for minutes.

It goes through the command line's entry point, and its exit code is that of ``backdoorlab bench``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from backdoorlab.cli.main import run

GRID = """
name: long
tasks: [{dataset: digits, recipe: smoke, recipe_changes: {epochs: 100000}}]
attacks: [badnets]
defenses: [ft]
seeds: [0, 1]
"""

if __name__ == "__main__":
    store = Path(sys.argv[1])
    file = store.with_name("long.yaml")
    file.write_text(GRID)
    sys.exit(run(["bench", str(file), "--device", "cpu,cpu", "--store", str(store)]))
