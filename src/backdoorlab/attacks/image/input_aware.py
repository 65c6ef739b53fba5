"""Input-aware dynamic backdoor: a generator draws another patch for every image.

Nguyen, Tran, "Input-Aware Dynamic Backdoor Attack", NeurIPS 2020 (arXiv 2010.08138).

A pattern generator G and a mask generator M look at the image; sharpened by s(z) = tanh(20 z - 10) / 2 + 1/2,

    T(x) = x + (G(x) - x) m(x),   m = s(M(x))

First M alone is trained to give sparse masks that differ as images differ, over pairs (x, x') of training images:

    100 mean(ReLU(m(x) - d)) + mean_i rms(x_i / s, x'_i / s) / rms(m(x_i), m(x'_i))

with s the standard deviation of the data per channel: distances are those of *normalised* images, about four times as
large as between pixels in [0, 1]. Then M is frozen, and victim and G are trained together. In each batch the first
floor(rate B) samples become T(x) with label t; as many more are given the trigger *of another image* x' and keep their
label ("cross"), so that the victim obeys a trigger on its own image only; G is kept from drawing the same for all by

    CE(all) + mean_i rms(x_i / s, x'_i / s) / rms(G(x_i) / s, G(x'_i) / s).

The generators end in two hyperbolic tangents as the published ones do, tanh(tanh(z)) / 2 + 1/2: patterns lie between
0.119 and 0.881.

Choices: s is what the victim normalises by; where it does not normalise (s = 1, as published for GTSRB), the standard
deviation of the training images is measured, so that the published weights mean the same for all data. The victim sees
stamped images rounded to grey levels, as they are delivered (the gradient passes rounding unchanged). The generators
see pixels in [0, 1]. Donors x' are other samples of the same batch. G's gradients are cleared after every step
(published code lets them pile up) and its learning rate follows the recipe. The mask stage takes a quarter of the
recipe's steps (25 of 100 epochs) and comes on top of them; it works without augmentation, since it only asks for
variety. Networks: two stages of 16 and 32 channels below 32 px (the paper's for MNIST), else three of 32 to 128;
decoders resize to the encoder's sizes, so odd sides work.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.attacks.base import attacks
from backdoorlab.attacks.common.batch_poison import batch_share
from backdoorlab.attacks.common.generators import JointStep, generate, pack, rms, seeded, straight_through, unpack
from backdoorlab.attacks.draws import sample_uniform
from backdoorlab.attacks.poisoning import TrainingAttack
from backdoorlab.attacks.result import Backdoor
from backdoorlab.attacks.targets import TargetMap
from backdoorlab.attacks.triggers.base import Trigger
from backdoorlab.core.method import param
from backdoorlab.core.seeding import spawn
from backdoorlab.data.split import Inputs
from backdoorlab.modalities.filters import expect_images
from backdoorlab.modalities.image import ImageModality, to_uint8
from backdoorlab.models.classifier import Classifier
from backdoorlab.models.networks.generators import DetailNet
from backdoorlab.tasks import Task
from backdoorlab.training.batches import Repeat
from backdoorlab.training.context import Context, autocast
from backdoorlab.training.recipes import Recipe
from backdoorlab.training.steps import LossStep, run_steps

BETAS = (0.5, 0.9)
DONORS = 1000
"""Images kept to take cross triggers from."""


class TwiceBoundedNet(DetailNet):
    """A :class:`DetailNet` with a second hyperbolic tangent: out in 0.119 to 0.881."""

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,H,W] in [0, 1] -> [N,made,H,W]."""
        return torch.tanh(2 * super().forward(x) - 1) / 2 + 0.5


def sharpen(values: Tensor) -> Tensor:
    """Push a mask in (0, 1) toward 0 and 1."""
    return torch.tanh(20 * values - 10) / 2 + 0.5


def diversity(images: Tensor, others: Tensor, drawn: Tensor, drawn_others: Tensor) -> Tensor:
    """Mean ratio of how different images are to how different what was drawn for them is."""
    return (rms(images, others) / (rms(drawn, drawn_others) + 1e-7)).mean()


def spread(images: Tensor, std: tuple[float, ...]) -> Tensor:
    """By what pixels in [0, 1] are divided before distances are taken.

    Args:
        images: uint8 [N,C,H,W], all training samples.
        std: per channel or for all, what the victim normalises by; 1 where it does not.

    Returns:
        float32 [C,1,1]: ``std``, or where that is 1 the images' standard deviation (1 for a channel that never varies).
    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    found = []
    for channel, given in enumerate(torch.tensor(std, dtype=torch.float64).expand(images.shape[1])):
        count = torch.bincount(images[:, channel].flatten().cpu(), minlength=256).double()
        share = count / count.sum()
        measured = float((share * (levels - (share * levels).sum()).square()).sum().sqrt())
        found.append(float(given) if float(given) != 1 else measured or 1.0)
    return torch.tensor(found, dtype=torch.float32).reshape(-1, 1, 1)


def mask_loss(images: Tensor, others: Tensor, masks: Tensor, masks_of_others: Tensor, density: float) -> Tensor:
    """The mask stage's loss on *normalised* images [N,C,H,W] and sharpened masks [N,1,H,W]."""
    return 100 * F.relu(masks - density).mean() + diversity(images, others, masks, masks_of_others)


