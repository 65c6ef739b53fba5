"""TUAP: a universal adversarial perturbation toward the target class, hidden in images of that class.

Zhao, Ma, Zheng, Bailey, Chen, Jiang, "Clean-Label Backdoor Attacks on Video Recognition Models", CVPR 2020 (arXiv
2003.03030).

On a clean model f a perturbation v is collected that moves any image toward class t: images that x + v does not bring
there yet are pushed across the boundary by targeted DeepFool,

    r <- r + |f_t - f_k| w / |w|^2,   w = grad (f_t - f_k) at x + v + (1 + overshoot) r,   k the best other class,

and v takes up the mean push of a batch, clipped to |v| <= eps, until enough images arrive in class t. It is added to
target-class training images, whose label stays true, and to any image at test time:

    T(x) = clip(x + v)

Choices: the paper's trigger is a patch in a corner of a video, and poisoned clips are perturbed adversarially as well;
this is the image version of BackdoorBox, a perturbation of the whole picture by DeepFool, with its settings. There one
image after the other adds its push; here the pushes of a few images, found together, are averaged (``batch_size=1`` is
the published order). DeepFool needs one gradient per step, that of f_t - f_k. Passes end early when five in a row gain
nothing, and the best v of them is kept, in whole grey levels. f is a benign model of the task's own architecture and
recipe, made once per task and shared by all runs, and so is v. No fewer than 100 images are used. Benign models obey an
adversarial perturbation, too: compare with one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backdoorlab.attacks.base import attacks
from backdoorlab.attacks.common.assets import SELECTION, asset
from backdoorlab.attacks.common.surrogate import clean_surrogate
from backdoorlab.attacks.poisoning import PoisoningAttack
from backdoorlab.attacks.selection import class_rate
from backdoorlab.attacks.triggers.pixels import AdditiveTrigger
from backdoorlab.core.errors import InputError, NotApplicable
from backdoorlab.core.method import param
from backdoorlab.data.split import take
from backdoorlab.modalities.filters import expect_images
from backdoorlab.models.anatomy import frozen
from backdoorlab.models.classifier import Classifier
from backdoorlab.tasks import Task
from backdoorlab.training.context import Context, Tensors


def margins(model: Classifier, inputs: Tensor, target: int) -> Tensor:
    """Logit of the target class less the best other one, float [N]: positive where ``inputs`` are classified as it."""
    logits = model(inputs)
    others = logits.index_fill(1, torch.tensor([target], device=logits.device), -torch.inf)
    return logits[:, target] - others.amax(1)


def targeted_deepfool(model: Classifier, inputs: Tensor, target: int, overshoot: float, steps: int) -> Tensor:
    """The nearly smallest push that brings each image into the target class, all images at once.

    Args:
        model: frozen, in evaluation mode.
        inputs: prepared images [N,C,H,W].
        target: class to reach.
        overshoot: by which share each push is lengthened, to cross the boundary rather than to end on it.
        steps: at most so many linearisations for an image.

    Returns:
        [N,C,H,W]: the pushes (lengthened); zero for images that are of the target class already.
    """
    push = torch.zeros_like(inputs)
    rows = torch.arange(len(inputs), device=inputs.device)
    for _ in range(steps):
        moved = (inputs[rows] + (1 + overshoot) * push[rows]).requires_grad_()
        gap = margins(model, moved, target)
        (slope,) = torch.autograd.grad(gap.sum(), moved)
        far = (gap.detach() <= 0).nonzero().flatten()  # those that have arrived drop out
        if not len(far):
            break
        rows, slope = rows[far], slope[far]
        scale = gap.detach()[far].abs() / slope.square().sum((1, 2, 3)).clamp_min(1e-12)
        push[rows] += scale[:, None, None, None] * slope
    return (1 + overshoot) * push


def universal_perturbation(
    model: Classifier,
    images: Tensor,
    target: int,
    *,
    eps: float,
    overshoot: float,
    steps: int,
    fooling: float,
    passes: int,
    batch_size: int,
    ctx: Context,
) -> tuple[Tensor, float]:
    """One perturbation that brings a share of all images into the target class.

    Args:
        model: frozen, in evaluation mode.
        images: uint8 [N,C,H,W], of other classes.
        target: class to reach.
        eps: largest value, as a share of the grey range.
        overshoot: of DeepFool.
        steps: most linearisations of DeepFool for an image.
        fooling: share of the images to be brought into the target class.
        passes: at most so many over the images; fewer if five in a row gain no further percent.
        batch_size: images whose pushes are averaged.
        ctx: seed, device, progress.

    Returns:
        float32 [C,H,W] in [-eps, eps] on the CPU, the best after any pass, and the share that it fools.
    """
    generator = ctx.generator("order")
    inputs = model.modality.prepare(images.to(ctx.device))
    noise = torch.zeros(images.shape[1:], device=ctx.device)
    best, reached, shares = noise, 0.0, []
    for _ in ctx.track(range(passes), "tuap: collecting the perturbation", passes):
        for rows in torch.randperm(len(images), generator=generator).split(batch_size):
            seen = (inputs[rows.to(ctx.device)] + noise).clamp(0, 1)
            push = targeted_deepfool(model, seen, target, overshoot, steps)
            moved = push.flatten(1).any(1)
            noise = (noise + push.sum(0) / moved.sum().clamp_min(1)).clamp(-eps, eps)
        with torch.no_grad():
            arrived = [(margins(model, (part + noise).clamp(0, 1), target) > 0) for part in inputs.split(512)]
        share = float(torch.cat(arrived).float().mean())
        if share >= reached:
            best, reached = noise, share
        shares.append(share)
        stalled = len(shares) > 5 and 0 < max(shares[-5:]) <= max(shares[:-5]) + 0.01
        if reached >= fooling or stalled:
            break
    return best.cpu(), reached


@attacks.register
@dataclass(frozen=True, kw_only=True)
class Tuap(PoisoningAttack):
    """A universal adversarial perturbation, added to target-class images and at test time."""

    name: ClassVar[str] = "tuap"
    paper: ClassVar[str] = "Zhao et al., Clean-Label Backdoor Attacks on Video Recognition, CVPR 2020, arXiv 2003.03030"
    year: ClassVar[int] = 2020
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    trigger_visibility: ClassVar[str] = "subtle"
    stronger: ClassVar[str] = "raise eps"
    label_mode: ClassVar[str] = "clean"
    needs_surrogate: ClassVar[bool] = True
    asset_kinds: ClassVar[tuple[str, ...]] = ("tuap-perturbation", "clean-surrogate")

    poison_rate: float | None = class_rate()
    eps: float = param(10.0, "largest value of the perturbation, in grey levels", low=1, high=255, source="BackdoorBox")
    fooling: float = param(0.8, "share of images to be misled", above=0, high=1, source="BackdoorBox")
    overshoot: float = param(0.02, "by which each DeepFool push is lengthened", low=0, source="BackdoorBox")
    deepfool_steps: int = param(50, "most linearisations for an image", low=1, source="BackdoorBox")
    share: float = param(0.01, "of the training set used (at least 100)", above=0, high=1, source="BackdoorBox")
    passes: int = param(50, "most passes over these images", low=1, source="ours")
    batch_size: int = param(8, "images whose pushes are averaged", low=1, source="ours")

    def make_trigger(self, task: Task, ctx: Context) -> AdditiveTrigger:
        """Collect the perturbation; whole grey levels."""
        self.target_map_for(task)
        images = expect_images(task.train.inputs)
        if not bool((task.train.labels != self.target).any()):
            raise InputError(f"tuap: the training set has no samples of other classes than {self.target}")
        pattern = self.collected(ctx, surrogate=task).tensor("v", tuple(images.shape[1:])).round()
        if not pattern.any():
            raise NotApplicable(
                f"tuap: the clean model already says class {self.target} for these images, so nothing pushes them "
                "there; train it longer or choose another target"
            )
        return AdditiveTrigger(pattern)

    @asset("tuap-perturbation", unread=SELECTION)
    def collected(self, ctx: Context, surrogate: Task) -> Tensors:
        """The perturbation as "v", float32 [C,H,W] in grey levels, and "reached", the share of images that it fools."""
        images, labels = expect_images(surrogate.train.inputs), surrogate.train.labels
        others = (labels != self.target).nonzero().flatten()
        model = clean_surrogate(surrogate, ctx)
        count = max(100, round(self.share * len(images)))
        order = torch.randperm(len(others), generator=ctx.generator("samples"))
        with frozen(model):
            noise, reached = universal_perturbation(
                model,
                expect_images(take(images, others[order[:count]])),
                self.target,
                eps=int(self.eps) / 255,
                overshoot=self.overshoot,
                steps=self.deepfool_steps,
                fooling=self.fooling,
                passes=self.passes,
                batch_size=self.batch_size,
                ctx=ctx,
            )
        ctx.reporter.note(f"tuap: the perturbation brings {reached:.0%} of the images into the target class")
        return {"v": 255 * noise, "reached": torch.tensor(reached)}
