"""FC: feature collision, used as a backdoor; poisoned images look like the target class to people, not to the network.

Shafahi, Huang, Najibi, Suciu, Studer, Dumitras, Goldstein, "Poison Frogs! Targeted Clean-Label Poisoning Attacks on
Neural Networks", NeurIPS 2018 (arXiv 1804.00792); as a backdoor in Li et al., "Anti-Backdoor Learning", NeurIPS 2021.

Each chosen image x of the target class gets the features of a triggered image of another class, T(s), under the
extractor phi of a clean model:

    min over z of |phi(z) - phi(T(s))|^2 / D + (beta / 2) |z - x|^2 / d

by forward-backward splitting: a gradient step on the first term, then the proximal map of the second,

    z <- clip((z' + l beta x) / (1 + l beta)),   z' = z - l grad |phi(z) - phi(T(s))|^2,   l the step size.

Labels stay true. The trigger, a patch in a corner, is pasted on images only at test time.

Choices: the original attack misleads one chosen test image; here the collided images are triggered samples of all other
classes, a random one each, so that the trigger itself is learned. D is the mean distance at the start and d the number
of pixel values, which makes beta a pure number for any network; the paper's weight depends on the features' scale. Its
rule for the step size (halve and step back when the cost rises) is applied to each image, and momentum is added, which
needs fewer steps; ``momentum=0`` is the paper's. ``opacity`` is the paper's
watermark, off as in its transfer setting. ``victim="finetune"`` is the paper's transfer setting: a new last layer on
the attacker's extractor; "scratch" trains everything, the setting of Anti-Backdoor Learning. There is no bound on
single pixels: the card says how far they moved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backdoorlab.attacks.base import attacks
from backdoorlab.attacks.common.collision import CollisionAttack, in_levels
from backdoorlab.attacks.triggers.base import Trigger
from backdoorlab.attacks.triggers.patch import CORNERS, PATTERNS, PatchTrigger, draw_patch
from backdoorlab.attacks.triggers.pixels import overlay
from backdoorlab.core.errors import InputError
from backdoorlab.core.method import param
from backdoorlab.modalities.filters import expect_images
from backdoorlab.modalities.image import to_uint8
from backdoorlab.models.anatomy import features
from backdoorlab.models.classifier import Classifier
from backdoorlab.tasks import Task
from backdoorlab.training.context import Context
from backdoorlab.training.evaluate import predict_features


def forward_backward(z: Tensor, gradient: Tensor, base: Tensor, step: Tensor, beta: float, drift: Tensor) -> Tensor:
    """One step of forward-backward splitting: down the gradient, then the proximal map of beta/2 |z - base|^2.

    Args:
        z: images now, grey levels, float [N,C,H,W].
        gradient: of the feature distance with respect to ``z``.
        base: images that ``z`` shall stay near.
        step: float [N,1,1,1], > 0.
        beta: weight of nearness.
        drift: added to the first half of the step, as momentum.

    Returns:
        Images in [0, 255], of the same shape.
    """
    moved = z - step * gradient + drift
    return ((moved + step * beta * base) / (1 + step * beta)).clamp(0, 255)


def distance_and_gradient(model: Classifier, z: Tensor, target_features: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance of features to those aimed at [N,D]: float [N], and its gradient with respect to ``z``."""
    z = z.detach().requires_grad_()
    loss = (features(model, in_levels(model, z)) - target_features).square().sum(1)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    return loss.detach(), gradient


