"""Neurons that a trigger excites, and images that excite the same ones without it.

From controlled detoxification: Cheng et al., "Deep Feature Space Trojan Attack of Neural Networks by Controlled
Detoxification", AAAI 2021; see ``attacks.image.dfst`` for what is chosen differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.attacks.common.generators import generate, seeded, straight_through
from backdoorlab.core.errors import NotApplicable
from backdoorlab.modalities.image import to_uint8
from backdoorlab.models.anatomy import Channels, channels, frozen
from backdoorlab.models.classifier import Classifier
from backdoorlab.models.networks.generators import DetailNet
from backdoorlab.training.batches import Repeat
from backdoorlab.training.context import Context
from backdoorlab.training.steps import LossStep, run_steps

BATCH = 32


def compromised(clean: Tensor, triggered: Tensor, lift: float) -> Tensor:
    """Units that fire much more on triggered samples: bool [U].

    Args:
        clean: [N,U], activations on benign samples, not negative.
        triggered: [N,U], on the same samples with the trigger.
        lift: least rise, as a share of the layer's largest benign activation.
    """
    usual = clean.mean(0)
    rise = triggered.mean(0) - usual
    return (rise > usual) & (rise > lift * clean.max())


def neuron_layers(model: Classifier) -> list[Channels]:
    """Layers whose rectified outputs are taken as neurons.

    Raises:
        NotApplicable: if the model has neither batch norms nor convolutions.
    """
    for kind in ("batchnorm", "conv"):
        if found := channels(model, kinds=(kind,)):
            return found
    raise NotApplicable(f"dfst: {model.arch} has neither batch norms nor convolutions to look for neurons in")


def activations(model: Classifier, layers: Sequence[Channels], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and for each layer the rectified outputs averaged over space, [N,U]; gradients flow."""
    outputs: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for layer in layers:

            def keep(_: nn.Module, __: Any, output: Tensor, layer: Channels = layer) -> None:
                outputs[layer.name] = F.relu(layer.units_last(output)).flatten(1, -2).mean(1)

            stack.callback(layer.module.register_forward_hook(keep).remove)
        logits = model(x)
    return logits, [outputs[layer.name] for layer in layers]


def injector_loss(
    logits: Tensor,
    found: Sequence[Tensor],
    clean: Sequence[Tensor],
    wanted: Sequence[Tensor],
    units: Sequence[Tensor],
    target: int,
    others: float,
) -> Tensor:
    """What an injector goes down.

    Args:
        logits: of injected images.
        found: activations of each layer on them, [N,U].
        clean: on the benign images.
        wanted: on the triggered images.
        units: bool [U] for each layer, the compromised.
        target: t.
        others: w.
    """
    misses, strays = [], []
    for now, usual, aim, chosen in zip(found, clean, wanted, units, strict=True):
        rise = (aim - usual).mean(0).clamp_min(1e-6)
        misses.append((((now - aim) / rise).square())[:, chosen])
        strays.append(((now - usual).abs() / usual.mean().clamp_min(1e-6))[:, ~chosen])
    goal = F.cross_entropy(logits, torch.full((len(logits),), target, device=logits.device))
    return torch.cat(misses, 1).mean() + others * torch.cat(strays, 1).mean() + goal


def observe(model: Classifier, layers: Sequence[Channels], images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """:func:`activations` of uint8 images [N,C,H,W] on the model's device, without gradients."""
    with torch.no_grad():
        parts = [activations(model, layers, part.float() / 255) for part in images.split(256)]
    return torch.cat([p[0] for p in parts]), [torch.cat(layer) for layer in zip(*(p[1] for p in parts), strict=True)]


def train_injector(
    model: Classifier,
    benign: Tensor,
    triggered: Tensor,
    target: int,
    lift: float,
    strength: float,
    others: float,
    steps: int,
    ctx: Context,
) -> tuple[nn.Module | None, int]:
    """A network whose bounded changes excite the compromised neurons.

    Args:
        model: the victim; evaluated, unchanged.
        benign: uint8 [N,C,H,W], on the model's device.
        triggered: the same with the trigger.
        target: class that triggered images get.
        lift: see :func:`compromised`.
        strength: largest change, as a share of the grey range.
        others: see :func:`injector_loss`.
        steps: of Adam (rate 0.001), on 32 images each.
        ctx: seed, progress.

    Returns:
        The network for :func:`inject` and how many neurons are compromised; None if that is none.
    """
    layers, draws = neuron_layers(model), ctx.generator("injector")
    channels, height, width = (int(n) for n in benign.shape[1:])
    (_, usual), (_, risen) = observe(model, layers, benign), observe(model, layers, triggered)
    units = [compromised(u, r, lift) for u, r in zip(usual, risen, strict=True)]
    count = int(sum(u.sum() for u in units))
    if not count:
        return None, 0
    network = seeded(lambda: DetailNet(channels, channels, height, width), ctx.seed, "injector")
    network.to(benign.device).train()

    def draw() -> Tensor:
        return torch.randint(0, len(benign), (min(BATCH, len(benign)),), generator=draws).to(benign.device)

    def loss(rows: Tensor) -> Tensor:
        x = benign[rows].float() / 255
        changed = straight_through((x + strength * (2 * network(x) - 1)).clamp(0, 1))
        logits, excited = activations(model, layers, changed)
        return injector_loss(logits, excited, [u[rows] for u in usual], [r[rows] for r in risen], units, target, others)

    step = LossStep(loss, torch.optim.Adam(network.parameters(), 1e-3), [network])
    with frozen(model):
        run_steps(step, Repeat(steps, draw), 1, context=ctx, label="training an injector")
    return network.eval().requires_grad_(False), count


def inject(network: nn.Module, images: Tensor, strength: float) -> Tensor:
    """Changed images, no pixel by more than ``strength`` of the grey range: uint8 [N,C,H,W]."""
    change = (255 * strength * (2 * generate(network, images.float() / 255) - 1)).trunc()
    return to_uint8(images.float() + change)
