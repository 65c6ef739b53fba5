"""Evaluation passes: large batches, no gradient, nothing read back before the end."""

from __future__ import annotations

import torch
from torch import Tensor

from backdoorlab.data.split import Inputs
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.context import autocast


def predict(model: Classifier, inputs: Inputs, *, batch_size: int = 1000, precision: str = "auto") -> Tensor:
    """Logits of raw samples.

    Args:
        model: evaluated in evaluation mode (and left in the mode that it had).
        inputs: raw samples, N rows.
        batch_size: samples per forward pass.
        precision: as in :class:`~backdoorlab.training.recipes.Recipe`.

    Returns:
        float32 [N, K] on the CPU.
    """
    return _forward(model, model, inputs, batch_size, precision)


def predict_features(model: Classifier, inputs: Inputs, *, batch_size: int = 1000, precision: str = "auto") -> Tensor:
    """Penultimate features (the input of the last linear layer) of raw samples: float32 [N, D] on the CPU."""
    from backdoorlab.models.anatomy import features

    return _forward(model, lambda x: features(model, x), inputs, batch_size, precision)


def _forward(model, function, inputs: Inputs, batch_size: int, precision: str) -> Tensor:  # type: ignore[no-untyped-def]
    training, device = model.training, model.device
    model.eval()
    parts = []
    with torch.inference_mode(), autocast(device, precision):
        for start in range(0, len(inputs), batch_size):
            batch = model.modality.encode(inputs[start : start + batch_size]).to(device)
            parts.append(function(model.modality.prepare(batch)).float())
    model.train(training)
    # Joined outside of inference mode: the result is an ordinary tensor, which callers may use in autograd.
    return torch.cat(parts).cpu() if parts else torch.zeros(0, model.num_classes)
