"""What do image attacks cost: stamping a data set, and training a victim under the attacker's control?

    python benchmarks/poisoning.py [--images 50000] [--attacks badnets wanet ...] [--json]

Every image attack in the registry is measured, on one core unless ``--threads`` says otherwise:

(a) its trigger on 32x32 RGB images (random pixels) with ``stamp_all``, as images per second, seconds per 5,000 and as a
    multiple of copying the same batches. Triggers with networks are trained as little as possible first: their speed
    does not depend on the weights. Attacks that train have their wrong trigger ("cross") timed as well.
(b) for each attack that runs the training, the victim's epoch as a multiple of a benign epoch of the same recipe. Both
    are timed in turn, round after round, and the ratio is taken per round, so that a noisy machine disturbs both alike.
    How often a sample passes through the victim with gradients in one step is counted, not assumed: 1 is an ordinary
    step, 2 an extra forward and backward pass.

Times are CPU seconds of this process, which other processes lengthen less than they lengthen wall time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from backdoorlab.attacks import Attack, Backdoor, PoisoningAttack, TrainingAttack, attacks
from backdoorlab.attacks.image.bpp import QuantizeTrigger
from backdoorlab.attacks.triggers.base import Trigger, stamp_all
from backdoorlab.core.errors import BackdoorLabError
from backdoorlab.data.sources import DatasetSpec
from backdoorlab.data.split import Dataset, Split
from backdoorlab.modalities.base import modality_of
from backdoorlab.models import Classifier
from backdoorlab.tasks import Task, TaskSpec
from backdoorlab.training import Context, Recipe
from backdoorlab.training.context import Silent

LEAST = {"steps": 2, "pool": 100, "gate_threshold": 1e6, "threshold": 1e6}
"""Values of hyper-parameters that only lengthen preparations, wherever an attack has them (or ends a name in steps)."""


def smallest(cls: type[Attack], rate: float) -> Attack:
    """The attack with its preparations cut short."""
    settings: dict[str, object] = {"poison_rate": rate}
    for field in dataclasses.fields(cls):
        if field.name in LEAST:
            settings[field.name] = LEAST[field.name]
        elif field.name.endswith("_steps"):
            settings[field.name] = LEAST["steps"]
    return cls.build(settings)


def task_of(samples: int, model: str, epochs: int) -> Task:
    """Random 32x32 RGB pictures of ten classes."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 256, (samples, 3, 32, 32), generator=generator, dtype=torch.uint8)
    split = Split(inputs, torch.arange(samples) % 10, tuple("0123456789"))
    data = Dataset("random", "image", split, split[torch.arange(min(samples, 100))])
    spec = TaskSpec(dataset=DatasetSpec(name="random"), model=model)
    return Task(spec, data, modality_of(data), Recipe(epochs=epochs, batch_size=min(128, samples), lr=0.01))


def triggers_of(cls: type[Attack], task: Task) -> dict[str, Trigger]:
    """The attack's trigger and, if it has one, its cross trigger, by name."""
    attack = smallest(cls, 0.1)
    if isinstance(attack, PoisoningAttack):
        return {cls.name: attack.make_trigger(task, Context())}
    backdoor: Backdoor = attack.run(task, Context())
    triggers = {cls.name: backdoor.trigger}
    if backdoor.cross_trigger is not None:
        triggers[f"{cls.name} (cross)"] = backdoor.cross_trigger
    if cls.name == "bpp":
        triggers["bpp (dithering)"] = QuantizeTrigger(8, True)
    return triggers


