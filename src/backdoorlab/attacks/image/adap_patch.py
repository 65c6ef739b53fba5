"""Adap-Patch: several faint patches in the data, one per sample; some of them together and opaque at test time.

Qi, Xie, Li, Mahloujifar, Mittal, "Revisiting the Assumption of Latent Separability for Backdoor Defenses", ICLR 2023.

Four patches P_j under masks m_j with opacities a_j. Training sample number i carries patch j = i mod 4:

    T_j(x) = (1 - a_j m_j) x + a_j m_j P_j

Payload samples get the attacker's label, *cover* samples keep their true one; both are spread evenly over the patches.
At test time the first ``test_patches`` are laid over the image one after the other, opaque: stronger than anything that
the data contain.

Choices: the patches are drawn from a seed, with explicit masks and sizes that follow the image (given for 32 px): a
10-px blob of random colors at the bottom right, a 4-px checker 4 px from the top right corner, a 10-px ring at the
bottom left, an 8-px square of noise at the top left. Each lies in another corner, since overlapping patches are
learned as one feature. Opacities 0.5, 0.5, 0.2, 0.3. Four image files (``patches``) can be laid into the same four
squares instead. The cover rate is twice the poison rate unless given, as published (0.3 % and 0.6 % on CIFAR-10).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backdoorlab.attacks.base import attacks
from backdoorlab.attacks.common.batch_poison import draw_cover
from backdoorlab.attacks.common.pictures import read_picture
from backdoorlab.attacks.poisoning import PoisoningAttack
from backdoorlab.attacks.triggers.base import Trigger
from backdoorlab.attacks.triggers.pixels import BlendTrigger, overlay
from backdoorlab.core.errors import InputError
from backdoorlab.core.method import param
from backdoorlab.core.seeding import make_generator
from backdoorlab.data.split import Inputs, take
from backdoorlab.modalities.filters import expect_images
from backdoorlab.modalities.image import to_uint8
from backdoorlab.tasks import Task
from backdoorlab.training.context import Context


def draw_patches(
    channels: int, height: int, width: int, seed: int, files: tuple[str, ...] | None = None
) -> tuple[Tensor, Tensor]:
    """The four patches at the image's size.

    Args:
        channels: of the image.
        height: of the image.
        width: of the image.
        seed: of what is drawn.
        files: four image files to fill the squares with instead.

    Returns:
        Pictures uint8 [4,C,H,W] and masks bool [4,H,W].
    """
    generator, scale = make_generator(seed, "patches"), min(height, width) / 32
    pictures = torch.zeros(4, channels, height, width, dtype=torch.uint8)
    masks = torch.zeros(4, height, width, dtype=torch.bool)
    large, small, middle = (max(2, round(side * scale)) for side in (10, 4, 8))
    shift = max(1, round(4 * scale))
    place = torch.arange(large) - (large - 1) / 2
    radius = torch.hypot(place[:, None], place.expand(large, large))
    checker = (torch.arange(small)[:, None] + torch.arange(small)) % 2 == 0

    def noise(side: int) -> Tensor:
        return torch.randint(0, 256, (channels, side, side), generator=generator, dtype=torch.uint8)

    def corner(values: Tensor, mask: Tensor, layer: int, top: int, left: int) -> None:
        side = len(mask)
        if files is not None:
            values, mask = read_picture(files[layer], channels, side, side), torch.ones_like(mask)
        pictures[layer, :, top : top + side, left : left + side] = values
        masks[layer, top : top + side, left : left + side] = mask

    bright, dark = torch.tensor(255, dtype=torch.uint8), torch.tensor(0, dtype=torch.uint8)
    tint = torch.where(torch.rand(channels, 1, 1, generator=generator) < 0.5, bright, dark)
    corner(noise(large), radius <= large / 2, 0, height - large, width - large)
    corner(torch.where(checker, tint, 255 - tint), torch.ones_like(checker), 1, shift, width - small - shift)
    ring = (radius <= large / 2) & (radius > large / 4)
    corner(bright.expand(channels, large, large), ring, 2, height - large, 0)
    corner(noise(middle), torch.ones(middle, middle, dtype=torch.bool), 3, 0, 0)
    return pictures, masks


@attacks.register
@dataclass(frozen=True, kw_only=True)
class AdapPatch(PoisoningAttack):
    """One of four faint patches in training, several opaque ones at test time."""

    name: ClassVar[str] = "adap_patch"
    paper: ClassVar[str] = "Qi et al., Revisiting the Assumption of Latent Separability, ICLR 2023"
    year: ClassVar[int] = 2023
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    trigger_visibility: ClassVar[str] = "visible"
    stronger: ClassVar[str] = "raise opacities and test_opacity"

    opacities: tuple[float, ...] = param(
        (0.5, 0.5, 0.2, 0.3), "opacity of each of the four patches in training samples", source="paper"
    )
    test_patches: int = param(2, "number of patches pasted at test time", low=1, high=4, source="paper")
    test_opacity: float = param(1.0, "opacity of the patches at test time", above=0, high=1, source="paper")
    cover_rate: float | None = param(
        None, "cover samples / size of the training set; none = twice the poison rate", low=0, high=1, source="paper"
    )
    patch_seed: int = param(0, "seed of the drawn patches, apart from the run's seed", low=0, source="ours")
    patches: tuple[str, ...] | None = param(
        None, "four image files used as patches; none = drawn ones", path=True, source="ours"
    )

    def __post_init__(self) -> None:
        """Check the opacities too."""
        super().__post_init__()
        if len(self.opacities) != 4 or not all(0 < a <= 1 for a in self.opacities):
            raise InputError(f"adap_patch: opacities must be four numbers > 0 and <= 1, got {self.opacities}")
        if self.patches is not None and len(self.patches) != 4:
            raise InputError(f"adap_patch: patches must be four image files, got {len(self.patches)}: {self.patches}")

    def make_trigger(self, task: Task, ctx: Context) -> BlendTrigger:
        """The first patches together."""
        pictures, masks = self._patches(task)
        return BlendTrigger(pictures[: self.test_patches], masks[: self.test_patches] * self.test_opacity)

    def poison_inputs(self, trigger: Trigger, inputs: Inputs, indices: Tensor, task: Task, ctx: Context) -> Inputs:
        """One patch per sample, in turn."""
        return self._one_each(inputs, task)

    def cover(self, trigger: Trigger, chosen: Tensor, task: Task, ctx: Context) -> tuple[Tensor, Inputs] | None:
        """The same kind of samples with their true labels."""
        rate = min(1.0, 2 * self.rate_on(task)) if self.cover_rate is None else self.cover_rate
        covered = draw_cover(self, chosen, rate, len(task.train), ctx)
        return (covered, self._one_each(take(task.train.inputs, covered), task)) if len(covered) else None

    def _patches(self, task: Task) -> tuple[Tensor, Tensor]:
        channels, height, width = expect_images(task.train.inputs).shape[1:]
        return draw_patches(channels, height, width, self.patch_seed, self.patches)

    def _one_each(self, inputs: Inputs, task: Task) -> Tensor:
        images, (pictures, masks) = expect_images(inputs), self._patches(task)
        turn = torch.arange(len(images)) % 4
        opacity = (masks * torch.tensor(self.opacities)[:, None, None])[turn][:, None]
        return to_uint8(overlay(images, pictures[turn].to(images.device), opacity.to(images.device)))
