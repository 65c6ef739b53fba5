"""Pictures of what a diffusion model draws: grids of samples side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from backdoorlab.attacks.diffusion.base import DiffusionBackdoor
from backdoorlab.core.errors import InputError
from backdoorlab.tasks.diffusion.task import DiffusionTask
from backdoorlab.training.context import Context


def tile(images: Tensor, columns: int = 8, gap: int = 1) -> Tensor:
    """Images in rows, separated by mid-grey lines.

    Args:
        images: uint8 [N,C,H,W], N >= 1; places that are left over stay grey.
        columns: images per row.
        gap: width of the lines in pixels.

    Returns:
        uint8 [H',W',C].
    """
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    canvas = torch.full((rows * columns, channels, height + gap, width + gap), 128, dtype=torch.uint8)
    canvas[:count, :, gap:, gap:] = images
    grid = canvas.reshape(rows, columns, channels, height + gap, width + gap).permute(0, 3, 1, 4, 2)
    return grid.reshape(rows * (height + gap), columns * (width + gap), channels)


def save_grids(path: str | Path, panels: Mapping[str, Tensor], *, columns: int = 8) -> Path:
    """Write one PNG with a titled grid per set of images.

    Args:
        path: of the file; its folder is made if missing.
        panels: title -> uint8 [N,C,H,W].
        columns: images per row of a grid.

    Returns:
        The path.

    Raises:
        InputError: for no panels or a panel without images.
    """
    empty = [title for title, images in panels.items() if not len(images)]
    if not panels or empty:
        raise InputError(f"need at least one panel, each with images; empty: {', '.join(empty) or 'all'}")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(panels), 3.6), layout="constrained")
    for place, (title, images) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), place)
        grid = tile(images, columns).numpy()
        axes.imshow(grid if grid.shape[2] == 3 else grid[..., 0], cmap="gray", vmin=0, vmax=255)
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, bbox_inches="tight")
    return path


def save_comparison(
    path: str | Path, backdoor: DiffusionBackdoor, task: DiffusionTask, context: Context, *, count: int = 40
) -> Path:
    """Write one PNG with what the clean and the backdoored model make of plain and of triggered noise.

    Args:
        path: of the file.
        backdoor: the attack's result.
        task: for the clean model.
        context: its seed fixes the noise, which is the same for all four grids.
        count: images per grid.
    """
    panels = {
        f"{name} model, {'triggered' if triggered else 'plain'} noise": backdoor.generate(
            task, context, count, triggered=triggered, model=model
        )
        for name, model in (("clean", task.clean_model(context)), ("backdoored", backdoor.model))
        for triggered in (False, True)
    }
    return save_grids(path, panels)
