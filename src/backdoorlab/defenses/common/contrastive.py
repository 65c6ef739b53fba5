"""Features from contrastive learning: without labels (SimCLR), or with those that are trusted (SupCon).

Chen, Kornblith, Norouzi, Hinton, "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020;
Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020. With z the normalised projections of two views of each
sample, P(i) the views that sample i is pulled to, and A(i) all views but itself,

    - mean_i 1 / |P(i)| sum_{p in P(i)} log( exp(z_i . z_p / T) / sum_{a in A(i)} exp(z_i . z_a / T) )

Without labels P(i) is the other view of the same sample, which is NT-Xent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.core.errors import NotApplicable
from backdoorlab.core.seeding import derive_seed, isolated_rng
from backdoorlab.data.split import Split
from backdoorlab.modalities.image import ImageModality
from backdoorlab.modalities.views import strong_view
from backdoorlab.models.anatomy import features, head
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.batches import Batch, Shuffled
from backdoorlab.training.context import Context, autocast
from backdoorlab.training.log import FitLog
from backdoorlab.training.steps import run_steps

PROJECTED = 128


def contrastive_loss(projections: Tensor, groups: Tensor, temperature: float) -> Tensor:
    """The loss above.

    Args:
        projections: float [2 B, D] of length 1, two views of each sample one after the other.
        groups: int64 [B]; a sample is pulled to all views of its group, -1 to its own other view only.
        temperature: T.
    """
    count = len(groups)
    similar = projections.float() @ projections.float().T / temperature
    itself = torch.eye(2 * count, dtype=torch.bool, device=similar.device)
    same = (groups[:, None] == groups[None, :]) & (groups >= 0)[:, None]
    same = same | torch.eye(count, dtype=torch.bool, device=groups.device)
    positive = same.repeat(2, 2) & ~itself
    logs = similar - similar.masked_fill(itself, -math.inf).logsumexp(1, keepdim=True)
    return -((logs * positive).sum(1) / positive.sum(1)).mean()


class ContrastiveStep:
    """One step of a backbone and its projector.

    Attributes:
        modules: model and projector.
        optimizers: SGD of both; the head has no part in the loss and stays.
    """

    def __init__(
        self, model: Classifier, lr: float, weight_decay: float, temperature: float, groups: Tensor, precision: str
    ) -> None:
        """``groups`` int64 [N]: see :func:`contrastive_loss`, by sample index."""
        width = head(model).in_features
        projector = nn.Sequential(
            nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, PROJECTED)
        ).to(model.device)
        self.modules: Sequence[nn.Module] = (model.train(), projector.train())
        parameters = [p for module in self.modules for p in module.parameters()]
        self.optimizers = [torch.optim.SGD(parameters, lr, 0.9, weight_decay=weight_decay)]
        self.temperature, self.groups, self.precision = temperature, groups.to(model.device), precision

    def __call__(self, batch: Batch) -> Tensor:
        """See :class:`~backdoorlab.training.steps.Step`."""
        model, projector = self.modules
        with autocast(batch.labels.device, self.precision):
            projections = projector(features(cast(Classifier, model), torch.cat(batch.views)))
        loss = contrastive_loss(F.normalize(projections.float()), self.groups[batch.indices], self.temperature)
        self.optimizers[0].zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for module in self.modules for p in module.parameters()], 1.0)
        self.optimizers[0].step()
        return loss.detach()


def learn_features(
    model: Classifier,
    data: Split,
    ctx: Context,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    temperature: float,
    groups: Tensor | None = None,
    blur: bool = True,
    precision: str = "auto",
    label: str,
) -> FitLog:
    """Train the backbone of a model in place, by a cosine schedule; its head is left as it was.

    Args:
        model: an image classifier.
        data: uint8 images; labels are not used.
        ctx: seed, device, progress.
        epochs: passes over the data.
        batch_size: samples per step (two views each); at most all.
        lr: peak learning rate of SGD with momentum 0.9; it climbs over the first tenth of the training.
        weight_decay: L2 penalty.
        temperature: T.
        groups: int64 [N], see :func:`contrastive_loss`; None is NT-Xent.
        blur: whether some of the views are blurred.
        precision: of autocast.
        label: shown beside the progress bar.

    Raises:
        NotApplicable: for models of other data than images, or without a linear head.
    """
    modality = model.modality
    if not isinstance(modality, ImageModality):
        raise NotApplicable(f"contrastive learning needs random views of images, got {modality.name}")
    groups = torch.full((len(data),), -1) if groups is None else groups
    with isolated_rng(derive_seed(ctx.seed, "projector")):
        step = ContrastiveStep(model.to(ctx.device), lr, weight_decay, temperature, groups, precision)
    view = partial(_view, modality=modality, blur=blur)
    generator = ctx.generator("contrastive", device=ctx.device)
    batches = Shuffled(data, modality, min(batch_size, len(data)), generator, views=2, view=view)
    total = epochs * len(batches)
    warm = max(1, total // 10)
    log = run_steps(
        step,
        batches,
        epochs,
        schedule=lambda n: (n + 1) / warm if n < warm else 0.5 * (1 + math.cos(math.pi * (n - warm) / (total - warm))),
        context=ctx,
        label=label,
    )
    model.eval()
    return log


def _view(images: Tensor, generator: torch.Generator, modality: ImageModality, blur: bool) -> Tensor:
    return strong_view(images, modality, generator, blur=blur)