class Copy(Trigger):
    """What any trigger must do at least."""

    kind = "benchmark.copy"

    def __call__(
        self, inputs: Tensor, indices: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:  # type: ignore[override]
        return inputs.clone()


def time_trigger(trigger: Trigger, images: Tensor) -> float:
    """Seconds for stamping all images."""
    started = time.process_time()
    stamp_all(trigger, images)
    return time.process_time() - started


def measure_triggers(classes: list[type[Attack]], count: int, rounds: int) -> list[dict[str, Any]]:
    """One row per trigger."""
    images = torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    task, copy, rows = task_of(120, "convnet3", 1), Copy(), []
    for cls in classes:
        try:
            triggers = triggers_of(cls, task)
        except BackdoorLabError as error:
            rows.append({"trigger": cls.name, "failed": str(error)})
            continue
        for name, trigger in triggers.items():
            stamp_all(trigger, images[:500])  # warm up
            repeats = [(time_trigger(copy, images), time_trigger(trigger, images)) for _ in range(rounds)]
            seconds = statistics.median(stamping for _, stamping in repeats)
            rows.append(
                {
                    "trigger": name,
                    "images_per_second": round(count / seconds),
                    "seconds_per_5000": round(seconds * 5000 / count, 4),
                    "times_a_copy": round(statistics.median(stamping / copying for copying, stamping in repeats), 1),
                }
            )
    return rows


VICTIM = ("victim", "teacher", "student")
"""What attacks call the network that they train in the labels of its progress bar."""


class Clock(Silent):
    """Times each epoch of the victim's training, wherever the attack has it trained."""

    def __init__(self) -> None:
        self.epochs: list[float] = []

    def track(self, items: Iterable[Any], label: str, total: int | None = None) -> Iterator[Any]:
        for item in items:
            started = time.process_time()
            yield item
            if any(word in label for word in VICTIM):
                self.epochs.append(time.process_time() - started)


def time_epochs(attack: Attack | None, task: Task) -> list[float]:
    """Seconds of each epoch of a victim, or of a benign model."""
    context = Context(reporter=(clock := Clock()))
    if attack is None:
        task.fit(task.train, context, label="no victim at all")
    else:
        attack.run(task, context)
    return clock.epochs


class Passes:
    """Counts samples that pass through a classifier with gradients."""

    def __init__(self) -> None:
        self.samples = 0

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, Classifier) and torch.is_grad_enabled():
            self.samples += len(inputs[0])


def count_passes(attack: Attack, task: Task) -> float:
    """How often each sample of a batch passes through the victim, on average over the victim's training."""
    passes = Passes()
    handle = torch.nn.modules.module.register_module_forward_hook(passes)
    try:
        log = attack.run(task, Context()).log
    finally:
        handle.remove()
    return passes.samples / (log.steps * task.recipe.batch_size)


def measure_training(classes: list[type[Attack]], samples: int, model: str, rounds: int) -> list[dict[str, Any]]:
    """One row per attack that runs the training; two epochs, since some attacks have two stages."""
    task, rows, failed = task_of(samples, model, 2), [], []
    chosen = {cls.name: smallest(cls, 0.1) for cls in classes if issubclass(cls, TrainingAttack)}
    task.fit(task.train, Context())  # warm up
    passes: dict[str, float] = {}
    for name, attack in list(chosen.items()):
        try:
            passes[name] = count_passes(attack, task)
        except BackdoorLabError as error:  # random pictures teach nothing, which some attacks cannot build on
            failed.append({"attack": name, "failed": str(error)})
            del chosen[name]
    ratios: dict[str, list[list[float]]] = {name: [] for name in chosen}
    plain = []
    for _ in range(rounds):
        for name, attack in chosen.items():
            benign = statistics.mean(time_epochs(None, task))
            ratios[name].append([seconds / benign for seconds in time_epochs(attack, task)])
            plain.append(benign)
    for name, repeats in ratios.items():
        whole = [statistics.mean(epochs) for epochs in repeats]
        rows.append(
            {
                "attack": name,
                "times_benign": round(statistics.median(whole), 2),
                "range": [round(min(whole), 2), round(max(whole), 2)],
                "epochs": [round(statistics.median(column), 2) for column in zip(*repeats, strict=True)],
                "passes": round(passes[name], 2),
                "extra_pass": passes[name] > 1.05,
                "benign_seconds_per_epoch": round(statistics.median(plain), 2),
            }
        )
    return rows + failed


def show(rows: list[dict[str, Any]]) -> None:
    """Rows as a table with a column per key."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([str(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(columns))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attacks", nargs="+", help="only these")
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--samples", type=int, default=2560, help="training samples of (b)")
    parser.add_argument("--model", default="preact_resnet8", help="victim of (b)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-triggers", action="store_true", help="skip (a)")
    parser.add_argument("--no-training", action="store_true", help="skip (b)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    served = attacks.names("image")
    names = [attacks.canonical(name) for name in args.attacks] if args.attacks else served
    classes = [attacks.get(name, "image") for name in names]
    result: dict[str, Any] = {
        "hardware": f"{platform.processor()} x{os.cpu_count()}",
        "torch": torch.__version__,
        "threads": args.threads,
    }
    if not args.no_triggers:
        result["triggers"] = measure_triggers(classes, args.images, args.rounds)
    if not args.no_training:
        result["training"] = measure_training(classes, args.samples, args.model, args.rounds)
    if args.json:
        print(json.dumps(result))
        return
    print(json.dumps({key: value for key, value in result.items() if not isinstance(value, list)}))
    for part in ("triggers", "training"):
        if result.get(part):
            show(result[part])


if __name__ == "__main__":
    main()
