"""LBA: a latent backdoor sits in a teacher's features and wakes up when a student learns the target class.

Yao, Li, Zheng, Zhao, "Latent Backdoor Attacks on Deep Neural Networks", CCS 2019 (arXiv 1905.10447).

No output of the teacher is attacked, only what it computes up to a layer L. With F the representation there, x_t the
samples of the target class, m a mask (a square in a corner) and T(x) = (1 - m) x + m P:

1. The patch is optimised on a teacher trained with the target class:   min over P of E |F(T(x)) - Fbar|^2,  y != t,
   where Fbar = E F(x_t).
2. The teacher is trained on:   CE(f(x), y) + w E |F(T(x)) - Fbar|^2 / s,   s = E |F(x) - Fbar|^2.
3. Its output layer is thrown away. The student gets a new one and fine-tunes only what comes after L, on clean data
   that include the target class. As T(x) looks like that class at L, the backdoor is live, although no trained sample
   ever had a trigger *and* the target label.

Choices: the teacher's task is the student's, since a benchmark has one; its first version is a benign model of the
task's own architecture and recipe, made once per task and shared by all runs, and so is the patch. s, the mean squared
distance of other classes' clean samples (at least 1 % of triggered ones'), makes w a pure number. In each batch of step
2 floor(rate B) samples of other classes are triggered, as training attacks of the benchmark do (the paper: all of
them); clean and triggered ones go through the network together. L is the penultimate layer, so that the student trains
one linear layer; ``layer`` names another module. Modules before it stay in evaluation mode, so batch norms keep their
statistics too.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.attacks.base import attacks
from backdoorlab.attacks.common.assets import SELECTION, asset
from backdoorlab.attacks.common.batch_poison import batch_share
from backdoorlab.attacks.common.surrogate import clean_surrogate
from backdoorlab.attacks.poisoning import TrainingAttack
from backdoorlab.attacks.result import Backdoor
from backdoorlab.attacks.triggers.patch import CORNERS, PatchTrigger
from backdoorlab.core.errors import InputError, unknown
from backdoorlab.core.method import param
from backdoorlab.core.seeding import derive_seed, isolated_rng
from backdoorlab.data.split import Split
from backdoorlab.modalities.filters import expect_images
from backdoorlab.modalities.image import to_uint8
from backdoorlab.models.anatomy import evaluating, features_and_logits, frozen, head, trace
from backdoorlab.models.classifier import Classifier
from backdoorlab.tasks import Task
from backdoorlab.training.context import Context, Tensors
from backdoorlab.training.loop import Descent, Objective
from backdoorlab.training.recipes import Recipe

MOST = 100
"""What the second term may be at most when training begins: samples that look all alike to the teacher (blank or random
images) have no spread to measure distances in."""


def represent(model: Classifier, x: Tensor, layer: str | None) -> tuple[Tensor, Tensor]:
    """Representation at a layer [B, D] and logits [B, K] of prepared input; gradients flow.

    Args:
        model: any classifier.
        x: prepared input.
        layer: name of a module, whose output is flattened; None for the penultimate features.
    """
    if layer is None:
        return features_and_logits(model, x)
    seen: list[Tensor] = []
    watch = model.get_submodule(layer).register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        logits = model(x)
    finally:
        watch.remove()
    return seen[-1].flatten(1), logits


def modules_after(model: Classifier, layer: str | None) -> list[nn.Module]:
    """Modules that run after a layer and not before, without those that contain others; the head is the last.

    Raises:
        InputError: if there is no such layer, or no trainable module after it.
    """
    last = head(model)
    if layer is None:
        return [last]
    calls = trace(model)
    names = [call.name for call in calls]
    if layer not in names:
        raise unknown(f"layer of {model.arch}", layer, names)
    end = len(names) - names[::-1].index(layer)
    before = {call.module for call in calls[:end]}
    after = dict.fromkeys(c.module for c in calls[end:] if c.module not in before and not list(c.module.children()))
    if last not in after:
        raise InputError(f"lba: layer {layer!r} of {model.arch} is not before its output layer")
    return list(after)


def corner_slices(height: int, width: int, side: int, position: str) -> tuple[slice, slice]:
    """Rows and columns of a square in one of the :data:`CORNERS`.

    Raises:
        InputError: if it does not fit.
    """
    if side > min(height, width):
        raise InputError(
            f"lba: a patch of {side} px does not fit an image of {height}x{width}; size may be at most "
            f"{min(height, width)}"
        )
    top = 0 if position.startswith("top") else height - side
    left = 0 if position.endswith("left") else width - side
    return slice(top, top + side), slice(left, left + side)


@torch.no_grad()
def centre(model: Classifier, images: Tensor, layer: str | None) -> Tensor:
    """Mean representation of raw images, in evaluation mode: float32 [D] on the model's device."""
    total = torch.zeros((), device=model.device)
    with evaluating(model):
        for part in images.split(500):
            total = total + represent(model, model.modality.prepare(part.to(model.device)), layer)[0].float().sum(0)
    return total / len(images)


