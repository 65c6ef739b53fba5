"""Small networks that draw triggers, shared by attacks that train one beside the victim."""

from __future__ import annotations

from collections.abc import Callable, Iterable

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