def attract(
    model: Classifier,
    base: Tensor,
    target_features: Tensor,
    beta: float,
    step: float,
    steps: int,
    momentum: float,
    ctx: Context,
) -> Tensor:
    """Images near ``base`` whose features are near ``target_features``, all at once, each with a step size of its own.

    A step that raises an image's cost is taken back and halved, and the image starts anew without momentum; after one
    that lowers it the next is a tenth longer.

    Args:
        model: the surrogate, frozen and in evaluation mode.
        base: uint8 [N,C,H,W].
        target_features: features, float [N,D].
        beta: weight of the mean squared change of pixels, see the module.
        step: root mean square change by the first step, in grey levels.
        steps: passes.
        momentum: share of an image's last step that the next one repeats.
        ctx: device, progress.

    Returns:
        uint8 [N,C,H,W] on the CPU.
    """
    base, target_features = base.to(ctx.device).float(), target_features.to(ctx.device)
    pixels = base[0].numel()
    distance, gradient = distance_and_gradient(model, base, target_features)
    # The paper's cost, times the number of pixels over the mean distance at the start: free of the features' scale.
    unit = pixels / distance.mean().clamp_min(1e-12)
    z, gradient, cost = base, unit * gradient, unit * distance
    rate = step * pixels**0.5 / gradient.flatten(1).norm(dim=1).clamp_min(1e-12)
    last = torch.zeros_like(z)
    for _ in ctx.track(range(steps), "fc: colliding features", steps):
        trial = forward_backward(z, gradient, base, rate[:, None, None, None], beta, momentum * last)
        distance, slope = distance_and_gradient(model, trial, target_features)
        value = unit * distance + beta / 2 * (trial - base).square().sum((1, 2, 3))
        better = value < cost
        accept = better[:, None, None, None]
        last = torch.where(accept, trial - z, 0.0)
        z, gradient = torch.where(accept, trial, z), torch.where(accept, unit * slope, gradient)
        cost, rate = torch.where(better, value, cost), rate * torch.where(better, 1.1, 0.5)
    return to_uint8(z).cpu()


@attacks.register
@dataclass(frozen=True, kw_only=True)
class Fc(CollisionAttack):
    """Target-class images whose features collide with those of triggered images of other classes."""

    name: ClassVar[str] = "fc"
    paper: ClassVar[str] = "Shafahi et al., Poison Frogs, NeurIPS 2018, arXiv 1804.00792"
    year: ClassVar[int] = 2018
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    stronger: ClassVar[str] = "raise size"

    beta: float = param(
        0.0005,
        "weight of the mean squared change of pixels, relative to the distance of features",
        low=0,
        source="ours",
    )
    step: float = param(
        2.0, "root mean square change of an image by the first step, in grey levels", above=0, source="ours"
    )
    steps: int = param(1000, "steps of forward-backward splitting", low=1, source="paper")
    momentum: float = param(
        0.9, "momentum: share of an optimisation step that the next one repeats", low=0, high=0.99, source="ours"
    )
    opacity: float = param(
        0.0, "opacity of the triggered image that is first blended into the poisoned one", low=0, high=1, source="paper"
    )
    size: int | None = param(None, "side of the patch in pixels; none = a quarter of the image", low=1, source="ours")
    position: str = param("bottom-right", "corner of the image in which the patch lies", choices=CORNERS, source="ours")
    offset: int = param(
        0, "distance of the patch from the two borders of its corner, in pixels", low=0, source="BackdoorBench"
    )
    pattern: str = param("checker", "what is drawn in the patch", choices=PATTERNS, source="ours")
    color: int = param(
        255, "grey level of the solid patch and of the checker's bright squares", low=0, high=255, source="ours"
    )

    def make_trigger(self, task: Task, ctx: Context) -> PatchTrigger:
        """Draw the patch at the data's resolution."""
        channels, height, width = expect_images(task.train.inputs).shape[1:]
        side = self.size or max(1, min(height, width) // 4)
        if side + self.offset > min(height, width):
            raise InputError(
                f"fc: a patch of {side} px at offset {self.offset} does not fit an image of {height}x{width}; "
                f"size + offset may be at most {min(height, width)}"
            )
        return PatchTrigger(
            *draw_patch(
                (channels, height, width),
                side,
                self.position,
                self.offset,
                self.pattern,
                self.color,
                ctx.generator("patch"),
            )
        )

    def collide(self, model: Classifier, images: Tensor, sources: Tensor, trigger: Trigger, ctx: Context) -> Tensor:
        """Give each image a random triggered source, all different while there are enough."""
        generator = ctx.generator("sources")
        rounds = -(-len(images) // len(sources))
        order = torch.cat([torch.randperm(len(sources), generator=generator) for _ in range(rounds)])
        triggered = expect_images(trigger(sources[order[: len(images)]]))
        if self.opacity:
            images = to_uint8(overlay(images, triggered, torch.full(images.shape[2:], self.opacity)))
        target_features = predict_features(model, triggered, precision="fp32")
        return torch.cat(
            [
                attract(model, base, targets, self.beta, self.step, self.steps, self.momentum, ctx)
                for base, targets in zip(images.split(512), target_features.split(512), strict=True)
            ]
        )
