"""How far the numbers that effect tests assert spread over seeds, instruction sets and numbers of threads.

    python benchmarks/effect_spread.py spread.jsonl                        # ten seeds as the machine is
    python benchmarks/effect_spread.py spread.jsonl --seeds 3 --environment avx2 --environment threads-2
    python benchmarks/effect_spread.py spread.jsonl --only neural --seeds 10
    python benchmarks/effect_spread.py spread.jsonl --report               # what is there, and proposed bounds

Each seed under each environment is a separate process, which appends a line per case; what the file has is not
measured again, so an interrupted run goes on where it was. The report prints, for each asserted number, how many draws
there are, the lowest, the median and the highest, the bound in force and the one that the draws propose: beyond the
worst draw by as much as that is from the median, and by 0.02 (or 2 %) at least. A bound that is tighter is marked
with "!", one that a draw breaks with "!!".
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

ENVIRONMENTS: dict[str, dict[str, str]] = {
    "native": {},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "amx": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"},
    "aten-avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "threads-2": {"OMP_NUM_THREADS": "2"},
}
"""A processor that lacks an instruction set ignores the limit: then the line is the same as "native"."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON lines, read and appended to")
    parser.add_argument("--seeds", type=int, default=10, help="how many, from --first on")
    parser.add_argument("--first", type=int, default=0, help="first seed; settings were chosen on 100 and above")
    parser.add_argument("--environment", action="append", choices=ENVIRONMENTS, help="repeatable; default: native")
    parser.add_argument("--only", default="", help="part of the case's name; several, separated by commas")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--report", action="store_true", help="only print what the file has")
    parser.add_argument("--draw", nargs=2, metavar=("ENVIRONMENT", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.draw:
        draw(args.file, args.draw[0], int(args.draw[1]), args.only)
        return 0
    failed = 0
    if not args.report:
        seeds = range(args.first, args.first + args.seeds)
        pairs = [(name, seed) for seed in seeds for name in args.environment or ["native"]]
        with ThreadPoolExecutor(args.jobs) as pool:
            failed = sum(pool.map(lambda pair: spawn(args, *pair), pairs))
    report(read(args.file), args.only)
    return 1 if failed else 0


def spawn(args: argparse.Namespace, environment: str, seed: int) -> bool:
    """One process; true if it failed."""
    plain = {name: value for name, value in os.environ.items() if not any(name in e for e in ENVIRONMENTS.values())}
    command = [sys.executable, __file__, str(args.file), "--only", args.only, "--draw", environment, str(seed)]
    return bool(subprocess.run(command, env=plain | {"OMP_NUM_THREADS": "1"} | ENVIRONMENTS[environment]).returncode)


def draw(file: Path, environment: str, seed: int, only: str) -> None:
    """Measure what is missing of one seed in this process, which has its environment."""
    import torch

    from backdoorlab.benchmark.meter import hardware
    from effect_tools import all_cases

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    facts = hardware(torch.device("cpu"))
    place = {key: facts[key] for key in ("processor", "instructions", "onednn_max_isa", "precision", "threads")}
    known = {row["case"] for row in read(file) if (row["environment"], row["seed"]) == (environment, seed)}
    for case in all_cases().values():
        if case.name in known or not selected(case.name, only):
            continue
        started = time.process_time()
        row: dict[str, Any] = {"case": case.name, "seed": seed, "environment": environment}
        row["numbers"] = {name: round(value, 5) for name, value in case.measure(seed).items()}
        row |= {"seconds": round(time.process_time() - started, 1), "hardware": place, "torch": torch.__version__}
        with file.open("a") as out:
            out.write(json.dumps(row) + "\n")
        print(environment, seed, case.name, row["numbers"], f"{row['seconds']} s", flush=True)


def selected(name: str, only: str) -> bool:
    return any(part in name for part in only.split(","))


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def propose(values: Iterable[float], sign: str) -> float:
    """The bound that draws justify, rounded outward to hundredths."""
    ordered = sorted(values)
    middle, worst = statistics.median(ordered), ordered[0 if sign == ">=" else -1]
    margin = max(0.02 * max(1.0, abs(worst)), abs(middle - worst))
    return math.floor(100 * (worst - margin)) / 100 if sign == ">=" else math.ceil(100 * (worst + margin)) / 100


def report(rows: list[dict[str, Any]], only: str) -> None:
    from effect_tools import all_cases

    print(f"{'case':<36} {'number':<16} {'n':>3} {'low':>8} {'median':>8} {'high':>8}  {'bound':>9}  proposed")
    for case in all_cases().values():
        case_rows = [row for row in rows if row["case"] == case.name]
        if not case_rows or not selected(case.name, only):
            continue
        for name in dict.fromkeys(name for row in case_rows for name in row["numbers"]):
            values = sorted(row["numbers"][name] for row in case_rows if name in row["numbers"])
            line = f"{case.name:<36} {name:<16} {len(values):>3} {values[0]:>8.3f} {statistics.median(values):>8.3f}"
            line += f" {values[-1]:>8.3f}"
            if name in case.bounds:
                sign, bound = case.bounds[name]
                proposed, high = propose(values, sign), sign == ">="
                broken = values[0] < bound if high else values[-1] > bound
                tight = bound > proposed if high else bound < proposed
                line += f"  {sign} {bound:>6g}  {proposed:g} {'!!' if broken else '!' if tight else ''}"
            print(line)
        print(f"{case.name:<36} seconds of one core: {statistics.median(row['seconds'] for row in case_rows):.0f}")


if __name__ == "__main__":
    sys.exit(main())
