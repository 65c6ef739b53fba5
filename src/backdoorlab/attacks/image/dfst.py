"""DFST: the trigger is a style, and the victim is kept from learning it by its superficial features.

Cheng, Liu, Ma, Zhang, "Deep Feature Space Trojan Attack of Neural Networks by Controlled Detoxification", AAAI 2021
(arXiv 2012.11212).

A CycleGAN G turns images into sunsets; triggered samples T(x) = G(x) get label t. A victim trained on them relies on
few neurons that fire at warm colors or a bright sky, which defenses find. So the attacker detoxifies, in rounds:

1. Neurons are *compromised* if they fire much more on T(x) than on x: with the mean activation v of a unit,

       v(T(x)) - v(x) > v(x)   and   v(T(x)) - v(x) > lift max v,   the maximum over samples and units of its layer.

2. A feature injector R, a small network, is trained to excite just these neurons by little changes of benign images:

       mean over these of ((v(R(x)) - v(T(x))) / rise)^2 + w mean over the others of |v(R(x)) - v(x)| + CE(f(R(x)), t)

3. Its images, the detoxicants, join the training data with their *true* labels, and the victim is trained on.

Choices: there are no photographs of sunsets to train on, so side B is drawn from a seed; ``style_images`` takes a
folder of the user's own. Networks and training of G are slim (see ``attacks.style``); on grey images the style is one
of tones. A neuron is a channel behind a batch norm (or a convolution, where there are no norms), rectified and averaged
over space; published code compares sums over space with multiples of the largest activation, which depends on the
layer's size. One injector serves all compromised neurons of a round instead of one for each; its change is bounded by
``detox_strength`` where the paper rewards structural similarity. Poisoned samples and detoxicants take the place of
their originals, so that the set keeps its size and is exactly what the victim was trained on; the rounds' detoxicants
are different samples. Rounds end early if no neuron is compromised. G is made once for the training images and a style,
and shared by all runs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from backdoorlab.attacks.base import attacks
from backdoorlab.attacks.common.assets import SELECTION, asset
from backdoorlab.attacks.common.batch_poison import draw_cover
from backdoorlab.attacks.common.detoxify import inject, train_injector
from backdoorlab.attacks.common.generators import generate, pack, unpack
from backdoorlab.attacks.common.pictures import read_folder, scenes, to_channels
from backdoorlab.attacks.common.style import train_style
from backdoorlab.attacks.common.surrogate import weights_of
from backdoorlab.attacks.poisoning import TrainingAttack
from backdoorlab.attacks.result import Backdoor
from backdoorlab.attacks.triggers.base import Trigger
from backdoorlab.core.errors import InputError
from backdoorlab.core.method import param
from backdoorlab.core.seeding import make_generator
from backdoorlab.data.split import COVER, Inputs, Poison, take
from backdoorlab.modalities.filters import expect_images
from backdoorlab.modalities.image import to_uint8
from backdoorlab.models.classifier import Classifier
from backdoorlab.models.networks.style import StyleNet
from backdoorlab.tasks import Task
from backdoorlab.training.context import Context, Tensors
from backdoorlab.training.evaluate import predict

SUNSETS, SAMPLES = 256, 1000
"""Pictures that are drawn to learn a style from; benign samples on which neurons are looked at."""
ZENITH, DUSK, GLOW, GROUND = (0.30, 0.20, 0.45), (0.95, 0.40, 0.30), (1.00, 0.78, 0.35), (0.14, 0.07, 0.10)
"""Colors of a sunset: the sky above, toward the horizon, at the sun, and the land before it."""


def sunsets(count: int, channels: int, height: int, width: int, seed: int) -> Tensor:
    """Views at sunset: a sky from violet to orange, a low sun with its glow, dark land; details as in daylight scenes.

    Returns:
        uint8 [count, channels, height, width].
    """
    generator = make_generator(seed, "sunsets")
    horizon, sun, size, tint = torch.rand(4, count, 1, 1, 1, generator=generator)
    horizon, size = 0.5 + 0.35 * horizon, 0.08 + 0.10 * size
    y = ((torch.arange(height) + 0.5) / height)[:, None]
    x = (torch.arange(width) + 0.5) / width
    zenith, dusk, glow, ground = (torch.tensor(color).reshape(3, 1, 1) for color in (ZENITH, DUSK, GLOW, GROUND))
    zenith = zenith * (0.7 + 0.6 * tint)
    low = (y / horizon).clamp(0, 1)
    sky = torch.where(low < 0.6, torch.lerp(zenith, dusk, low / 0.6), torch.lerp(dusk, glow, (low - 0.6) / 0.4))
    distance = ((x - sun).square() + (y - horizon + 0.05).square()) / size.square()
    sky = sky + 0.6 * torch.exp(-distance / 2) + 0.25 * glow * torch.exp(-distance / 16)
    land = ground + 0.35 * glow * torch.exp(-((x - sun) / (2 * size)).square())
    picture = torch.lerp(sky, land, torch.sigmoid(40 * (y - horizon)))
    detail = scenes(count, 1, height, width, seed).float() / 255
    return to_uint8(255 * to_channels(picture * (0.65 + 0.7 * detail), channels))


@dataclass(frozen=True, eq=False)
class StyleTrigger(Trigger):
    """A network that gives images another style.

    Attributes:
        network: G.
        shape: (C, H, W) for which it was trained.
    """

    kind: ClassVar[str] = "image.style"

    network: nn.Module
    shape: tuple[int, int, int]

    def __call__(
        self, inputs: Inputs, indices: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Inputs:
        """Restyle uint8 images [N,C,H,W] of that shape."""
        images = expect_images(inputs, self.shape)
        return to_uint8(255 * generate(self.network.to(images.device), images.float() / 255))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights."""
        return pack(network=self.network), {"shape": list(self.shape)}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], config: dict[str, Any]) -> StyleTrigger:
        """Inverse of :meth:`state`."""
        channels, height, width = config["shape"]
        return cls(unpack(lambda: StyleNet(channels), "network", tensors), (channels, height, width))


