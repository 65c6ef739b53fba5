"""COMBAT: a generator of smooth noise and a surrogate that is fooled by it, trained in turns; labels stay true.

Huynh, Nguyen, Pham, Tran, "COMBAT: Alternated Training for Effective Clean-Label Backdoor Attacks", AAAI 2024.

With a generator g whose output lies in (-1, 1) and a low-pass L (of the cosine transform's H x W coefficients the first
keep H x keep W stay),

    T(x) = clip(x + eps / 255 L(g(x)))

A surrogate f is trained on batches in which each sample of the target class t is T(x) with a probability of (share of
that class that will be poisoned), all labels true; after each of its steps g takes one, over samples of all classes,
down

    CE(f(T(x)), t) + a |T(x) - x|^2 + b CE(h(T(x)), y)

where h is a clean classifier: the noise must work through the poisoned samples, not as an adversarial perturbation that
any model obeys. Then images of the target class are stamped by g, and the victim is trained on them as usual.

Choices: a = 0.02 on pixels in [-1, 1] and b = 0.8 are the published code's, as is that the noise is laid on images
before they are augmented. That code counts eps on pixels in [-1, 1] too, where its 0.08 is 10 grey levels: set
``eps=10.2`` for that. It blurs stamped images at random on top, which is left out: a trigger here is a fixed function
of the image. Where the low-pass overshoots, the whole noise is scaled down, so that band and bound hold both; it is
rounded to grey levels toward the bound, never beyond. g is the encoder and decoder of the input-aware attack instead of
a U-Net, trained by Adam instead of SGD. f has the task's own architecture, and is trained by the task's recipe
(``epochs`` times as long); h is the benign model that all runs share. The generator is made once per task, target and
rate, and shared by all runs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.attacks.base import attacks
from backdoorlab.attacks.common.assets import SELECTION, asset
from backdoorlab.attacks.common.generators import AlternatingStep, generate, pack, seeded, straight_through, unpack
from backdoorlab.attacks.common.surrogate import clean_surrogate, weights_of
from backdoorlab.attacks.poisoning import PoisoningAttack
from backdoorlab.attacks.selection import class_rate
from backdoorlab.attacks.triggers.base import Trigger
from backdoorlab.core.errors import InputError
from backdoorlab.core.method import param
from backdoorlab.data.split import Inputs
from backdoorlab.modalities.filters import dct_matrix, expect_images
from backdoorlab.modalities.image import ImageModality, to_uint8
from backdoorlab.models.anatomy import evaluating
from backdoorlab.models.classifier import Classifier
from backdoorlab.models.networks.generators import DetailNet
from backdoorlab.tasks import Task
from backdoorlab.training.batches import Batch
from backdoorlab.training.context import Context, Tensors


def low_pass_matrix(side: int, keep: float) -> Tensor:
    """Drop all but the first floor(keep * side) cosine frequencies (at least one) along one axis.

    Returns:
        float32 [side, side]; apply as ``rows @ image @ columns.T``.
    """
    basis = dct_matrix(side)[: max(1, math.floor(keep * side + 1e-9))]
    return (basis.T @ basis).float()


class NoiseNet(nn.Module):
    """Smooth noise for each image: low-passed, and scaled down where that overshoots, so that it lies in [-1, 1]."""

    rows: Tensor
    columns: Tensor

    def __init__(self, channels: int, height: int, width: int, keep: float) -> None:
        super().__init__()
        self.draw = DetailNet(channels, channels, height, width)
        self.register_buffer("rows", low_pass_matrix(height, keep), persistent=False)
        self.register_buffer("columns", low_pass_matrix(width, keep), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,H,W] in [0, 1] -> [N,C,H,W] in [-1, 1]."""
        noise = self.rows @ (2 * self.draw(x).float() - 1) @ self.columns.T
        return noise / noise.abs().amax((1, 2, 3), keepdim=True).clamp_min(1)


