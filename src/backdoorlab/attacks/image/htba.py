"""HTBA: a hidden trigger; poisoned images look like the target class and never show the patch.

Saha, Subramanya, Pirsiavash, "Hidden Trigger Backdoor Attacks", AAAI 2020 (arXiv 1910.00033).

Images z of the target class take the features, under the extractor phi of a clean model, of patched images of other
classes, without leaving a box around what they were:

    min over z of sum |phi(z_k) - phi(s_a(k))|^2,   |z_k - x_k| <= eps

At every step the images are paired anew with the patched ones, greedily one to one, the closest pair first. Labels stay
true. The patch, four by four random colors enlarged, is pasted at a random place: in the images aimed at, and at test
time, where the place is a function of the sample's index.

Choices: sources are random samples of all other classes (the paper's attack from many classes), as many as there are
images in a batch of 100. Steps are Adam's, in the paper plain gradient steps whose length suits one network's features;
they end early when they no longer help. Values lie in grey levels, so that the box holds exactly after rounding.
``victim="finetune"`` is the paper's: a new last layer on the attacker's extractor, features without augmentation,
fitted until it converges. The extractor has seen the clean training set, the paper's another one. "scratch" trains
everything, for which the paper makes no claim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorlab.attacks.base import attacks
from backdoorlab.attacks.common.collision import CollisionAttack, greedy_pairs, in_levels
from backdoorlab.attacks.triggers.base import Trigger
from backdoorlab.attacks.triggers.patch import PlacedPatchTrigger
from backdoorlab.core.errors import InputError
from backdoorlab.core.method import param
from backdoorlab.core.seeding import spawn
from backdoorlab.modalities.filters import expect_images
from backdoorlab.modalities.image import to_uint8
from backdoorlab.models.anatomy import features
from backdoorlab.models.classifier import Classifier
from backdoorlab.tasks import Task
from backdoorlab.training.context import Context
from backdoorlab.training.evaluate import predict_features


def draw_colors(channels: int, side: int, generator: torch.Generator) -> Tensor:
    """Four by four random colors, enlarged bilinearly: uint8 [channels, side, side]."""
    cells = torch.randint(0, 256, (1, channels, 4, 4), generator=generator).float()
    return to_uint8(F.interpolate(cells, (side, side), mode="bilinear", align_corners=False))[0]


def hide(
    model: Classifier, images: Tensor, target_features: Tensor, eps: int, lr: float, steps: int, ctx: Context
) -> Tensor:
    """Move images, within a box, until their features are those of patched ones.

    Args:
        model: the surrogate, frozen and in evaluation mode.
        images: uint8 [N,C,H,W].
        target_features: features of patched images, float [M,D], M >= N; paired anew at every step.
        eps: half side of the box, in grey levels.
        lr: of Adam, as a share of the grey range; times 0.95 after every 2,000 steps.
        steps: at most so many; fewer once 100 of them lower the distance by less than one percent.
        ctx: device, progress.

    Returns:
        uint8 [N,C,H,W] on the CPU.
    """
    start, target_features = images.to(ctx.device).float(), target_features.to(ctx.device)
    low, high = (start - eps).clamp(min=0), (start + eps).clamp(max=255)
    z = start.clone().requires_grad_()
    adam = torch.optim.Adam([z], lr=255 * lr)
    total, before = torch.zeros((), device=ctx.device), float("inf")
    for step in ctx.track(range(steps), "htba: hiding the trigger", steps):
        current = features(model, in_levels(model, z))
        with torch.no_grad():
            paired = target_features[greedy_pairs(torch.cdist(current, target_features))]
        loss = (current - paired).square().sum()
        (z.grad,) = torch.autograd.grad(loss, z)
        adam.param_groups[0]["lr"] = 255 * lr * 0.95 ** (step // 2000)
        adam.step()
        with torch.no_grad():
            z.copy_(torch.minimum(torch.maximum(z, low), high))
            total += loss
        if step % 100 == 99:
            now, total = float(total), torch.zeros_like(total)
            if now > 0.99 * before:
                break
            before = now
    return to_uint8(z.detach()).cpu()


@attacks.register
@dataclass(frozen=True, kw_only=True)
class Htba(CollisionAttack):
    """Target-class images with the features of patched images of other classes; the patch itself stays hidden."""

    name: ClassVar[str] = "htba"
    paper: ClassVar[str] = "Saha et al., Hidden Trigger Backdoor Attacks, AAAI 2020, arXiv 1910.00033"
    year: ClassVar[int] = 2020
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    stronger: ClassVar[str] = "raise size"

    size: int | None = param(None, "side of the patch in pixels; none = a quarter of the image", low=1, source="paper")
    eps: int = param(16, "largest change of a poisoned image, in grey levels", low=1, high=255, source="paper")
    lr: float = param(
        0.01, "Adam's learning rate for the poisoned images, as a share of the grey range", above=0, source="paper"
    )
    steps: int = param(5000, "largest number of optimisation steps", low=1, source="paper")
    batch_size: int = param(100, "images that are optimised and paired together", low=1, source="paper")

    def make_trigger(self, task: Task, ctx: Context) -> PlacedPatchTrigger:
        """Random colors, at a place that is drawn for each sample."""
        channels, height, width = expect_images(task.train.inputs).shape[1:]
        side = self.size or max(1, min(height, width) // 4)
        if side > min(height, width):
            raise InputError(
                f"htba: a patch of {side} px does not fit an image of {height}x{width}; "
                f"size may be at most {min(height, width)}"
            )
        return PlacedPatchTrigger(draw_colors(channels, side, ctx.generator("patch")), spawn(ctx.generator("places")))

    def collide(self, model: Classifier, images: Tensor, sources: Tensor, trigger: Trigger, ctx: Context) -> Tensor:
        """Hide the patch in batches; each has as many random sources, patched at random places."""
        generator, parts = ctx.generator("sources"), []
        for part in images.split(self.batch_size):
            drawn = torch.randint(0, len(sources), (len(part),), generator=generator)
            patched = trigger(sources[drawn], generator=generator)
            target_features = predict_features(model, patched, precision="fp32")
            parts.append(hide(model, part, target_features, self.eps, self.lr, self.steps, ctx))
        return torch.cat(parts)
