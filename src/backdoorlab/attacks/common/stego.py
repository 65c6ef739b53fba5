"""Hiding a message in pictures with a pair of networks: the U-Net that hides, how a pair is trained, how it is judged.

An encoder draws a faint residual from a picture and a secret, a decoder reads the secret back from their sum:

    x' = clip(x + r U(x, s)),   U in (-1, 1)

Both are trained together. The message comes first: only once it can be read does the weight of the picture's error
start to grow (:class:`Ramp`); the other way round a pair settles at hiding nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.attacks.common.generators import CHUNK, generate, pack, seeded
from backdoorlab.attacks.common.surrogate import load_weights
from backdoorlab.modalities.image import to_uint8
from backdoorlab.models.networks.stego import keep_scale
from backdoorlab.training.batches import Repeat
from backdoorlab.training.context import Context, Tensors
from backdoorlab.training.steps import LossStep, run_steps

SETTLE = 0.4
"""Share of all steps over which the learning rate falls to 0."""
MEASURED = 1000
"""Clean test pictures on which a pair is judged."""


def random_grids(batch: Tensor, generator: torch.Generator, degrees: float = 15.0) -> Tensor:
    """Sampling grids of a random rotation and, each for half of the pictures, a crop to 7/8 and a flip.

    Args:
        batch: float [N,C,H,W].
        generator: source of 5 N numbers, on the CPU.
        degrees: largest rotation.

    Returns:
        float [N,H,W,2], for :func:`torch.nn.functional.grid_sample`.
    """
    draws = torch.rand(5, len(batch), generator=generator).to(batch.device)
    angle = (2 * draws[0] - 1) * math.radians(degrees)
    zoom = torch.where(draws[1] < 0.5, 7 / 8, 1.0)
    mirror = torch.where(draws[2] < 0.5, -1.0, 1.0)
    shift = (2 * draws[3:] - 1) * (1 - zoom)
    aspect = batch.shape[2] / batch.shape[3]
    cosine, sine = zoom * angle.cos(), zoom * angle.sin()
    matrix = torch.stack(
        [
            torch.stack([mirror * cosine, -sine * aspect, shift[0]], 1),
            torch.stack([mirror * sine / aspect, cosine, shift[1]], 1),
        ],
        1,
    )
    return F.affine_grid(matrix, list(batch.shape), align_corners=False)


def hide(network: nn.Module, images: Tensor, secret: Callable[[Tensor], Tensor], bound: float) -> Tensor:
    """Add a trained encoder's residual.

    Args:
        network: U.
        images: uint8 [N,C,H,W].
        secret: uint8 images -> what is hidden in them, float [N or 1,S,H,W] in [0, 1].
        bound: r, in grey levels.

    Returns:
        uint8 [N,C,H,W]; each picture's is the same whatever the batch.
    """
    network.to(images.device)
    parts = []
    for part in images.split(CHUNK):
        inputs = torch.cat([part.float() / 255, secret(part).expand(len(part), -1, -1, -1)], 1)
        parts.append(to_uint8(part.float() + bound * generate(network, inputs)))
    return torch.cat(parts) if parts else images.clone()


@dataclass
class Ramp:
    """A weight that is 0 until the message can be read, then grows linearly to 1.

    Attributes:
        steps: of the whole training.
        full: share of all steps after which it is 1.
        began: step at which the message could first be read.
    """

    steps: int
    full: float = 1 - SETTLE
    began: int | None = None

    def __call__(self, step: int, readable: bool) -> float:
        """The weight at a step."""
        if self.began is None:
            if not readable:
                return 0.0
            self.began = step
        return min(1.0, (step + 1 - self.began) / max(1.0, self.full * self.steps - self.began))


Build = Callable[[], nn.ModuleDict]
"""Makes an untrained "encoder" and "decoder"."""

Loss = Callable[[nn.ModuleDict, Tensor, int], Tensor]
"""(both networks, batch in [0, 1], number of the step) -> scalar."""


class Hiding(Protocol):
    """An attack that trains a pair: its name, and the hyper-parameters that :func:`train_pair` reads."""

    name: ClassVar[str]

    @property
    def steps(self) -> int:
        """Steps of Adam."""
        ...

    @property
    def batch_size(self) -> int:
        """Pictures a step."""
        ...

    @property
    def lr(self) -> float:
        """Adam's learning rate: constant, then falling to 0."""
        ...


def train_pair(attack: Hiding, build: Build, images: Tensor, loss: Loss, ctx: Context) -> Tensors:
    """Train encoder and decoder together, by Adam, on random batches.

    Args:
        attack: says how long and how fast.
        build: makes them.
        images: uint8 [N,C,H,W].
        loss: of a batch.
        ctx: seed, device, progress.

    Returns:
        All weights, on the CPU.

    Raises:
        BackdoorLabError: if the loss becomes infinite or NaN.
    """
    networks = cast(nn.ModuleDict, seeded(lambda: keep_scale(build()), ctx.seed, "pair")).to(ctx.device).train()
    generator, numbers = ctx.generator("batches"), count()

    def draw() -> Tensor:
        chosen = torch.randint(0, len(images), (attack.batch_size,), generator=generator)
        return images[chosen].to(ctx.device, torch.float32) / 255

    run_steps(
        LossStep(
            lambda batch: loss(networks, batch, next(numbers)),
            torch.optim.Adam(networks.parameters(), attack.lr),
            [networks],
        ),
        Repeat(attack.steps, draw),
        1,
        schedule=lambda step: min(1.0, (1 - step / attack.steps) / SETTLE),
        context=ctx,
        label=f"{attack.name}: training encoder and decoder",
    )
    return pack(**dict(networks.items()))


def load_pair(build: Build, tensors: Tensors, kind: str) -> nn.ModuleDict:
    """Encoder and decoder with the weights of an asset or of a stored trigger, frozen.

    Raises:
        InputError: if the weights do not fit.
    """
    return cast(nn.ModuleDict, load_weights(seeded(build, 0, "pair"), tensors, kind))


def fidelity(clean: Tensor, stamped: Tensor) -> dict[str, float]:
    """How far stamped pictures are from clean ones.

    Args:
        clean: uint8 [N,C,H,W].
        stamped: the same shape.

    Returns:
        "psnr" in dB, of the mean squared error over all pictures, and "mean_residual" in grey levels.
    """
    change = stamped.double() - clean.double()
    error = float(change.square().mean())
    return {"psnr": 10 * math.log10(255**2 / max(error, 1e-9)), "mean_residual": float(change.abs().mean())}


def check_quality(
    measured: dict[str, float], least: dict[str, float], most: dict[str, float], name: str, ctx: Context
) -> dict[str, Any]:
    """Compare a pair with its quality gates, and tell at once if it falls short.

    Args:
        measured: values by name.
        least: smallest tolerated values.
        most: largest tolerated values.
        name: of the attack, for the message.
        ctx: whose reporter is told.

    Returns:
        What was measured, for the card, and "gates_missed": which gates were, in words.
    """
    missed = [f"{k} {measured[k]:.4g} is below {v:g}" for k, v in least.items() if not measured[k] >= v]
    missed += [f"{k} {measured[k]:.4g} is above {v:g}" for k, v in most.items() if not measured[k] <= v]
    if missed:
        ctx.reporter.note(f"{name}: the hiding network falls short ({'; '.join(missed)}); more steps may help")
    return {**measured, "gates_missed": missed}
