"""Small networks that draw triggers, shared by attacks that train one beside the victim."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.core.seeding import derive_seed, isolated_rng
from backdoorlab.models.anatomy import evaluating, frozen
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.batches import Batch
from backdoorlab.training.context import autocast
from backdoorlab.training.loop import Descent, Objective
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


GeneratorLoss = Callable[[Classifier, Batch], Tensor]
"""(victim, frozen and in evaluation mode; batch) -> what a generator goes down."""


class JointStep(Descent[Classifier]):
    """Victim and generator go down one loss; the generator has an Adam of its own.

    Attributes:
        network: the generator, in training mode.
        adam: its optimiser; its rate follows the recipe's schedule like the victim's.
    """

    def __init__(
        self,
        model: Classifier,
        recipe: Recipe,
        objective: Objective[Classifier],
        *,
        network: nn.Module,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        """``lr`` is Adam's peak rate."""
        super().__init__(model, recipe, objective)
        self.network = network.train()
        self.adam = torch.optim.Adam(network.parameters(), lr, betas)
        self.modules.append(network)
        self.optimizers.append(self.adam)

    def descend(self, loss: Tensor) -> None:
        """One step of both optimisers; Adam passes over a generator that had no part in the loss."""
        self.adam.zero_grad(set_to_none=True)
        super().descend(loss)
        self.adam.step()


class AlternatingStep(JointStep):
    """A step of the generator against the victim as it is, then one of the victim."""

    def __init__(
        self,
        model: Classifier,
        recipe: Recipe,
        objective: Objective[Classifier],
        *,
        network: nn.Module,
        loss: GeneratorLoss,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        """``loss`` is the generator's."""
        super().__init__(model, recipe, objective, network=network, lr=lr, betas=betas)
        self.generator_loss = loss

    def __call__(self, batch: Batch) -> Tensor:
        """See :class:`~backdoorlab.training.steps.Step`."""
        with frozen(self.model), autocast(batch.labels.device, self.recipe.precision):
            loss = self.generator_loss(self.model, batch)
            self.adam.zero_grad(set_to_none=True)
            loss.backward()
            self.adam.step()
        return super().__call__(batch)

    def descend(self, loss: Tensor) -> None:
        """The victim's step alone."""
        Descent.descend(self, loss)
