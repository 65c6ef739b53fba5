"""Cognitive distillation: the smallest part of a sample that keeps the model's output.

Huang, Ma, Erfani, Bailey, "Distilling Cognitive Backdoor Patterns within an Image", ICLR 2023. What is minimised is
described in :mod:`backdoorlab.defenses.dataset.cd`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from backdoorlab.core.method import param
from backdoorlab.data.split import Inputs
from backdoorlab.models.anatomy import features, frozen
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.context import Context, autocast


def total_variation(masks: Tensor) -> Tensor:
    """Squared differences of neighbours, summed and divided by the number of entries: float [B, ..., H, W] -> [B]."""
    down = (masks[..., 1:, :] - masks[..., :-1, :]).square().flatten(1).sum(1)
    right = (masks[..., :, 1:] - masks[..., :, :-1]).square().flatten(1).sum(1)
    return (down + right) / masks[0].numel()


def distillation_loss(output: Tensor, wanted: Tensor, masks: Tensor, alpha: float, beta: float) -> Tensor:
    """|f(x) - f(x')|_1, mean over the entries, + alpha |m|_1 + beta TV(m), of each sample: float [B].

    Args:
        output: float [B, D] of the masked samples.
        wanted: float [B, D] of the samples.
        masks: float [B, ..., H, W] in [0, 1].
        alpha: weight of the mask's size.
        beta: weight of its roughness.
    """
    kept = (output - wanted).abs().flatten(1).mean(1)
    return kept + alpha * masks.abs().flatten(1).sum(1) + beta * total_variation(masks)


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """The hyper-parameters of the optimisation and the optimisation itself, for images and videos."""

    iterations: int = param(100, "steps of Adam per sample", low=1, source="paper")
    lr: float = param(0.1, "learning rate of Adam with betas 0.1 and 0.1", above=0, source="paper")
    alpha: float | None = param(
        None, "weight of the mask's size; none: 0.01 * 32 / side of the picture", low=0, source="paper, scaled"
    )
    beta: float = param(10.0, "weight of the mask's roughness", low=0, source="paper")
    target: str = param("logits", "output that must stay as it is", choices=("logits", "features"), source="paper")
    batch_size: int = param(512, "samples that are optimised at a time", low=1, source="ours")

    def masks(self, model: Classifier, inputs: Inputs, ctx: Context, label: str) -> Tensor:
        """The mask of each raw sample: float32 [N, 1, H, W] in [0, 1] on the CPU (videos: one for all frames)."""
        starts = range(0, len(inputs), self.batch_size)
        with frozen(model):
            parts = [
                self._distil(model, inputs[start : start + self.batch_size], ctx)
                for start in ctx.track(starts, label, len(starts))
            ]
        return torch.cat(parts)

    def _distil(self, model: Classifier, inputs: Inputs, ctx: Context) -> Tensor:
        x = model.modality.prepare(model.modality.encode(inputs).to(model.device))
        frames = (1,) * (x.dim() - 4)
        height, width = x.shape[-2:]
        alpha = 0.01 * 32 / math.sqrt(height * width) if self.alpha is None else self.alpha
        hidden = torch.ones(len(x), *frames, 1, height, width, device=x.device, requires_grad=True)
        optimizer = torch.optim.Adam([hidden], self.lr, betas=(0.1, 0.1))
        # One color a step for all samples: what a sample gets must not depend on those beside it.
        generator = ctx.generator("cd", "colours")

        def output(samples: Tensor) -> Tensor:
            with autocast(x.device):
                return (model(samples) if self.target == "logits" else features(model, samples)).float()

        with torch.no_grad():
            wanted = output(x)
        for _ in range(self.iterations):
            color = torch.rand(1, *frames, x.shape[-3], 1, 1, generator=generator).to(x.device)
            masks = hidden.tanh() / 2 + 0.5
            loss = distillation_loss(output(torch.lerp(color, x, masks)), wanted, masks, alpha, self.beta).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            return (hidden.tanh() / 2 + 0.5).reshape(len(x), 1, height, width).cpu()
