"""Features from contrastive learning: without labels (SimCLR), or with those that are trusted (SupCon).

Chen, Kornblith, Norouzi, Hinton, "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020;
Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020. With z the normalised projections of two views of each
sample, P(i) the views that sample i is pulled to, and A(i) all views but itself,

    - mean_i 1 / |P(i)| sum_{p in P(i)} log( exp(z_i . z_p / T) / sum_{a in A(i)} exp(z_i . z_a / T) )

Without labels P(i) is the other view of the same sample, which is NT-Xent.

Choices: on small sets a batch is at most a sixteenth of the samples (or ``LEAST``), so that an epoch has several
steps, and the learning rate is smaller in proportion; the gradient is clipped to norm 1, since the rates of the
literature, meant for hundreds of epochs, make short trainings diverge. A head is trained on stored features, which
costs next to nothing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
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
from backdoorlab.training.batches import Batch, Repeat, Shuffled
from backdoorlab.training.context import Context, autocast
from backdoorlab.training.evaluate import predict_features
from backdoorlab.training.log import FitLog
from backdoorlab.training.steps import LossStep, run_steps
from backdoorlab.training.watch import Watch

PROJECTED = 128
"""Numbers in a projection."""
LEAST, PARTS = 64, 16
"""Small sets: samples of a batch at least, and batches of an epoch."""


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
        batch_size: samples per step (two views each); fewer on small sets.
        lr: peak learning rate for batches of that size, of SGD with momentum 0.9; it climbs over the first tenth of the
            training.
        weight_decay: L2 penalty.
        temperature: T.
        groups: int64 [N], see :func:`contrastive_loss`; None is NT-Xent.
        blur: whether some of the views are blurred.
        precision: of autocast.
        label: shown beside the progress bar.

    Raises:
        NotApplicable: for models of other data than images, or without a linear head.
        BackdoorLabError: if the training diverges twice.
    """
    modality = model.modality
    if not isinstance(modality, ImageModality):
        raise NotApplicable(f"contrastive learning needs random views of images, got {modality.name}")
    groups = torch.full((len(data),), -1) if groups is None else groups
    batch = min(batch_size, len(data), max(LEAST, len(data) // PARTS))
    with isolated_rng(derive_seed(ctx.seed, "projector")):
        step = ContrastiveStep(
            model.to(ctx.device), lr * batch / batch_size, weight_decay, temperature, groups, precision
        )
    view = partial(_view, modality=modality, blur=blur)
    generator = ctx.generator("contrastive", device=ctx.device)
    batches = Shuffled(data, modality, batch, generator, views=2, view=view)
    total = epochs * len(batches)
    warm = max(1, total // 10)
    log = run_steps(
        step,
        batches,
        epochs,
        schedule=lambda n: (n + 1) / warm if n < warm else 0.5 * (1 + math.cos(math.pi * (n - warm) / (total - warm))),
        watch=Watch(step.modules, step.optimizers),
        context=ctx,
        label=label,
    )
    model.eval()
    return log


def _view(images: Tensor, generator: torch.Generator, modality: ImageModality, blur: bool) -> Tensor:
    return strong_view(images, modality, generator, blur=blur)


def fit_head(
    model: Classifier,
    data: Split,
    draw: Callable[[torch.Generator], Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    ctx: Context,
    *,
    steps: int,
    lr: float,
    label: str,
) -> None:
    """Train the linear head of a model in place, from zero, by Adam; all other weights stay.

    Features are computed once, without augmentation, centred and divided by one number, so that the rate does not
    depend on their scale; the head undoes both.

    Args:
        model: on the context's device.
        data: raw samples.
        draw: rows of a batch, int64 [B] on the generator's device.
        loss: of the logits [B, K] of a batch and its rows; a scalar.
        ctx: seed, device, progress.
        steps: how many.
        lr: learning rate.
        label: shown beside the progress bar.

    Raises:
        NotApplicable: if the model has no linear head with a bias.
    """
    last = head(model)
    if last.bias is None:
        raise NotApplicable(f"{model.arch}: its linear head has no bias, which a head trained anew needs")
    table = predict_features(model, data.inputs).to(ctx.device)
    centre = table.mean(0)
    scale = (table - centre).square().mean().sqrt().clamp(min=1e-6)
    table = (table - centre) / scale
    fresh = copy.deepcopy(last)
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.Adam(fresh.parameters(), lr)
    generator = ctx.generator("head", device=ctx.device)
    run_steps(
        LossStep(lambda rows: loss(fresh(table[rows]), rows), optimizer, [fresh]),
        Repeat(steps, lambda: draw(generator)),
        1,
        context=ctx,
        label=label,
    )
    with torch.no_grad():
        last.weight.copy_(fresh.weight / scale)
        last.bias.copy_(fresh.bias - last.weight @ centre)