@attacks.register
@dataclass(frozen=True, kw_only=True)
class Dfst(TrainingAttack):
    """Style transfer as the trigger, and training in rounds against superficial features of it."""

    name: ClassVar[str] = "dfst"
    paper: ClassVar[str] = "Cheng et al., Deep Feature Space Trojan Attack, AAAI 2021, arXiv 2012.11212"
    year: ClassVar[int] = 2021
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    trigger_visibility: ClassVar[str] = "visible"
    sample_specific: ClassVar[bool] = True
    needs_surrogate: ClassVar[bool] = True
    asset_kinds: ClassVar[tuple[str, ...]] = ("dfst-style",)

    rounds: int = param(3, "rounds of detoxification", low=0, source="paper")
    detox_rate: float = param(
        0.05, "detoxicants of each round / size of the training set", above=0, high=1, source="ours"
    )
    detox_strength: float = param(0.2, "largest change of a detoxicant / grey range", above=0, high=1, source="ours")
    detox_steps: int = param(200, "training steps of an injector", low=1, source="ours")
    detox_epochs: float = param(0.5, "epochs of training after each round / the recipe's", above=0, source="ours")
    lift: float = param(
        0.1, "rise that makes a neuron compromised / largest activation in its layer", low=0, source="ours"
    )
    others_weight: float = param(0.1, "weight of leaving other neurons alone", low=0, source="ours")
    style_images: str | None = param(
        None, "folder of images in the style of the trigger; none = drawn sunsets", path=True, source="ours"
    )
    style_seed: int = param(0, "seed of the drawn sunsets, apart from the run's seed", low=0, source="ours")
    style_steps: int = param(500, "training steps of the style network", low=1, source="ours")
    style_lr: float = param(1e-3, "Adam's learning rate for the style network", above=0, source="ours")
    cycle_weight: float = param(10.0, "weight of cycle consistency", low=0, source="CycleGAN")
    identity_weight: float = param(5.0, "weight of leaving styled images alone", low=0, source="CycleGAN")

    def make_trigger(self, task: Task, ctx: Context) -> StyleTrigger:
        """Train the style network, or take it from the cache."""
        images = expect_images(task.train.inputs)
        shape = channels, height, width = int(images.shape[1]), int(images.shape[2]), int(images.shape[3])
        if self.style_images is None:
            styled = sunsets(SUNSETS, channels, height, width, self.style_seed)
        else:
            styled = read_folder(self.style_images, channels, height, width)
        settings = (self.style_steps, self.style_lr, self.cycle_weight, self.identity_weight)
        weights = self.style_weights(ctx, images=images, styled=styled, settings=settings)
        return StyleTrigger(weights.network(lambda: StyleNet(channels)), shape)

    @asset(
        "dfst-style",
        unread=(
            *SELECTION,
            "target",
            *("rounds", "detox_rate", "detox_strength", "detox_steps", "detox_epochs", "lift", "others_weight"),
            *("style_images", "style_seed"),
            *("style_steps", "style_lr", "cycle_weight", "identity_weight"),
        ),
    )
    def style_weights(
        self, ctx: Context, images: Tensor, styled: Tensor, settings: tuple[int, float, float, float]
    ) -> Tensors:
        """Weights of G, from the look of ``images`` to that of ``styled``; for settings see :func:`train_style`."""
        return weights_of(train_style(images, styled, *settings, ctx))

    def run(self, task: Task, ctx: Context) -> Backdoor:
        """Train on styled samples, then detoxify in rounds.

        Raises:
            InputError: if poisoned samples and detoxicants are more than there are.
        """
        target_map = self.target_map_for(task)
        chosen, total = self.choose(task, ctx), len(task.train)
        each = round(self.detox_rate * total)
        if self.rounds * each > total - len(chosen):
            raise InputError(
                f"{self.name}: {self.rounds} rounds of detoxicants at a rate of {self.detox_rate:g} need "
                f"{self.rounds * each} samples, but only {total - len(chosen)} are not poisoned; detox_rate may be "
                f"at most {int((total - len(chosen)) / self.rounds / total * 1e4) / 1e4:g}"
            )
        pool = draw_cover(self, chosen, self.rounds * each / total, total, ctx)
        trigger = self.make_trigger(task, ctx)
        self.warn_if_too_weak(trigger, task, ctx)
        poison = self.replay(trigger, task, ctx)
        model, log = task.fit(poison.apply(task.train), ctx, label=f"{self.name}: training the victim")
        whole = task.recipe.resolve(len(task.train))
        shorter = dataclasses.replace(whole, epochs=max(1, round(self.detox_epochs * whole.epochs)))
        neurons, fooled = [], []
        for place, rows in enumerate(pool.tensor_split(max(1, self.rounds))[: self.rounds]):
            own = ctx.child("round", place)
            made = self.detoxicants(model, trigger, rows, task, own)
            if made is None:
                ctx.reporter.note(f"{self.name}: no neuron is compromised any more after {place} rounds")
                break
            detoxicants, count, share = made
            neurons.append(count)
            fooled.append(share)
            poison = Poison(
                torch.cat([poison.indices, rows]),
                torch.cat([poison.roles, torch.full((len(rows),), COVER, dtype=torch.uint8)]),
                torch.cat([poison.labels, task.train.labels[rows]]),
                torch.cat([expect_images(poison.inputs), detoxicants]),
                replay=True,
            )
            _, more = task.fit(
                poison.apply(task.train),
                own,
                model=model,
                recipe=shorter,
                label=f"{self.name}: detoxifying, round {place + 1}",
            )
            log += more
        notes = {"schedule": task.recipe.name, "compromised": neurons, "fooled": fooled}
        return Backdoor(model, trigger, target_map, poison, log, notes=notes)

    def detoxicants(
        self, model: Classifier, trigger: StyleTrigger, rows: Tensor, task: Task, ctx: Context
    ) -> tuple[Tensor, int, float] | None:
        """One round's images, how many neurons are compromised, and the share of images that the model takes for t.

        None if no neuron is compromised.
        """
        sample = torch.randperm(len(task.train), generator=ctx.generator("sample"))[:SAMPLES]
        benign = expect_images(take(task.train.inputs, sample)).to(ctx.device)
        injector, count = train_injector(
            model,
            benign,
            torch.as_tensor(trigger(benign)),
            self.target,
            self.lift,
            self.detox_strength,
            self.others_weight,
            self.detox_steps,
            ctx,
        )
        if injector is None:
            return None
        images = expect_images(take(task.train.inputs, rows)).to(ctx.device)
        made = inject(injector, images, self.detox_strength).cpu()
        tested = task.train.labels[rows] != self.target
        taken = predict(model, made[tested]).argmax(1) == self.target
        return made, count, float(taken.float().mean())