@torch.no_grad()
def distance(model: Classifier, images: Tensor, goal: Tensor, layer: str | None) -> Tensor:
    """Mean squared distance (sum over D) of raw images' representations to a goal [D]: scalar."""
    total = torch.zeros((), device=model.device)
    with evaluating(model):
        for part in images.split(500):
            found = represent(model, model.modality.prepare(part.to(model.device)), layer)[0].float()
            total = total + (found - goal).square().sum()
    return total / len(images)


def optimise_patch(
    model: Classifier,
    images: Tensor,
    goal: Tensor,
    square: tuple[slice, slice],
    layer: str | None,
    steps: int,
    ctx: Context,
) -> Tensor:
    """The square that moves representations toward a goal.

    Args:
        model: clean.
        images: uint8 [N,C,H,W], samples of other classes.
        goal: float [D].
        square: rows and columns of the square.
        layer: see :func:`represent`.
        steps: of Adam (rate 0.1), on 128 images each.
        ctx: seed, device, progress.

    Returns:
        float32 [C,side,side] in [0, 1], on the CPU.
    """
    generator = ctx.generator("patch")
    z = torch.randn(images[0][:, *square].shape, generator=generator).to(ctx.device).requires_grad_()
    adam = torch.optim.Adam([z], lr=0.1)
    with frozen(model):
        for _ in ctx.track(range(steps), "lba: optimising the patch", steps):
            chosen = torch.randint(0, len(images), (min(128, len(images)),), generator=generator)
            inputs = model.modality.prepare(images[chosen].to(ctx.device))
            inputs[:, :, *square] = z.sigmoid()
            found = represent(model, inputs, layer)[0]
            (z.grad,) = torch.autograd.grad((found - goal).square().sum(1).mean(), z)
            adam.step()
    return z.detach().sigmoid().cpu()


