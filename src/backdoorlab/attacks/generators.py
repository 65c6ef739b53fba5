"""Small networks that draw triggers, shared by attacks that train one beside the victim."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.core.seeding import derive_seed, isolated_rng
from backdoorlab.models.anatomy import evaluating
from backdoorlab.training.context import autocast
from backdoorlab.training.recipes import Recipe

CHUNK = 64
"""Images per forward pass of a stored generator."""


def straight_through(images: Tensor) -> Tensor:
    """Images in [0, 1] rounded to grey levels, with the gradient of the identity."""
    return images + ((images * 255).round() / 255 - images).detach()


def rms(a: Tensor, b: Tensor) -> Tensor:
    """Root mean square difference of each pair of rows, differentiable where they are equal: float [N]."""
    return ((a - b).flatten(1).square().mean(1) + 1e-12).sqrt()


def seeded(build: Callable[[], nn.Module], seed: int, name: str) -> nn.Module:
    """A network with weights drawn for (seed, name), leaving torch's global generator alone."""
    with isolated_rng(derive_seed(seed, "init", name)):
        return build()


def generate(network: nn.Module, images: Tensor) -> Tensor:
    """Run a generator in evaluation mode over prepared images [N,C,H,W], in the precision in which it was trained.

    Passes have one size, filled up with zeros: a convolution may sum in another order for another batch size, and a
    stamped grey level must not depend on how many images are stamped at once.
    """
    network.to(memory_format=torch.channels_last)
    parts = []
    with evaluating(network), torch.no_grad(), autocast(images.device):
        for part in images.contiguous(memory_format=torch.channels_last).split(CHUNK):
            padded = F.pad(part, (0, 0, 0, 0, 0, 0, 0, CHUNK - len(part)))
            parts.append(network(padded)[: len(part)].float())
    return torch.cat(parts).contiguous()


def pack(**networks: nn.Module) -> dict[str, Tensor]:
    """All weights and buffers as "network.name" -> tensor on the CPU."""
    return {
        f"{prefix}.{name}": value.detach().cpu().contiguous()
        for prefix, network in networks.items()
        for name, value in network.state_dict().items()
    }


def unpack(build: Callable[[], nn.Module], prefix: str, tensors: dict[str, Tensor]) -> nn.Module:
    """Rebuild what :func:`pack` stored; in evaluation mode and frozen.

    Raises:
        ValueError: if the tensors do not fit.
    """
    network = seeded(build, 0, prefix)
    own = {name.removeprefix(prefix + "."): value for name, value in tensors.items() if name.startswith(prefix + ".")}
    try:
        network.load_state_dict(own)
    except RuntimeError as error:
        raise ValueError(str(error).splitlines()[-1].strip()) from None
    return network.eval().requires_grad_(False)


class Companion:
    """Adam for a network that is trained beside the victim, its rate following the recipe's schedule.

    Attributes:
        optimizer: Adam.
        lr: peak rate.
        taken: steps so far.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], recipe: Recipe, samples: int
    ) -> None:
        """For a training of ``recipe`` (resolved) on ``samples`` samples."""
        self.optimizer, self.lr, self.recipe = torch.optim.Adam(params, lr, betas), lr, recipe
        self.steps_per_epoch, self.taken = samples // recipe.batch_size, 0

    def step(self) -> None:
        """Apply the gradients that there are, then forget them; nothing happens if there are none."""
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        if all(p.grad is None for p in params):
            return
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self.recipe.factor(self.taken, self.steps_per_epoch)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.taken += 1


def _block(given: int, made: int, relu: bool = True) -> list[nn.Module]:
    layers = [nn.Conv2d(given, made, 3, padding=1), nn.BatchNorm2d(made, momentum=0.05)]
    return [*layers, nn.ReLU()] if relu else layers


class DetailNet(nn.Module):
    """Encoder and decoder with max pooling and bilinear upsampling, back to any size: out in (0, 1).

    Two 3x3 blocks per stage; widths double from 32 over three stages, or from 16 over two below 32 px.
    """

    def __init__(self, channels: int, made: int, height: int, width: int) -> None:
        super().__init__()
        widths = (32, 64, 128) if min(height, width) >= 32 else (16, 32)
        down, up, current = [], [], channels
        for wide in widths:
            down.append(nn.Sequential(*_block(current, wide), *_block(wide, wide)))
            current = wide
        self.middle = nn.Sequential(*_block(current, current))
        for wide in (*reversed(widths[:-1]), made):
            up.append(nn.Sequential(*_block(current, current), *_block(current, wide, relu=wide != made)))
            current = wide
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,H,W] in [0, 1] -> [N,made,H,W] in (0, 1)."""
        sizes = []
        for stage in self.down:
            x = stage(x)
            sizes.append(x.shape[2:])
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for stage, size in zip(self.up, reversed(sizes), strict=True):
            x = stage(F.interpolate(x, size, mode="bilinear", align_corners=False))
        return torch.tanh(x) / 2 + 0.5


class StrideNet(nn.Module):
    """Auto-encoder of strided 4x4 convolutions (16, 32, 64, 128 channels) and their transposes: out in (-1, 1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = (channels, 16, 32, 64, 128)
        pairs = list(pairwise(widths))
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(given, made, 4, 2, 1), nn.BatchNorm2d(made), nn.ReLU()) for given, made in pairs
        )
        self.up = nn.ModuleList(nn.ConvTranspose2d(made, given, 4, 2, 1) for given, made in reversed(pairs))
        self.norms = nn.ModuleList(nn.BatchNorm2d(given) for given, _ in reversed(pairs[1:]))

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,H,W] in [0, 1] -> [N,C,H,W] in (-1, 1); sides of at least 16, odd ones too."""
        sizes = []
        for stage in self.down:
            sizes.append(list(x.shape[2:]))
            x = stage(x)
        for place, up in enumerate(self.up):
            x = up(x, output_size=sizes.pop())
            if place < len(self.norms):
                x = F.relu(self.norms[place](x))
        return torch.tanh(x)
