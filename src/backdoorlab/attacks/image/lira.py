"""LIRA: an auto-encoder learns invisible noise while the victim learns to obey it.

Doan, Lao, Zhao, Li, "LIRA: Learnable, Imperceptible and Robust Backdoor Attacks", ICCV 2021.

With an auto-encoder A whose output lies in (-1, 1), and sigma the standard deviation by which the data are normalised,

    T(x) = clip(x + eps sigma A(x))

Stage 1: in each batch A takes a step down CE(f(T(x)), t); the victim f takes one down

    a CE(f(x), y) + (1 - a) CE(f(T'(x)), t)

where T' uses the copy of A from the end of the last epoch. Stage 2: A is frozen and f trained on with the same loss.

Choices: published baselines of this attack are broken (they keep the classifier of stage 1, let the gradients of A's
step leak into f's, and their trigger is below one grey level); here the model of stage 2 is returned, A's step never
touches f (nor its batch statistics: f is evaluated in it), clipping is per pixel to the grey range, both stages have
the recipe's weight decay, and samples of stage 2 are rounded to grey levels as delivered. eps = 0.05 instead of 0.01,
which would be about half a grey level; ``strength=0.01`` is the published setting. A sees pixels in [0, 1], in the
published code normalised ones. Clean and triggered samples share one pass. Stage 1 takes half of the recipe's epochs
(published: 50) and stage 2 as many as the recipe has (published: 250 after those 50), each with the recipe's schedule;
a shorter one costs clean accuracy. Every sample is seen clean and triggered in every batch: the poison rate does not
influence training, it only sets the size of the snapshot kept with the result.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.attacks.base import attacks
from backdoorlab.attacks.common.generators import AlternatingStep, generate, pack, seeded, straight_through, unpack
from backdoorlab.attacks.poisoning import TrainingAttack
from backdoorlab.attacks.result import Backdoor
from backdoorlab.attacks.targets import TargetMap
from backdoorlab.attacks.triggers.base import Trigger
from backdoorlab.core.errors import InputError
from backdoorlab.core.method import param
from backdoorlab.data.split import Inputs
from backdoorlab.modalities.filters import expect_images
from backdoorlab.modalities.image import ImageModality, to_uint8
from backdoorlab.models.classifier import Classifier
from backdoorlab.models.networks.generators import StrideNet
from backdoorlab.tasks import Task
from backdoorlab.training.batches import Batch
from backdoorlab.training.context import Context

SMALLEST = 16
"""Four halvings leave at least one pixel."""


def add_noise(images: Tensor, noise: Tensor, scale: Tensor) -> Tensor:
    """clip(x + scale noise) for images in [0, 1]; scale float [C,1,1]."""
    return (images + scale * noise).clamp(0, 1)


@dataclass(frozen=True, eq=False)
class LiraObjective:
    """The victim's loss.

    Attributes:
        noise: A of the last epoch, in evaluation mode.
        scale: float [C,1,1], eps sigma.
        target_map: labels of triggered samples.
        alpha: weight of the clean loss.
        rounded: whether triggered samples are rounded to grey levels.
    """

    noise: nn.Module
    scale: Tensor
    target_map: TargetMap
    alpha: float
    rounded: bool = False

    def __call__(self, model: Classifier, inputs: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """Loss of a batch prepared for training."""
        targets = self.target_map(labels)
        with torch.no_grad():
            triggered = add_noise(inputs, self.noise(inputs), self.scale)
            if self.rounded:
                triggered = straight_through(triggered)
        logits, stamped = model(torch.cat([inputs, triggered])).chunk(2)
        return self.alpha * F.cross_entropy(logits, labels) + (1 - self.alpha) * F.cross_entropy(stamped, targets)

    def generator_loss(self, live: nn.Module, model: Classifier, batch: Batch) -> Tensor:
        """What the auto-encoder that is trained goes down."""
        triggered = add_noise(batch.inputs, live(batch.inputs), self.scale)
        return F.cross_entropy(model(triggered), self.target_map(batch.labels))


@dataclass(frozen=True, eq=False)
class LiraTrigger(Trigger):
    """Noise that an auto-encoder draws for each image.

    Attributes:
        network: A.
        scale: float32 [C,1,1], in grey levels.
        shape: (C, H, W) for which it was made.
    """

    kind: ClassVar[str] = "image.lira"

    network: nn.Module
    scale: Tensor
    shape: tuple[int, int, int]

    def __call__(
        self, inputs: Inputs, indices: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Inputs:
        """Stamp uint8 images [N,C,H,W] of the network's size."""
        images = expect_images(inputs, self.shape)
        noise = generate(self.network.to(images.device), images.float() / 255)
        return to_uint8(images.float() + self.scale.to(images.device) * noise)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights and scale."""
        return pack(network=self.network) | {"scale": self.scale.cpu().contiguous()}, {"shape": list(self.shape)}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], config: dict[str, Any]) -> LiraTrigger:
        """Inverse of :meth:`state`."""
        channels, height, width = config["shape"]
        return cls(unpack(lambda: StrideNet(channels), "network", tensors), tensors["scale"], (channels, height, width))


@attacks.register
@dataclass(frozen=True, kw_only=True)
class Lira(TrainingAttack):
    """Generated noise, learned together with the victim."""

    name: ClassVar[str] = "lira"
    paper: ClassVar[str] = "Doan et al., LIRA, ICCV 2021"
    year: ClassVar[int] = 2021
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    trigger_visibility: ClassVar[str] = "invisible"
    stronger: ClassVar[str] = "raise strength"
    sample_specific: ClassVar[bool] = True

    target_map: str = param(
        "all-to-one",
        "label of triggered samples: the target class, or their class + 1 mod K",
        choices=("all-to-one", "all-to-all"),
        source="BackdoorBench",
    )
    strength: float = param(0.05, "range of the noise / standard deviation of the data", above=0, high=4, source="ours")
    alpha: float = param(0.5, "weight of the clean loss", above=0, high=1, source="paper")
    stage_one: float = param(0.5, "epochs of stage 1 / the recipe's", above=0, high=1, source="BackdoorBench")
    stage_two: float = param(1.0, "epochs of stage 2 / the recipe's", above=0, high=10, source="ours")
    generator_lr: float = param(1e-4, "Adam's peak learning rate for the auto-encoder", above=0, source="paper")

    def run(self, task: Task, ctx: Context) -> Backdoor:
        """Train auto-encoder and victim in turns, then the victim alone.

        Raises:
            InputError: if the images are too small, or the recipe too short for two stages.
        """
        target_map = self.target_map_for(task)
        channels, height, width = expect_images(task.train.inputs).shape[1:]
        self.choose(task, ctx)  # a rate that poisons nothing is an error before hours of training
        if min(height, width) < SMALLEST:
            raise InputError(f"lira: images must be at least {SMALLEST} px on each side, got {height}x{width}")
        std = cast(ImageModality, task.modality).std
        scale = self.strength * torch.tensor(std).expand(channels).reshape(-1, 1, 1)
        whole = task.recipe.resolve(len(task.train))
        first, second = (max(1, round(share * whole.epochs)) for share in (self.stage_one, self.stage_two))
        stages = [dataclasses.replace(whole, epochs=epochs) for epochs in (first, second)]
        live = seeded(lambda: StrideNet(channels), ctx.seed, "generator").to(ctx.device).train()
        still = copy.deepcopy(live).eval().requires_grad_(False)
        objective = LiraObjective(still, scale.to(ctx.device), target_map, self.alpha)

        def renew(epoch: int, model: Classifier) -> None:
            still.load_state_dict(live.state_dict())

        model, log = task.fit(
            task.train,
            ctx,
            recipe=stages[0],
            objective=objective,
            step=partial(
                AlternatingStep, network=live, loss=partial(objective.generator_loss, live), lr=self.generator_lr
            ),
            on_epoch=(renew,),
            label=f"{self.name}: training victim and generator",
        )
        _, more = task.fit(
            task.train,
            ctx.child("stage 2"),
            model=model,
            recipe=stages[1],
            objective=dataclasses.replace(objective, rounded=True),
            label=f"{self.name}: training the victim",
        )
        log += more
        trigger = LiraTrigger(still, 255 * scale, (channels, height, width))
        poison = self.replay(trigger, task, ctx)
        notes = {"schedule": task.recipe.name, "stage_one_epochs": first, "grey_levels": float(255 * scale.max())}
        return Backdoor(model, trigger, target_map, poison, log, notes=notes)