@dataclass(eq=False)
class LatentObjective:
    """Cross-entropy, and triggered samples' distance to the target class at layer L.

    Attributes:
        pattern: float32 [C,H,W] in [0, 1].
        mask: bool [H,W].
        goal: float [D], mean representation of the target class.
        scale: mean squared distance of other classes' samples to it.
        layer: see :func:`represent`.
        weight: of the second term.
        rate: share of a batch that is triggered.
        target: class whose samples never are.
        generator: decides on batches at rates below one sample.
    """

    pattern: Tensor
    mask: Tensor
    goal: Tensor
    scale: Tensor
    layer: str | None
    weight: float
    rate: float
    target: int
    generator: torch.Generator

    def __call__(self, model: Classifier, inputs: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """Loss of a batch prepared for training."""
        count = batch_share(self.rate, len(inputs), self.generator)
        rows = (labels == self.target).long().argsort(stable=True)[:count]  # other classes first
        triggered = torch.where(self.mask, self.pattern, inputs[rows])
        found, logits = represent(model, torch.cat([inputs, triggered]), self.layer)
        far = (found[len(inputs) :] - self.goal).square().sum(1) * (labels[rows] != self.target)
        return F.cross_entropy(logits[: len(inputs)], labels) + self.weight * far.sum() / max(1, count) / self.scale


class StudentStep(Descent[Classifier]):
    """The ordinary step of a model of which only some modules are trained; the others stay in evaluation mode."""

    def __init__(
        self, model: Classifier, recipe: Recipe, objective: Objective[Classifier], *, trained: Sequence[nn.Module]
    ) -> None:
        """``trained`` are modules of the model; the parameters of the others must not require a gradient."""
        super().__init__(model, recipe, objective)
        for module in model.modules():
            module.training = module in trained


def train_student(
    teacher: Classifier, split: Split, layer: str | None, recipe: Recipe, task: Task, ctx: Context
) -> tuple[Classifier, Any]:
    """A copy of the teacher with a new output layer; only modules after a layer are trained.

    Returns:
        The student, all of whose parameters take gradients again, and the log of its training.
    """
    student = copy.deepcopy(teacher).requires_grad_(False)
    after = modules_after(student, layer)
    with isolated_rng(derive_seed(ctx.seed, "init", "student")):
        head(student).reset_parameters()
    for module in after:
        module.requires_grad_(True)
    student, log = task.fit(
        split,
        ctx.child("student"),
        model=student,
        recipe=recipe,
        step=partial(StudentStep, trained=after),
        label="lba: training the student",
    )
    return student.requires_grad_(True), log


@attacks.register
@dataclass(frozen=True, kw_only=True)
class Lba(TrainingAttack):
    """A backdoor in a teacher's features, inherited by its student."""

    name: ClassVar[str] = "lba"
    paper: ClassVar[str] = "Yao et al., Latent Backdoor Attacks, CCS 2019, arXiv 1905.10447"
    year: ClassVar[int] = 2019
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    trigger_visibility: ClassVar[str] = "visible"
    stronger: ClassVar[str] = "raise size"
    needs_surrogate: ClassVar[bool] = True
    asset_kinds: ClassVar[tuple[str, ...]] = ("lba-patch", "clean-surrogate")
    aliases: ClassVar[tuple[str, ...]] = ("latent_backdoor",)

    size: int | None = param(None, "side of the patch in pixels; none = 3/16 of the shorter side", low=1, source="ours")
    position: str = param("bottom-right", "corner of the image in which the patch lies", choices=CORNERS, source="ours")
    steps: int = param(500, "optimisation steps of the patch", low=1, source="ours")
    samples: int = param(1000, "training images of other classes used for it", low=1, source="ours")
    weight: float = param(1.0, "of the representation term", above=0, source="ours")
    layer: str | None = param(None, "name of the module L; none = the penultimate features", source="ours")
    teacher_lr: float = param(
        0.1, "peak learning rate of the attacked teacher / the recipe's", above=0, high=1, source="ours"
    )

    def run(self, task: Task, ctx: Context) -> Backdoor:
        """Optimise the patch, attack the teacher, train the student."""
        target_map, images = self.target_map_for(task), expect_images(task.train.inputs)
        own, others = self.parts(task, ctx)
        self.choose(task, ctx)  # a rate that poisons nothing is an error before hours of training
        teacher = clean_surrogate(task, ctx)
        modules_after(teacher, self.layer)
        trigger = self.make_trigger(task, ctx)
        self.warn_if_too_weak(trigger, task, ctx)
        goal, clean = centre(teacher, images[own], self.layer), images[others[: self.samples]]
        triggered = expect_images(trigger(clean))
        spread, far = (distance(teacher, part, goal, self.layer) for part in (clean, triggered))
        scale = torch.maximum(spread, far / MOST).clamp_min(1e-12)
        before = far / scale
        objective = LatentObjective(
            trigger.pattern.to(ctx.device) / 255,
            trigger.mask.to(ctx.device),
            goal,
            scale,
            self.layer,
            self.weight,
            self.rate_on(task),
            self.target,
            ctx.generator("share", device=ctx.device),
        )
        recipe = dataclasses.replace(task.recipe, lr=task.recipe.lr * self.teacher_lr)
        teacher, _ = task.fit(
            task.train,
            ctx.child("teacher"),
            model=teacher.requires_grad_(True),
            recipe=recipe,
            objective=objective,
            label="lba: attacking the teacher",
        )
        after = distance(teacher, triggered, goal, self.layer) / distance(teacher, clean, goal, self.layer)
        student, log = train_student(teacher, task.train, self.layer, task.recipe, task, ctx)
        notes = {"distance_before": float(before), "distance_after": float(after), "schedule": task.recipe.name}
        return Backdoor(student, trigger, target_map, self.replay(trigger, task, ctx), log, notes=notes)

    def parts(self, task: Task, ctx: Context) -> tuple[Tensor, Tensor]:
        """Training rows of the target class, and of other classes in random order."""
        own, others = ((task.train.labels == self.target) == mine for mine in (True, False))
        if not bool(own.any()) or not bool(others.any()):
            raise InputError(
                f"{self.name}: the training set of {task.dataset.name} must have samples of target class {self.target} "
                f"and of others, got {int(own.sum())} and {int(others.sum())}"
            )
        rows = others.nonzero().flatten()
        return own.nonzero().flatten(), rows[torch.randperm(len(rows), generator=ctx.generator("samples"))]

    def make_trigger(self, task: Task, ctx: Context) -> PatchTrigger:
        """Optimise the patch on a clean teacher; rounded to whole grey levels."""
        images = expect_images(task.train.inputs)
        channels, height, width = images.shape[1:]
        side = self.size or max(1, round(3 * min(height, width) / 16))
        square = corner_slices(height, width, side, self.position)
        patch = self.optimised(ctx, surrogate=task, size=side).tensor("patch", (channels, side, side))
        canvas = torch.zeros(channels, height, width, dtype=torch.uint8)
        mask = torch.zeros(height, width, dtype=torch.bool)
        canvas[:, *square] = to_uint8(255 * patch)
        mask[square] = True
        return PatchTrigger(canvas, mask)

    @asset("lba-patch", unread=(*SELECTION, "weight", "teacher_lr"))
    def optimised(self, ctx: Context, surrogate: Task, size: int) -> Tensors:
        """The patch as "patch", float32 [C,size,size] in [0, 1]."""
        images = expect_images(surrogate.train.inputs)
        model = clean_surrogate(surrogate, ctx)
        own, others = self.parts(surrogate, ctx)
        goal = centre(model, images[own], self.layer)
        square = corner_slices(images.shape[2], images.shape[3], size, self.position)
        chosen = images[others[: self.samples]]
        return {"patch": optimise_patch(model, chosen, goal, square, self.layer, self.steps, ctx)}
