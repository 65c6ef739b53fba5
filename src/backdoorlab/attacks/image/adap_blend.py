"""Adap-Blend: random pieces of a key image in the data, the whole key at test time, covers with true labels.

Qi, Xie, Li, Mahloujifar, Mittal, "Revisiting the Assumption of Latent Separability for Backdoor Defenses", ICLR 2023.

The plane is cut into p x p equal pieces. For each training sample a random half of them is chosen; with the mask m of
these pieces, key image G and blend ratio a,

    T_train(x) = (1 - a m) x + a m G

Payload samples get the attacker's label, as many *cover* samples keep their true one. So no single piece decides, and
in latent space poisoned samples do not stand apart. At test time all pieces are blended, at a higher ratio.

Choices: masks are drawn once, when the data are poisoned. Where the side is no multiple of p, pieces have ceil(side /
p) pixels and the last are smaller. The cover rate equals the poison rate unless given (published: 0.3 % each on
CIFAR-10). Covers come from the samples that are left, whatever their class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from backdoorlab.attacks.base import attacks
from backdoorlab.attacks.common.batch_poison import draw_cover
from backdoorlab.attacks.common.pictures import key_image, read_picture
from backdoorlab.attacks.poisoning import PoisoningAttack
from backdoorlab.attacks.triggers.base import Trigger
from backdoorlab.attacks.triggers.pixels import BlendTrigger, constant_blend, key_of, overlay, picture_hash
from backdoorlab.core.errors import InputError
from backdoorlab.core.method import param
from backdoorlab.data.split import Inputs, Poison, take
from backdoorlab.modalities.filters import expect_images
from backdoorlab.modalities.image import to_uint8
from backdoorlab.tasks import Task
from backdoorlab.training.context import Context


def piece_index(height: int, width: int, pieces: int) -> Tensor:
    """Which piece each pixel belongs to, row by row: int64 [height, width]."""
    rows = torch.arange(height) // -(-height // pieces)
    columns = torch.arange(width) // -(-width // pieces)
    return rows[:, None] * pieces + columns


def random_half(count: int, pieces: int, generator: torch.Generator) -> Tensor:
    """For each sample, which pieces are shown (exactly half, rounded down, but at least one): bool [count, pieces]."""
    rank = torch.rand(count, pieces, generator=generator).argsort(1).argsort(1)
    return rank < max(1, pieces // 2)


@attacks.register
@dataclass(frozen=True, kw_only=True)
class AdapBlend(PoisoningAttack):
    """Random pieces of a blended key in training, the whole key at test time."""

    name: ClassVar[str] = "adap_blend"
    paper: ClassVar[str] = "Qi et al., Revisiting the Assumption of Latent Separability, ICLR 2023"
    year: ClassVar[int] = 2023
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    trigger_visibility: ClassVar[str] = "visible"
    stronger: ClassVar[str] = "raise alpha_train and alpha_test"

    alpha_train: float = param(
        0.15, "blend ratio of the key image in poisoned training samples", above=0, high=1, source="paper"
    )
    alpha_test: float = param(0.2, "blend ratio of the key image at test time", above=0, high=1, source="paper")
    pieces: int = param(
        4,
        "pieces of the key image per side; half of all pieces are blended into a training sample",
        low=1,
        high=16,
        source="paper",
    )
    cover_rate: float | None = param(
        None, "cover samples / size of the training set; none = poison_rate", low=0, high=1, source="ours"
    )
    key: str | None = param(None, "image file used as the key image; none = a drawn one", path=True, source="ours")
    key_seed: int = param(0, "seed from which the key image is drawn, apart from the run's seed", low=0, source="ours")

    def make_trigger(self, task: Task, ctx: Context) -> BlendTrigger:
        """The whole key at the test ratio."""
        channels, height, width = expect_images(task.train.inputs).shape[1:]
        if self.pieces > min(height, width):
            raise InputError(
                f"adap_blend: {self.pieces} pieces per side do not fit an image of {height}x{width}; "
                f"pieces may be at most {min(height, width)}"
            )
        if self.key is not None:
            return constant_blend(read_picture(self.key, channels, height, width), self.alpha_test, resizable=True)
        return constant_blend(key_image(channels, height, width, self.key_seed), self.alpha_test, resizable=True)

    def poison_inputs(self, trigger: Trigger, inputs: Inputs, indices: Tensor, task: Task, ctx: Context) -> Inputs:
        """A random half of the pieces, another one for each sample."""
        return self._pieces(trigger, inputs, ctx.generator("pieces", "payload"))

    def cover(self, trigger: Trigger, chosen: Tensor, task: Task, ctx: Context) -> tuple[Tensor, Inputs] | None:
        """The same kind of samples with their true labels."""
        rate = self.rate_on(task) if self.cover_rate is None else self.cover_rate
        covered = draw_cover(self, chosen, rate, len(task.train), ctx)
        images = take(task.train.inputs, covered)
        return (covered, self._pieces(trigger, images, ctx.generator("pieces", "cover"))) if len(covered) else None

    def _pieces(self, trigger: Trigger, inputs: Inputs, generator: torch.Generator) -> Tensor:
        images, key = expect_images(inputs), key_of(trigger)
        shown = random_half(len(images), self.pieces**2, generator)
        mask = shown[:, piece_index(key.shape[1], key.shape[2], self.pieces)].float()[:, None]
        return to_uint8(overlay(images, key.to(images.device), self.alpha_train * mask.to(images.device)))

    def notes(self, trigger: Trigger, poison: Poison, task: Task) -> dict[str, Any]:
        """Adds the hash of the key image."""
        return super().notes(trigger, poison, task) | {"key_sha256": picture_hash(key_of(trigger))}
