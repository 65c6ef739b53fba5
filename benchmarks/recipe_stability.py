"""Are the recipes stable, and how far does what they give spread over seeds?

    python benchmarks/recipe_stability.py stability.jsonl --only digits text --seeds 20   # run, then the table
    python benchmarks/recipe_stability.py stability.jsonl --report                        # the table
    python benchmarks/recipe_stability.py stability.jsonl --only grey --recipe smoke
    python benchmarks/recipe_stability.py before.jsonl --only grey-28 --change clip=0     # with recipe fields changed
    python benchmarks/recipe_stability.py stress.jsonl --only grey-28 --change lr=0.8 --model preact_resnet8
    python benchmarks/recipe_stability.py --list

Every run is a benign training or an attack on one data set with one seed, by the library's loop. A line per run
goes to the file at once, and what is there is not run again. Grey and RGB folders of 28, 32 and 64 px are drawn from
the embedded digits (turned, shifted, scaled; 4,000 + 1,000 images), written as PNG files and read back as
``folder:PATH``: they stand for a user's data, whose mean and standard deviation nobody has set.

Columns of the table: n, runs; failed, those that ended as an error (a second collapse, or nothing learned); caught,
those in which a training collapsed once and was taken back; jump, the largest rise of the loss of an epoch over the
lowest before it, among the epochs that were kept; ACC and ASR as lowest / median / highest of the runs that did not
fail; s, median seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits

from backdoorlab.attacks.base import attacks
from backdoorlab.core.errors import BackdoorLabError, InputError
from backdoorlab.core.seeding import make_generator
from backdoorlab.data.sources import DatasetSpec
from backdoorlab.tasks import Task, TaskSpec
from backdoorlab.training import Context, predict
from backdoorlab.training.context import MemoryAssets

IMAGE = ("benign", "badnets", "lf", "ctrl")
OTHER = ("benign", "badnets poison_rate=0.02", "badnets", "badnets poison_rate=0.3")
"""Attacks as "name" or "name field=value"; the other modalities have one attack, which three rates make three."""

CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "digits": ({"name": "digits"}, IMAGE),
    "shapes": ({"name": "shapes"}, IMAGE),
    **{f"{kind}-{side}": ({"name": f"{kind}-{side}"}, IMAGE) for kind in ("grey", "rgb") for side in (28, 32, 64)},
    **{
        f"cifar10-{size}": ({"name": "cifar10", "train_size": size, "test_size": 2000}, IMAGE)
        for size in (1000, 2000, 5000, 10000, 20000, 50000)
    },
    "gtsrb": ({"name": "gtsrb"}, IMAGE),
    "gtsrb-4000": ({"name": "gtsrb", "train_size": 4000, "test_size": 2000}, IMAGE),
    "templated_text": ({"name": "templated_text"}, OTHER),
    "sst2": ({"name": "sst2"}, OTHER),
    "tone_words": ({"name": "tone_words"}, OTHER),
    "fsdd": ({"name": "fsdd"}, OTHER),
    "moving_digits": ({"name": "moving_digits"}, OTHER),
}
GROUPS = {
    "text": ("templated_text", "sst2"),
    "sound": ("tone_words", "fsdd"),
    "video": ("moving_digits",),
    "grey": ("grey-28", "grey-32", "grey-64"),
    "rgb": ("rgb-28", "rgb-32", "rgb-64"),
    "cifar10": tuple(name for name in CASES if name.startswith("cifar10")),
}


def draw_folder(base: Path, channels: int, side: int, counts: tuple[int, int] = (4000, 1000)) -> None:
    """Write ``base/train`` and ``base/test`` with ten folders of PNG files each; no writer's digit is in both parts."""
    bunch, generator = load_digits(), make_generator(0, "folder", channels, side)
    pictures, labels = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16, torch.from_numpy(bunch.target)
    order = torch.randperm(len(labels), generator=generator)
    cut = len(labels) * 4 // 5
    for part, rows, count in (("train", order[:cut], counts[0]), ("test", order[cut:], counts[1])):
        chosen = rows[torch.randint(len(rows), (count,), generator=generator)]
        angle, scale, x, y = (torch.rand(4, count, generator=generator) - 0.5) * torch.tensor(
            [[0.5], [0.5], [0.4], [0.4]]
        )
        sin, cos = angle.sin(), angle.cos() * (1.05 + scale)
        places = torch.stack([torch.stack([cos, -sin, x], 1), torch.stack([sin, cos, y], 1)], 1)
        large = F.interpolate(pictures[chosen], size=(side, side), mode="bicubic").clamp(0, 1)
        grid = F.affine_grid(places, [count, 1, side, side], align_corners=False)
        drawn = ((F.grid_sample(large, grid, align_corners=False) - 0.25) * 2).clamp(0, 1)
        if channels == 3:
            ink = 0.5 + 0.5 * torch.rand(count, 3, 1, 1, generator=generator)
            ground = 0.4 * torch.rand(count, 3, 1, 1, generator=generator)
            drawn = torch.lerp(ground, ink, drawn)
        drawn = (255 * drawn + 3 * torch.randn(drawn.shape, generator=generator)).clamp(0, 255).round().to(torch.uint8)
        for k, label in enumerate(labels[chosen].tolist()):
            folder = base / part / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            pixels = drawn[k, 0] if channels == 1 else drawn[k].permute(1, 2, 0)
            Image.fromarray(pixels.contiguous().numpy()).save(folder / f"{k:05d}.png")