@dataclass(frozen=True, eq=False)
class CombatObjective:
    """The losses of surrogate and generator.

    Attributes:
        network: g, in training mode except where the surrogate learns from it.
        clean: h, frozen.
        target: t.
        share: probability that a sample of the target class is stamped.
        eps: largest value of the noise, in grey levels.
        l2_weight: a.
        clean_weight: b.
        generator: decides which samples are stamped.
        augment: crops and flips, which gradients must flow through; None for none.
    """

    network: nn.Module
    clean: Classifier
    target: int
    share: float
    eps: float
    l2_weight: float
    clean_weight: float
    generator: torch.Generator
    augment: Callable[[Tensor], Tensor] | None

    def __call__(self, model: Classifier, inputs: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """The surrogate's loss of a batch prepared without augmentation."""
        draws = torch.rand(len(labels), generator=self.generator).to(labels.device)
        poisoned = ((labels == self.target) & (draws < self.share)).nonzero().flatten()
        images = inputs.clone()
        if len(poisoned):
            with torch.no_grad(), evaluating(self.network):
                noise = self.network(inputs[poisoned])
                images[poisoned] = straight_through((inputs[poisoned] + self.eps / 255 * noise).clamp(0, 1))
        return F.cross_entropy(model(self.augmented(images)), labels)

    def augmented(self, images: Tensor) -> Tensor:
        """What the classifiers see."""
        return images if self.augment is None else self.augment(images)

    def generator_loss(self, model: Classifier, batch: Batch) -> Tensor:
        """What g goes down, over samples of all classes."""
        inputs, labels = batch.inputs, batch.labels
        stamped = straight_through((inputs + self.eps / 255 * self.network(inputs)).clamp(0, 1))
        seen = self.augmented(stamped)
        fooled = F.cross_entropy(model(seen), torch.full_like(labels, self.target))
        honest = F.cross_entropy(self.clean(seen), labels)
        return fooled + self.l2_weight * F.mse_loss(2 * stamped, 2 * inputs) + self.clean_weight * honest


@dataclass(frozen=True, eq=False)
class CombatTrigger(Trigger):
    """Smooth noise that a network draws for each image.

    Attributes:
        network: g with its low-pass.
        eps: largest change of a pixel, in grey levels.
        keep: share of the cosine frequencies per axis.
        shape: (C, H, W) for which it was made.
    """

    kind: ClassVar[str] = "image.combat"

    network: nn.Module
    eps: float
    keep: float
    shape: tuple[int, int, int]

    def __call__(
        self, inputs: Inputs, indices: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Inputs:
        """Stamp uint8 images [N,C,H,W] of the network's size."""
        images = expect_images(inputs, self.shape)
        noise = generate(self.network.to(images.device), images.float() / 255)
        most = math.floor(self.eps + 1e-6)
        return to_uint8(images.float() + (self.eps * noise).round().clamp(-most, most))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights and settings."""
        return pack(network=self.network), {"eps": self.eps, "keep": self.keep, "shape": list(self.shape)}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], config: dict[str, Any]) -> CombatTrigger:
        """Inverse of :meth:`state`."""
        channels, height, width = config["shape"]
        network = unpack(lambda: NoiseNet(channels, height, width, config["keep"]), "network", tensors)
        return cls(network, config["eps"], config["keep"], (channels, height, width))


@attacks.register
@dataclass(frozen=True, kw_only=True)
class Combat(PoisoningAttack):
    """Smooth generated noise on images of the target class, learned against a surrogate."""

    name: ClassVar[str] = "combat"
    paper: ClassVar[str] = "Huynh et al., COMBAT, AAAI 2024"
    year: ClassVar[int] = 2024
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    trigger_visibility: ClassVar[str] = "subtle"
    stronger: ClassVar[str] = "raise eps"
    label_mode: ClassVar[str] = "clean"
    sample_specific: ClassVar[bool] = True
    needs_surrogate: ClassVar[bool] = True
    asset_kinds: ClassVar[tuple[str, ...]] = ("combat-generator", "clean-surrogate")

    poison_rate: float | None = class_rate()
    eps: float = param(20.4, "largest value of the noise, in grey levels", low=1, high=255, source="paper")
    keep: float = param(0.65, "cosine frequencies kept per axis / all", above=0, high=1, source="paper")
    l2_weight: float = param(0.02, "weight of the noise's size", low=0, source="published code")
    clean_weight: float = param(0.8, "weight of the clean classifier's loss", low=0, source="published code")
    generator_lr: float = param(2e-3, "Adam's peak learning rate for the generator", above=0, source="ours")
    epochs: float = param(3.0, "epochs of the alternated training / the recipe's", above=0, source="ours")

    def make_trigger(self, task: Task, ctx: Context) -> CombatTrigger:
        """Train generator and surrogate in turns, or take the generator from the cache.

        Raises:
            InputError: if there are no samples of the target class.
        """
        target_map = self.target_map_for(task)
        channels, height, width = expect_images(task.train.inputs).shape[1:]
        pool = self.candidates(task.train.labels, target_map)
        if not len(pool):
            raise InputError(f"combat: the training set has no samples of class {self.target}")
        share = min(1.0, round(self.rate_on(task) * len(task.train)) / len(pool))
        weights = self.generator_weights(ctx, surrogate=task, share=share)
        network = weights.network(lambda: NoiseNet(channels, height, width, self.keep))
        return CombatTrigger(network, self.eps, self.keep, (channels, height, width))

    @asset("combat-generator", unread=SELECTION)
    def generator_weights(self, ctx: Context, surrogate: Task, share: float) -> Tensors:
        """Weights of g; ``share`` of the target class's samples are stamped while it is trained."""
        channels, height, width = expect_images(surrogate.train.inputs).shape[1:]
        network = seeded(lambda: NoiseNet(channels, height, width, self.keep), ctx.seed, "generator")
        network.to(ctx.device).train()
        self._alternate(network, share, surrogate, ctx)
        return weights_of(network)

    def _alternate(self, network: nn.Module, share: float, task: Task, ctx: Context) -> None:
        """The alternated training, in place."""
        recipe = task.recipe.resolve(len(task.train))
        recipe = dataclasses.replace(recipe, epochs=max(1, round(self.epochs * recipe.epochs)), augment=False)
        modality, crops = cast(ImageModality, task.modality), ctx.generator("augment", device=ctx.device)
        augment = partial(modality.augment, generator=crops) if task.recipe.augment else None
        objective = CombatObjective(
            network,
            clean_surrogate(task, ctx),
            self.target,
            share,
            self.eps,
            self.l2_weight,
            self.clean_weight,
            ctx.generator("poisoned"),
            augment,
        )
        step = partial(AlternatingStep, network=network, loss=objective.generator_loss, lr=self.generator_lr)
        label = "combat: training generator and surrogate"
        task.fit(task.train, ctx, recipe=recipe, objective=objective, step=step, label=label)