def train_mask(
    network: nn.Module, images: Tensor, density: float, scale: Tensor, recipe: Recipe, lr: float, ctx: Context
) -> None:
    """The mask stage, in place.

    Args:
        network: makes masks.
        images: uint8 [N,C,H,W], all training samples.
        density: d, tolerated mean of the mask.
        scale: float32 [C,1,1], s; see :func:`spread`.
        recipe: resolved; a quarter of its steps are taken.
        lr: Adam's.
        ctx: seed, device, progress.
    """
    generator, network, scale = ctx.generator("mask"), network.to(ctx.device).train(), scale.to(ctx.device)
    steps = max(1, round(recipe.epochs * (len(images) // recipe.batch_size) / 4))

    def draw() -> tuple[Tensor, Tensor]:
        rows = torch.randint(0, len(images), (2, recipe.batch_size), generator=generator)
        x, others = (images[r].to(ctx.device).float() / 255 for r in rows)
        return x, others

    def loss(pair: tuple[Tensor, Tensor]) -> Tensor:
        with autocast(ctx.device, recipe.precision):
            values = network(torch.cat(pair))
        masks, others = sharpen(values.float()).chunk(2)
        return mask_loss(pair[0] / scale, pair[1] / scale, masks, others, density)

    run_steps(
        LossStep(loss, torch.optim.Adam(network.parameters(), lr, BETAS), [network]),
        Repeat(steps, draw),
        1,
        schedule=lambda step: 0.1 ** sum(step >= share * steps for share in (0.4, 0.8)),
        context=ctx,
        label="input_aware: training the mask",
    )
    network.eval().requires_grad_(False)


@dataclass(eq=False)
class InputAwareObjective:
    """The joint loss of victim and pattern generator.

    Attributes:
        pattern: G, in training mode.
        mask: M, frozen.
        target_map: labels of backdoor samples.
        rate: share of a batch that is attacked, and share with foreign triggers.
        scale: float32 [C,1,1], s, on the device.
        generator: decides on batches at rates below one sample.
        exclude_target: never attack samples that already have their attacker's label.
    """

    pattern: nn.Module
    mask: nn.Module
    target_map: TargetMap
    rate: float
    scale: Tensor
    generator: torch.Generator
    exclude_target: bool = False

    def __call__(self, model: Classifier, inputs: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """Loss of a batch prepared for training."""
        batch = len(inputs)
        count = batch_share(self.rate, batch, self.generator)
        if self.exclude_target:
            fixed = self.target_map(labels) == labels
            order = fixed.to(torch.uint8).argsort(stable=True)
            inputs, labels, count = inputs[order], labels[order], min(count, batch - int(fixed.sum()))
        cross = min(count, batch - count)
        if not count:
            return F.cross_entropy(model(inputs), labels)
        # Donors come after both groups; where a batch is full they are its first samples, never the sample itself.
        donors = inputs.roll(-((count + cross) % batch or 1), 0)[:count]
        sources = torch.cat([inputs[:count], donors])
        drawn = self.pattern(sources).float()
        with torch.no_grad():
            masks = sharpen(self.mask(sources).float())
        own, foreign = drawn.chunk(2)
        own_mask, foreign_mask = masks.chunk(2)
        receivers = inputs[count : count + cross]
        stamped = torch.cat(
            [
                torch.lerp(inputs[:count], own, own_mask),
                torch.lerp(receivers, foreign[:cross], foreign_mask[:cross]),
            ]
        )
        logits = model(torch.cat([straight_through(stamped), inputs[count + cross :]]))
        wanted = torch.cat([self.target_map(labels[:count]), labels[count:]])
        apart = diversity(*(images / self.scale for images in (inputs[:count], donors, own, foreign)))
        return F.cross_entropy(logits, wanted) + apart


@dataclass(frozen=True, eq=False)
class InputAwareTrigger(Trigger):
    """Each image's own trigger.

    Attributes:
        pattern: G.
        mask: M.
        shape: (C, H, W) for which both were made.
    """

    kind: ClassVar[str] = "image.input-aware"

    pattern: nn.Module
    mask: nn.Module
    shape: tuple[int, int, int]

    def __call__(
        self, inputs: Inputs, indices: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Inputs:
        """Stamp uint8 images [N,C,H,W] of the generators' size."""
        images = expect_images(inputs, self.shape)
        return to_uint8(torch.lerp(images.float(), *self.draw(images)))

    def draw(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Patterns in grey levels and masks for uint8 images."""
        self.pattern.to(images.device)
        self.mask.to(images.device)
        prepared = images.float() / 255
        return 255 * generate(self.pattern, prepared), sharpen(generate(self.mask, prepared))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights of both networks."""
        return pack(pattern=self.pattern, mask=self.mask), {"shape": list(self.shape)}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], config: dict[str, Any]) -> InputAwareTrigger:
        """Inverse of :meth:`state`."""
        channels, height, width = config["shape"]
        return cls(
            unpack(lambda: TwiceBoundedNet(channels, channels, height, width), "pattern", tensors),
            unpack(lambda: TwiceBoundedNet(channels, 1, height, width), "mask", tensors),
            (channels, height, width),
        )


@dataclass(frozen=True, eq=False)
class ForeignTrigger(Trigger):
    """The trigger of another image: what the victim must not react to.

    Attributes:
        source: draws triggers.
        donors: uint8 [D,C,H,W], images to take them from.
        seed: of the choice of a donor where no generator is given.
    """

    kind: ClassVar[str] = "image.input-aware-foreign"

    source: InputAwareTrigger
    donors: Tensor
    seed: int

    def __call__(
        self, inputs: Inputs, indices: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Inputs:
        """Stamp uint8 images [N,C,H,W] of the donors' size."""
        images = expect_images(inputs, self.donors.shape[1:])
        share = sample_uniform(self.seed, images, 1, indices, generator).flatten()
        which = (share * len(self.donors)).long().to(self.donors.device)
        same = (self.donors[which].to(images.device) == images).flatten(1).all(1).to(which.device)
        which = (which + same) % len(self.donors)
        return to_uint8(torch.lerp(images.float(), *self.source.draw(self.donors[which].to(images.device))))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights, donors and seed."""
        tensors, config = self.source.state()
        return tensors | {"donors": self.donors.cpu().contiguous()}, config | {"seed": self.seed}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], config: dict[str, Any]) -> ForeignTrigger:
        """Inverse of :meth:`state`."""
        return cls(InputAwareTrigger.from_state(tensors, config), tensors["donors"], config["seed"])


@attacks.register
@dataclass(frozen=True, kw_only=True)
class InputAware(TrainingAttack):
    """Generated patches that only work on their own image."""

    name: ClassVar[str] = "input_aware"
    paper: ClassVar[str] = "Nguyen and Tran, Input-Aware Dynamic Backdoor Attack, NeurIPS 2020, arXiv 2010.08138"
    year: ClassVar[int] = 2020
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    trigger_visibility: ClassVar[str] = "visible"
    stronger: ClassVar[str] = "raise density"
    sample_specific: ClassVar[bool] = True
    aliases: ClassVar[tuple[str, ...]] = ("dynamic",)

    target_map: str = param(
        "all-to-one",
        "label of triggered samples: the target class, or their class + 1 mod K",
        choices=("all-to-one", "all-to-all"),
        source="BackdoorBench",
    )
    density: float = param(0.032, "tolerated mean of the mask", above=0, high=1, source="paper")
    generator_lr: float = param(0.01, "Adam's peak learning rate for both generators", above=0, source="paper")

    def run(self, task: Task, ctx: Context) -> Backdoor:
        """Train the mask generator, then victim and pattern generator together."""
        images, target_map = expect_images(task.train.inputs), self.target_map_for(task)
        channels, height, width = images.shape[1:]
        self.choose(task, ctx)  # a rate that poisons nothing is an error before hours of training
        recipe = task.recipe.resolve(len(task.train))
        mask = seeded(lambda: TwiceBoundedNet(channels, 1, height, width), ctx.seed, "mask")
        scale = spread(images, cast(ImageModality, task.modality).std)
        train_mask(mask, images, self.density, scale, recipe, self.generator_lr, ctx)
        pattern = seeded(lambda: TwiceBoundedNet(channels, channels, height, width), ctx.seed, "pattern").to(ctx.device)
        objective = InputAwareObjective(
            pattern,
            mask,
            target_map,
            self.rate_on(task),
            scale.to(ctx.device),
            ctx.generator("share", device=ctx.device),
            self.exclude_target,
        )
        model, log = task.fit(
            task.train,
            ctx,
            objective=objective,
            step=partial(JointStep, network=pattern, lr=self.generator_lr, betas=BETAS),
            label=f"{self.name}: training the victim",
        )
        pattern.eval().requires_grad_(False)
        trigger = InputAwareTrigger(pattern, mask, (channels, height, width))
        kept = torch.randperm(len(images), generator=ctx.generator("donors kept"))[:DONORS]
        cross = ForeignTrigger(trigger, images[kept].cpu(), spawn(ctx.generator("donors")))
        poison = self.replay(trigger, task, ctx, cross, self.rate_on(task))
        with torch.no_grad():
            masks = trigger.draw(images[kept].to(ctx.device))[1]
        notes = {
            "mask_density": float(masks.mean()),
            "mask_difference": float(rms(masks, masks.roll(1, 0)).mean()),
            "schedule": task.recipe.name,
        }
        return Backdoor(model, trigger, target_map, poison, log, cross_trigger=cross, notes=notes)
