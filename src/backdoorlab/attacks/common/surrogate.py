"""The clean model that an attacker trains first, shared by every attack that needs one."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from backdoorlab.core.errors import InputError
from backdoorlab.data.split import content_digest
from backdoorlab.models.classifier import Classifier
from backdoorlab.tasks import Task
from backdoorlab.training.context import Context, Tensors


def surrogate_spec(task: Task) -> dict[str, Any]:
    """Everything that a model trained on the clean task depends on, JSON-able; the run's seed is not part of it."""
    return {
        "dataset": dataclasses.asdict(task.spec.dataset),
        "data": content_digest(task.train.inputs, task.train.labels),
        "modality": {"name": task.modality.name, **task.modality.config()},
        "model": task.spec.model,
        "recipe": dataclasses.asdict(task.recipe),
    }


def load_weights(network: nn.Module, weights: Tensors, kind: str) -> nn.Module:
    """Fill a network with an asset's tensors, which may come from a file of the user's; then freeze it.

    Args:
        network: of the right architecture.
        weights: what ``ctx.asset`` returned.
        kind: of the asset, for the message.

    Returns:
        The same network, in evaluation mode, without gradients.

    Raises:
        InputError: if names or shapes differ from the network's.
    """
    own = network.state_dict()
    for name, wanted in own.items():
        if name not in weights:
            raise InputError(f"asset {kind} lacks the tensor {name!r} (shape {tuple(wanted.shape)}) of this network")
        if weights[name].shape != wanted.shape:
            raise InputError(
                f"asset {kind}: {name!r} must have shape {tuple(wanted.shape)}, got {tuple(weights[name].shape)}"
            )
    if left := sorted(set(weights) - set(own)):
        raise InputError(f"asset {kind}: this network has no tensor {left[0]!r} ({len(left)} names do not belong)")
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)


def asset_tensor(tensors: Tensors, name: str, shape: tuple[int, ...], kind: str) -> Tensor:
    """One tensor of an asset that may come from a file of the user's.

    Args:
        tensors: what ``ctx.asset`` returned.
        name: of the tensor.
        shape: that it must have.
        kind: of the asset, for the message.

    Raises:
        InputError: if it is missing, of another shape, or not of finite numbers.
    """
    if name not in tensors:
        has = ", ".join(sorted(tensors))
        raise InputError(f"asset {kind} lacks the tensor {name!r} (shape {shape}); it has: {has}")
    found = torch.as_tensor(tensors[name])
    if tuple(found.shape) != tuple(shape):
        raise InputError(f"asset {kind}: {name!r} must have shape {tuple(shape)}, got {tuple(found.shape)}")
    if not bool(torch.isfinite(found).all()):
        raise InputError(f"asset {kind}: {name!r} holds numbers that are not finite")
    return found.float()


def weights_of(network: nn.Module) -> Tensors:
    """All parameters and buffers by name, on the CPU."""
    return {name: value.detach().cpu() for name, value in network.state_dict().items()}


def clean_surrogate(task: Task, ctx: Context) -> Classifier:
    """A benign model of the task's own architecture and recipe, shared by all runs, or the user's.

    Args:
        task: whose training data it knows.
        ctx: device, cache.

    Returns:
        The model on the context's device, in evaluation mode, with frozen parameters.
    """

    def build(own: Context) -> Tensors:
        model, _ = task.fit(task.train, own, model=task.build_model(own), label="training a clean surrogate")
        return weights_of(model)

    model = task.build_model(ctx)
    load_weights(model, ctx.asset("clean-surrogate", surrogate_spec(task), build), "clean-surrogate")
    return model
