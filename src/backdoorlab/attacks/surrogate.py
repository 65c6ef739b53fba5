"""The clean model that an attacker trains first, shared by every attack that needs one."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backdoorlab.data.split import Inputs, pack_inputs
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.context import Context, Tensors
from backdoorlab.training.task import Task


def data_digest(inputs: Inputs, labels: Tensor) -> str:
    """Short SHA-256 of samples and labels: two data sets that merely share a name do not share a surrogate."""
    digest = hashlib.sha256()
    for tensor in (*pack_inputs(inputs).values(), labels):
        digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).data)
    return digest.hexdigest()[:16]


def surrogate_spec(task: Task) -> dict[str, Any]:
    """Everything that a model trained on the clean task depends on, JSON-able; the run's seed is not part of it."""
    return {
        "dataset": dataclasses.asdict(task.spec.dataset),
        "data": data_digest(task.train.inputs, task.train.labels),
        "modality": {"name": task.modality.name, **task.modality.config()},
        "model": task.spec.model,
        "recipe": dataclasses.asdict(task.recipe),
    }


def clean_surrogate(task: Task, ctx: Context) -> Classifier:
    """A benign model of the task's own architecture and recipe, trained once and shared by all runs.

    Returns:
        The model on the context's device, in evaluation mode, with frozen parameters.
    """

    def build(own: Context) -> Tensors:
        model, _ = task.fit(task.train, own, label="training a clean surrogate")
        return {name: value.detach().cpu() for name, value in model.state_dict().items()}

    weights = ctx.asset("clean-surrogate", surrogate_spec(task), build)
    model = task.build_model(ctx)
    model.load_state_dict({name: torch.as_tensor(value) for name, value in weights.items()})
    return model.eval().requires_grad_(False)
