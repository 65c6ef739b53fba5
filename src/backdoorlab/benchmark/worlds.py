"""The two kinds of tasks, classifiers and diffusion models, behind one set of functions.

The generative side is imported only when a task asks for it, since it needs an optional dependency.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backdoorlab.attacks.base import Backdoor, restore_model
from backdoorlab.attacks.trigger import stamp_all
from backdoorlab.core.errors import ArtifactError
from backdoorlab.metrics.classification import rate
from backdoorlab.metrics.visibility import visibility
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.context import Context
from backdoorlab.training.evaluate import predict
from backdoorlab.training.loop import FitLog
from backdoorlab.training.recipes import Recipe, recipe_for, typed_changes
from backdoorlab.training.task import Task, TaskSpec

State = tuple[dict[str, dict[str, Tensor]], dict[str, Any]]
"""Tensors by file name, and a JSON-able record."""

_PIXELS = 1 << 22
"""Values that :func:`visibility_of` compares at most; SSIM needs some ten copies of them in float64."""


def load_task(spec: TaskSpec, root: str | Path | None, download: bool) -> Task:
    """Load data, model and recipe of either kind."""
    if spec.kind == "diffusion":
        from backdoorlab.diffusion.task import load_diffusion_task

        generative: Any = load_diffusion_task(spec, root=root, download=download)
        return generative
    if spec.kind != "classifier":
        raise ArtifactError(f"unknown kind of task {spec.kind!r}; known: classifier, diffusion")
    return Task.load(spec, root=root, download=download)


def recipe_changes(kind: str, given: Mapping[str, object]) -> tuple[tuple[str, Any], ...]:
    """Changes of a recipe's fields, as :class:`TaskSpec` holds them, with values of the right type.

    Args:
        kind: of the task.
        given: values, or text that stands for them, by field.

    Raises:
        InputError: for an unknown field, or a value of another type.
    """
    if kind == "diffusion":
        from backdoorlab.diffusion.task import DiffusionRecipe

        return tuple(typed_changes(DiffusionRecipe, given, "diffusion recipe").items())
    return tuple(typed_changes(Recipe, given).items())


def check_recipe(spec: TaskSpec, modality: str) -> None:
    """Build the recipe of a task before its data are loaded.

    Raises:
        InputError: for an unknown recipe or field, or a value of the wrong type or out of range.
    """
    changes = dict(spec.recipe_changes)
    if spec.kind == "diffusion":
        from backdoorlab.diffusion.task import diffusion_recipe_for

        diffusion_recipe_for(spec.recipe, **changes)
    else:
        recipe_for(modality, spec.recipe, **changes)


def backdoor_state(backdoor: Backdoor) -> State:
    """What is stored of a backdoor; the record says under "backdoor" which class reads it."""
    tensors, record = backdoor.state()
    return tensors, plain({"backdoor": "classifier"} | record)


def restore_backdoor(state: State, device: torch.device) -> Backdoor:
    """Inverse of :func:`backdoor_state`, with the model on the device."""
    tensors, record = state
    kind, cls = record.get("backdoor"), Backdoor
    if kind == "diffusion":
        from backdoorlab.diffusion.base import DiffusionBackdoor

        cls = DiffusionBackdoor  # type: ignore[assignment]
    elif kind != "classifier":
        raise ArtifactError(f"unknown kind of backdoor {kind!r}; known: classifier, diffusion")
    backdoor = cls.from_state(tensors, record)
    backdoor.model.to(device)
    return backdoor


def try_out(backdoor: Backdoor, task: Task) -> None:
    """Apply what was restored to one sample, so that tensors which do not fit are noticed at once.

    Raises:
        ArtifactError: if the trigger changes the form of samples, or the model has other classes than the task.
        RuntimeError: whatever torch says of tensors that do not fit.
    """
    if task.spec.kind != "classifier":
        return
    sample = task.test.inputs[:1]
    if stamp_all(backdoor.trigger, sample, device=backdoor.model.device).shape != sample.shape:
        raise ArtifactError("the trigger changes the form of samples")
    if predict(backdoor.model, sample).shape[1] != task.num_classes:
        raise ArtifactError(f"the model has other classes than the {task.num_classes} of the data")


def model_state(model: Classifier) -> State:
    """What is stored of a model on its own."""
    own: Any = getattr(model, "record", None)
    record = own() if own else {"arch": model.arch, "num_classes": model.num_classes,
                                "modality": {"name": model.modality.name, **model.modality.config()}}  # fmt: skip
    return {"model": dict(model.state_dict())}, plain({"network": "diffusion" if own else "classifier"} | record)


def load_model(state: State, device: torch.device) -> Classifier:
    """Inverse of :func:`model_state`, on the device."""
    tensors, record = state
    if record.get("network") == "diffusion":
        from backdoorlab.diffusion.denoiser import restore_denoiser

        denoiser: Any = restore_denoiser(record, tensors["model"])
        return denoiser.to(device)
    return restore_model(record, tensors["model"]).to(device)


def benign(task: Task, ctx: Context) -> tuple[State, FitLog]:
    """The same architecture and recipe on clean data; for generative tasks the clean model in a backdoor's dress."""
    if task.spec.kind == "diffusion":
        from backdoorlab.diffusion.base import benign_backdoor

        generative: Any = task
        dressed: Any = benign_backdoor(generative, ctx)
        return backdoor_state(dressed), dressed.log
    model, log = task.fit(task.train, ctx, label="training the benign model")
    return model_state(model), log


def measure(backdoor: Backdoor, task: Task, ctx: Context, model: Classifier | None = None) -> dict[str, Any]:
    """Metrics of a backdoor's victim or of another model; "x_note" says why x is None."""
    found = backdoor.measure(task, ctx, model)
    if task.spec.kind == "diffusion":
        found = {"ra_note": found.get("acc_note", "a generative model classifies nothing")} | found
    return found


def visibility_of(backdoor: Backdoor, task: Task, most: int = 256) -> dict[str, Any]:
    """PSNR in dB, SSIM and L-infinity of the trigger on the first test images that count for ASR, for the card's notes.

    Empty for other data than images, and if no test image counts. At most ``most`` images, fewer if they are large.
    """
    if task.spec.kind != "classifier" or task.modality.name != "image":
        return {}
    images = task.test.inputs
    assert isinstance(images, Tensor)
    count = max(1, min(most, _PIXELS // images[0].numel()))
    clean = images[backdoor.target_map.tested(task.test.labels).nonzero().flatten()[:count]]
    if not len(clean):
        return {}
    stamped = stamp_all(backdoor.trigger, clean, device=backdoor.model.device)
    assert isinstance(stamped, Tensor)
    seen = visibility(clean, stamped)
    return {"psnr_db": seen.psnr, "ssim": seen.ssim, "linf": seen.linf}


def measure_benign(task: Task, model: Classifier) -> dict[str, Any]:
    """Clean accuracy, overall and per class."""
    right = predict(model, task.test.inputs).argmax(1) == task.test.labels
    per_class = [rate(right[task.test.labels == k]) for k in range(task.num_classes)]
    return {"acc": rate(right), "n_clean": len(right), "acc_per_class": per_class}


def plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as it comes back from JSON."""
    return dict(json.loads(json.dumps(record, allow_nan=False)))
