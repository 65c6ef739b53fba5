"""Narcissus: a universal noise that points to the inside of the target class, added to images of that class.

Zeng, Pan, Just, Lyu, Qiu, Jia, "Narcissus: A Practical Clean-Label Backdoor Attack with Limited Information", CCS 2023
(arXiv 2204.05255).

On a surrogate h one noise is optimised that makes images of the target class even more typical of it, whatever the
augmentation A of training made of them:

    min over d of CE(h(clip(A(x) + d)), t),   |d| <= eps,   x of class t

It is added to target-class training images, whose label stays true, and amplified at test time:

    T(x) = round(clip(x + 3 d))

The surrogate knows foreign data and the target class, one class more, but no other class of the task: the attacker of
the paper, who has nothing else. The paper trains it on the foreign data first and on the target class after; here both
are learned at once, with the task's architecture and recipe. It is made once per task and target and shared by all
runs, and so is the noise. Foreign data are drawn shapes unless a folder is given (nothing has to be downloaded), at
most ten images for each of the target class.

The authors take 1,000 *rounds* over all images of the target class, about 15,000 steps on CIFAR-10, of RAdam with a
rate of 0.01 on images in [-1, 1]. Here it is RAdam at the same rate, which is 0.005 of the grey range, and 1,000
*steps*; ``steps=15000`` is the published length.

Choices: ``surrogate="own"`` takes a benign model of the task itself, an attacker who has all its data. It is no better
backdoor but an adversarial perturbation, which models obey that were never poisoned. Training augmentation is the
modality's own. The noise is stored unrounded, and only the stamped image is clipped, to the grey range, so
amplification is exact. Compare with a benign model all the same, as every run's noise differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorlab.attacks.base import attacks
from backdoorlab.attacks.common.assets import SELECTION, asset
from backdoorlab.attacks.common.pictures import resize, to_channels
from backdoorlab.attacks.common.surrogate import clean_surrogate, weights_of
from backdoorlab.attacks.poisoning import PoisoningAttack
from backdoorlab.attacks.selection import class_rate
from backdoorlab.attacks.triggers.base import Trigger
from backdoorlab.attacks.triggers.pixels import AdditiveTrigger
from backdoorlab.core.errors import InputError
from backdoorlab.core.method import param
from backdoorlab.data.sources import load_dataset
from backdoorlab.data.split import Inputs, Split
from backdoorlab.modalities.filters import expect_images
from backdoorlab.modalities.image import to_uint8
from backdoorlab.models.anatomy import frozen
from backdoorlab.models.classifier import Classifier, build_model
from backdoorlab.tasks import Task
from backdoorlab.training.context import Context, Tensors

CROWD = 10
"""At most so many foreign images for each of the target class, which would be drowned otherwise."""


def foreign_split(found: Split, images: Tensor, generator: torch.Generator) -> Split:
    """Foreign images in the target images' form, and these as one more class, the last.

    Args:
        found: foreign images of one or three channels.
        images: uint8 [N,C,H,W], of the target class.
        generator: chooses among the foreign ones.
    """
    channels, height, width = images.shape[1:]
    rows = torch.randperm(len(found), generator=generator)[: CROWD * len(images)]
    foreign = resize(expect_images(found.inputs)[rows], height, width)
    if foreign.shape[1] != channels:
        foreign = to_uint8(to_channels(foreign.expand(-1, 3, -1, -1).float(), channels))
    labels = torch.cat([found.labels[rows], torch.full((len(images),), found.num_classes)])
    return Split(torch.cat([foreign, images]), labels, (*found.classes, "target class"))


def untrained(task: Task, classes: int, ctx: Context) -> Classifier:
    """A model of the task's architecture for as many classes, its weights drawn from the context's seed."""
    return build_model(task.spec.model, task.modality, classes, ctx.seed).to(ctx.device)


def optimise_noise(
    model: Classifier, images: Tensor, target: int, eps: float, steps: int, lr: float, ctx: Context
) -> Tensor:
    """The universal noise that lowers the surrogate's loss on images of the target class.

    Args:
        model: the surrogate; evaluated, unchanged.
        images: uint8 [N,C,H,W], of the target class.
        target: that class.
        eps: largest value, as a share of the grey range.
        steps: of RAdam, on at most 128 images each; projected after each.
        lr: RAdam's, as a share of the grey range.
        ctx: seed, device, progress.

    Returns:
        float32 [C,H,W] in [-eps, eps], on the CPU.
    """
    generator, device, modality = ctx.generator("noise"), ctx.device, model.modality
    augment = ctx.generator("augment", device=device)
    noise = torch.zeros(images.shape[1:], device=device, requires_grad=True)
    radam = torch.optim.RAdam([noise], lr)
    with frozen(model):
        for _ in ctx.track(range(steps), "narcissus: optimising the noise", steps):
            rows = torch.randint(0, len(images), (min(128, len(images)),), generator=generator)
            # The noise stays where it is while images move below it, as authors do.
            inputs = modality.prepare(images[rows].to(device), train=True, generator=augment)
            logits = model((inputs + noise).clamp(0, 1))
            loss = F.cross_entropy(logits, torch.full((len(rows),), target, device=device))
            (noise.grad,) = torch.autograd.grad(loss, noise)
            radam.step()
            with torch.no_grad():
                noise.clamp_(-eps, eps)
    return noise.detach().cpu()


@attacks.register
@dataclass(frozen=True, kw_only=True)
class Narcissus(PoisoningAttack):
    """A universal noise optimised on target-class images."""

    name: ClassVar[str] = "narcissus"
    paper: ClassVar[str] = "Zeng et al., Narcissus, CCS 2023, arXiv 2204.05255"
    year: ClassVar[int] = 2023
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    trigger_visibility: ClassVar[str] = "subtle"
    stronger: ClassVar[str] = "raise eps and factor_test"
    label_mode: ClassVar[str] = "clean"
    needs_surrogate: ClassVar[bool] = True
    asset_kinds: ClassVar[tuple[str, ...]] = ("narcissus-noise", "foreign-surrogate", "clean-surrogate")

    poison_rate: float | None = class_rate()
    surrogate: str = param(
        "foreign",
        "knows foreign data and the target class, or all of the task (a noise that misleads benign models, too)",
        choices=("foreign", "own"),
        source="paper",
    )
    foreign: str | None = param(
        None, "folder with one folder of images per class; none = drawn shapes", source="paper (another set)", path=True
    )
    eps: float = param(16.0, "largest value of the noise, in grey levels", above=0, high=255, source="paper")
    steps: int = param(
        1000, "optimisation steps (the authors' schedule is about 15000 on CIFAR-10)", low=1, source="ours"
    )
    lr: float = param(0.005, "RAdam's learning rate, as a share of the grey range", above=0, source="paper")
    factor_train: float = param(1.0, "factor on the noise in training samples", above=0, source="paper")
    factor_test: float = param(3.0, "factor on the noise at test time", above=0, source="paper")

    def __post_init__(self) -> None:
        """As every method; foreign data only serves a foreign surrogate."""
        super().__post_init__()
        if self.foreign is not None and self.surrogate == "own":
            raise InputError(
                "narcissus: a surrogate that knows all of the task needs no foreign data; leave out foreign"
            )

    def assets_in_use(self) -> tuple[str, ...]:
        """The noise, and the surrogate that was chosen."""
        return "narcissus-noise", "clean-surrogate" if self.surrogate == "own" else "foreign-surrogate"

    def make_trigger(self, task: Task, ctx: Context) -> AdditiveTrigger:
        """The noise as amplified at test time."""
        return AdditiveTrigger(self.factor_test * self._noise(task, ctx))

    def poison_inputs(self, trigger: Trigger, inputs: Inputs, indices: Tensor, task: Task, ctx: Context) -> Inputs:
        """The noise as hidden in training samples."""
        return AdditiveTrigger(self.factor_train * self._noise(task, ctx))(inputs)

    def _noise(self, task: Task, ctx: Context) -> Tensor:
        self.target_map_for(task)
        images = self._target_images(task)
        if not len(images):
            raise InputError(f"narcissus: the training set has no samples of class {self.target}")
        optimised = self.optimised(ctx, surrogate=task, knows=self.surrogate)
        return optimised.tensor("noise", tuple(images.shape[1:]))

    @asset("narcissus-noise", unread=(*SELECTION, "factor_train", "factor_test"))
    def optimised(self, ctx: Context, surrogate: Task, knows: str) -> Tensors:
        """The noise as "noise", float32 [C,H,W] in grey levels; ``knows`` is the hyper-parameter ``surrogate``."""
        if knows == "own":
            model, target = clean_surrogate(surrogate, ctx), self.target
        else:
            model, target = self.foreign_surrogate(surrogate, ctx)
        images = self._target_images(surrogate)
        noise = optimise_noise(model, images, target, self.eps / 255, self.steps, self.lr, ctx)
        return {"noise": 255 * noise}

    def foreign_surrogate(self, task: Task, ctx: Context) -> tuple[Classifier, int]:
        """A model that knows the target class and foreign data, but no other class of the task.

        Returns:
            The model, frozen, and its index of the target class, which is the last.

        Raises:
            InputError: if the folder cannot be used.
        """
        classes = self._foreign(task).num_classes
        weights = self.foreign_weights(ctx, task=task)
        return weights.network(lambda: untrained(task, classes + 1, ctx)), classes

    @asset("foreign-surrogate", unread=(*SELECTION, "surrogate", "eps", "steps", "lr", "factor_train", "factor_test"))
    def foreign_weights(self, ctx: Context, task: Task) -> Tensors:
        """Weights of such a model."""
        foreign = self._foreign(task)
        split = foreign_split(foreign, self._target_images(task), ctx.generator("foreign"))
        model = untrained(task, foreign.num_classes + 1, ctx)
        task.fit(split, ctx, model=model, label="narcissus: training a surrogate on foreign data")
        return weights_of(model)

    def _foreign(self, task: Task) -> Split:
        height, width = expect_images(task.train.inputs).shape[2:]
        name = "shapes" if self.foreign is None else f"folder:{self.foreign}"
        return load_dataset(name, size=max(height, width)).train

    def _target_images(self, task: Task) -> Tensor:
        return expect_images(task.train.inputs)[task.train.labels == self.target]
