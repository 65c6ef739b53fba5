"""One picture of all image triggers in a store: clean, triggered, magnified difference, and what changes in frequency.

    python benchmarks/trigger_gallery.py --store runs --dataset cifar10 --out docs/figures/attacks.png

Takes the latest successful run of each attack on the data set; the same test sample is shown for all of them, the first
whose trigger counts for every attack.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backdoorlab.analysis.figures import GREY, INK, frequency_residual, in_colors, magnified
from backdoorlab.attacks.result import Backdoor
from backdoorlab.benchmark import Runner, Store
from backdoorlab.data.files import write_atomically
from backdoorlab.metrics.visibility import visibility
from backdoorlab.tasks import Task

COLUMNS, SIDE, GAP, TEXT, MARGIN, HEAD = 3, 0.92, 0.05, 0.52, 0.3, 0.75
"""Attacks side by side; lengths in inches."""
PARTS = ("clean", "triggered", "difference", "frequencies")


def latest(runner: Runner, dataset: str) -> dict[str, tuple[Task, Backdoor]]:
    """The latest good run of each image attack on a data set, by name."""
    backdoors = {}
    for stored in runner.store.runs("attack"):
        card = stored.card()
        if card.status == "ok" and card.spec["task"]["dataset"]["name"] == dataset:
            backdoors[str(card.spec["attack"]["name"])] = runner.load_backdoor(stored)
    return dict(sorted(backdoors.items()))


def rows_shown(backdoors: dict[str, tuple[Task, Backdoor]], skip: int) -> Tensor:
    """Row of the test sample: the first (after ``skip``) whose trigger counts for every attack."""
    counts = torch.stack([backdoor.target_map.eligible(task.test.labels) for task, backdoor in backdoors.values()]).all(
        0
    )
    return counts.nonzero().flatten()[skip : skip + 1]


def draw(backdoors: dict[str, tuple[Task, Backdoor]], row: Tensor, path: Path) -> None:
    """Draw the sheet."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = -(-len(backdoors) // COLUMNS)
    cell = len(PARTS) * (SIDE + GAP) + MARGIN
    width, height = COLUMNS * cell + MARGIN, HEAD + lines * (SIDE + TEXT) + 0.1
    figure = Figure(figsize=(width, height), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    for column in range(min(COLUMNS, len(backdoors))):
        for place, part in enumerate(PARTS):
            x = MARGIN + column * cell + place * (SIDE + GAP) + SIDE / 2
            figure.text(x / width, 1 - 0.45 / height, part, ha="center", color=GREY, fontsize=10)
    for number, (name, (task, backdoor)) in enumerate(backdoors.items()):
        clean = torch.as_tensor(task.test[row].inputs)
        triggered = torch.as_tensor(backdoor.trigger(clean, row))
        change, factor = magnified(clean, triggered)
        spectrum = frequency_residual(clean, triggered)
        difference = visibility(clean, triggered)
        psnr = "identical" if difference.psnr is None else f"PSNR {difference.psnr:.1f}"
        x0 = MARGIN + (number % COLUMNS) * cell
        top = height - HEAD - (number // COLUMNS) * (SIDE + TEXT)
        pictures = (clean, triggered, change, in_colors(spectrum, max(1.0, float(spectrum.max()))))
        for place, picture in enumerate(pictures):
            x = x0 + place * (SIDE + GAP)
            axes: Any = figure.add_axes((x / width, (top - SIDE) / height, SIDE / width, SIDE / height))
            pixels = picture[0].permute(1, 2, 0).numpy()
            axes.imshow(
                pixels[..., 0] if pixels.shape[2] == 1 else pixels,
                cmap="gray",
                vmin=0,
                vmax=255,
                interpolation="nearest",
            )
            axes.set_axis_off()
        figure.text(
            x0 / width, (top - SIDE - 0.17) / height, name, fontweight="bold", color=INK, fontsize=11, va="center"
        )
        caption = f"{psnr}  SSIM {difference.ssim:.3f}  L∞ {difference.linf}  x{factor}"
        figure.text(
            (x0 + cell - MARGIN - GAP) / width,
            (top - SIDE - 0.17) / height,
            caption,
            color=GREY,
            fontsize=8.5,
            ha="right",
            va="center",
        )
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lstrip(".") or "png")
    write_atomically(path, buffer.getvalue())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", default="runs")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--skip", type=int, default=0, help="show a later test sample")
    args = parser.parse_args()
    backdoors = latest(Runner(Store(args.store)), args.dataset)
    if not backdoors:
        raise SystemExit(f"no attacks on {args.dataset} in {args.store}")
    draw(backdoors, rows_shown(backdoors, args.skip), args.out)
    print(f"{len(backdoors)} attacks: {', '.join(backdoors)}")


if __name__ == "__main__":
    main()
