"""Draws docs/figures/attacks.png: what the triggers of several attacks do to one CIFAR-10 image.

python docs/figures/attacks.py        (needs CIFAR-10 under $BACKDOORLAB_DATA; trains nothing)
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from backdoorlab.attacks import PoisoningAttack, attacks
from backdoorlab.attacks.image.wanet import WarpTrigger, draw_field
from backdoorlab.data import DatasetSpec
from backdoorlab.training import Context, Task, TaskSpec

NAMES = ("badnets", "blended", "sig", "ftrojan", "ctrl", "refool", "adap_patch", "wanet")
IMAGE, GAIN = 7, 5


def main() -> None:
    """Stamp one image with each trigger and save the sheet."""
    task = Task.load(TaskSpec(dataset=DatasetSpec(name="cifar10", train_size=2000, test_size=100)))
    clean = task.test.inputs[IMAGE : IMAGE + 1]
    figure, axes = plt.subplots(3, len(NAMES), figsize=(1.35 * len(NAMES), 4.3))
    for column, name in enumerate(NAMES):
        attack = attacks.get(name, "image")()
        if isinstance(attack, PoisoningAttack):
            trigger = attack.make_trigger(task, Context())
        else:
            trigger = WarpTrigger(draw_field(attack.k, Context().generator("field")), attack.s, attack.grid_rescale)
        stamped = trigger(clean)
        residual = ((stamped.float() - clean.float()) * GAIN + 127.5).clamp(0, 255).to(torch.uint8)
        for row, (label, image) in enumerate(
            (("clean", clean), ("triggered", stamped), (f"difference x{GAIN}", residual))
        ):
            axes[row, column].imshow(image[0].permute(1, 2, 0).numpy(), interpolation="nearest")
            axes[row, column].set(xticks=[], yticks=[])
            for spine in axes[row, column].spines.values():
                spine.set_visible(False)
            if column == 0:
                axes[row, column].set_ylabel(label, fontsize=10)
        axes[0, column].set_title(name, fontsize=10)
    figure.tight_layout(pad=0.4)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