def load_task(case: str, args: argparse.Namespace, folders: Path) -> Task:
    """The case's data with the recipe that was asked for."""
    data = dict(CASES[case][0])
    kind, _, side = case.partition("-")
    if kind in ("grey", "rgb"):
        base = folders / case
        if not base.is_dir():
            draw_folder(base, 1 if kind == "grey" else 3, int(side))
        data["name"] = f"folder:{base}"
    changes = tuple((key, json.loads(value)) for key, _, value in (change.partition("=") for change in args.change))
    return Task.load(
        TaskSpec(dataset=DatasetSpec(**data), model=args.model, recipe=args.recipe, recipe_changes=changes)
    )


def run(task: Task, attack: str, seed: int, assets: MemoryAssets) -> dict[str, Any]:
    """One training, what came of it and how it went."""
    ctx, started = Context(seed, assets=assets), time.perf_counter()
    record: dict[str, Any] = {"status": "ok"}
    try:
        if attack == "benign":
            model, log = task.fit(task.train, ctx)
            right = predict(model, task.test.inputs).argmax(1) == task.test.labels
            record["acc"] = float(right.float().mean())
        else:
            name, *settings = attack.split()
            changes = {key: json.loads(value) for key, _, value in (setting.partition("=") for setting in settings)}
            backdoor = attacks.get(name, task.modality.name).build(changes).run(task, ctx)
            log, measured = backdoor.log, backdoor.measure(task, ctx.child("measure"))
            record |= {"acc": measured["acc"], "asr": measured["asr"]}
        lowest = [min(log.loss[: i + 1]) for i in range(len(log.loss))]
        record |= log.notes() | {"loss": log.loss[-1]}
        record["jump"] = max((max(0.0, now - low) for now, low in zip(log.loss[1:], lowest, strict=False)), default=0.0)
    except InputError:
        raise
    except BackdoorLabError as error:
        record = {"status": "failed", "reason": str(error)}
    return record | {"warnings": list(ctx.warnings), "seconds": round(time.perf_counter() - started, 1)}


def key(record: dict[str, Any]) -> tuple[str, ...]:
    """What makes two runs the same."""
    return tuple(str(record[name]) for name in ("case", "recipe", "model", "change", "attack", "seed"))


def read(file: Path) -> list[dict[str, Any]]:
    """The runs that a file holds."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def table(records: list[dict[str, Any]]) -> str:
    """Markdown, one row per case, recipe and attack."""
    rows: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        rows[key(record)[:-1]].append(record)

    def spread(values: list[float]) -> str:
        if not values:
            return ""
        return " / ".join(f"{value:.3f}" for value in (min(values), statistics.median(values), max(values)))

    head = "| data | recipe | attack | n | failed | caught | jump | ACC | ASR | s |"
    lines = [head, "|" + " --- |" * 10]
    order = {name: i for i, name in enumerate(CASES)}
    for (case, recipe, model, change, attack), runs in sorted(rows.items(), key=lambda row: order[row[0][0]]):
        ok = [r for r in runs if r["status"] == "ok"]
        caught = sum(any("collapsed in epoch" in text for text in r["warnings"]) for r in runs)
        jump = max((r["jump"] for r in ok), default=float("nan"))
        extra = "".join(f", {part}" for part in (change, "" if model == "auto" else model) if part)
        lines.append(
            f"| {case} | {recipe}{extra} | {attack} | {len(runs)} | {len(runs) - len(ok)} | {caught} | {jump:.2f} | "
            f"{spread([r['acc'] for r in ok])} | {spread([r['asr'] for r in ok if r.get('asr') is not None])} | "
            f"{statistics.median(r['seconds'] for r in runs):.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=Path("stability.jsonl"), help="JSON lines, appended to")
    parser.add_argument("--only", nargs="+", default=list(CASES), help="cases or groups; see --list")
    parser.add_argument("--attacks", nargs="+", help="instead of the case's own, e.g. benign badnets")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--model", default="auto")
    parser.add_argument("--change", nargs="+", default=[], metavar="FIELD=VALUE", help="fields of the recipe")
    parser.add_argument("--folders", type=Path, default=Path(tempfile.gettempdir()) / "recipe-stability-folders")
    parser.add_argument("--report", action="store_true", help="print the table and run nothing")
    parser.add_argument("--list", action="store_true", help="print the cases and groups")
    args = parser.parse_args()
    if args.list:
        print(*CASES, *(f"{name}: {' '.join(cases)}" for name, cases in GROUPS.items()), sep="\n")
        return
    cases = [case for name in args.only for case in GROUPS.get(name, (name,))]
    if unknown := [case for case in cases if case not in CASES]:
        parser.error(f"unknown case {unknown[0]!r}; --list names them")
    done = {key(record) for record in read(args.file)}
    for case in [] if args.report else cases:
        assets, task = MemoryAssets(), None
        for seed in range(args.first, args.first + args.seeds):
            for attack in args.attacks or CASES[case][1]:
                record = {
                    "case": case,
                    "recipe": args.recipe,
                    "model": args.model,
                    "change": " ".join(args.change),
                    "attack": attack,
                    "seed": seed,
                }
                if key(record) in done:
                    continue
                task = task or load_task(case, args, args.folders)
                record |= run(task, attack, seed, assets)
                with args.file.open("a") as out:
                    out.write(json.dumps(record) + "\n")
                print(json.dumps(record), flush=True)
    print(table(read(args.file)))


if __name__ == "__main__":
    main()
