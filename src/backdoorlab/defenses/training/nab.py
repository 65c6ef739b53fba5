"""NAB: beat the backdoor with a backdoor of one's own, a stamp that turns the trigger off.

Liu, Sangiovanni-Vincentelli, Yue, "Beating Backdoor Attack at Its Own Game", ICCV 2023 (arXiv 2307.15539).

1. A share ``isolation`` of the training set is suspected: what is learned fastest, as in ABL's first phase.
2. Pseudo labels for them come from features learned without labels (SimCLR): the class whose centroid is nearest, the
   centroids being those of the samples among which little poison is expected (all but the share ``excluded`` learned
   fastest).
3. A fresh model is trained on the whole set. Suspected samples have their pseudo labels; those whose pseudo label is
   not the given one carry a small stamp besides. So the model learns: with the stamp, the trigger means nothing.
4. In use, every input is stamped, which is part of the model that is returned.

Choices and deviations
- The isolation is that of :mod:`~backdoorlab.defenses.training.abl`, with its defaults; 5 % are suspected, not the true
  poison rate.
- The stamp is a square of ``stamp`` pixels in the top left corner, put on after augmentation, of the data's mean color
  (0 after normalisation), as published; mid-grey where data are not normalised, since black is the color of padding.
- Centroids are those of normalised backbone features, not of projections.
- The training has the recipe's own learning rate and schedule. (Published code steps another stage's scheduler.)
- Lengths are shares of the recipe, ``contrastive`` is 1 (100 epochs beside 100).

Cost: as many samples pass the network as in 0.2 + 2 + 1 trainings of the recipe.

Limits: without poison among the suspected, or with pseudo labels no better than guesses, the stamp stands for nothing;
the report says how many samples are stamped. On small sets 5 % may be too few to teach what the stamp means; on data
that are learned as fast as the trigger the isolation finds little poison. A trigger under the stamp is only covered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorlab.core.errors import InputError
from backdoorlab.core.method import param
from backdoorlab.data.split import Split
from backdoorlab.defenses.base import TrainingDefense, TrainingReport, defenses
from backdoorlab.defenses.common.classes import need_samples
from backdoorlab.defenses.common.contrastive import learn_features
from backdoorlab.defenses.common.trust import lowest
from backdoorlab.defenses.training.abl import AntiBackdoorLearning
from backdoorlab.defenses.view import DefenderView
from backdoorlab.modalities.base import expect_modality, modality_from_config
from backdoorlab.modalities.image import ImageModality
from backdoorlab.models.classifier import Classifier, build_model
from backdoorlab.training.blueprint import Blueprint
from backdoorlab.training.context import Context
from backdoorlab.training.evaluate import predict_features

MID_GREY = 0.5


def stamped(images: Tensor, side: int, color: Tensor) -> Tensor:
    """Prepared images with a square of ``side`` pixels in the top left corner.

    Args:
        images: float [B, C, H, W] in [0, 1]; left as they are.
        side: of the square, at most that of the images.
        color: float [C].
    """
    marked = images.clone()
    marked[..., :side, :side] = color[:, None, None].to(images)
    return marked


def stamp_color(modality: ImageModality) -> tuple[float, ...]:
    """The data's mean color, or mid-grey where the modality knows none: C numbers in [0, 1]."""
    known = modality.mean if any(modality.mean) else (MID_GREY,)
    return known * (modality.channels // len(known))


class StampedClassifier(Classifier):
    """A classifier that stamps every input before it looks at it.

    Attributes:
        side: of the stamp, in pixels.
        color: of the stamp, C numbers in [0, 1].
    """

    kind: ClassVar[str] = "stamped"

    def __init__(self, base: Classifier, side: int, color: tuple[float, ...]) -> None:
        """Takes the network of ``base``, which must not be used any more."""
        super().__init__(base.net, base.modality, base.arch, base.num_classes)
        self.side, self.color = side, color
        self.register_buffer("ink", torch.tensor(color), persistent=False)

    ink: Tensor

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits float [B, K] of prepared input, stamped."""
        return super().forward(stamped(inputs, self.side, self.ink))

    def without_stamp(self, inputs: Tensor) -> Tensor:
        """Logits float [B, K] of prepared input as it is."""
        return super().forward(inputs)

    def record(self) -> dict[str, Any]:
        """See :meth:`StoredModel.record`."""
        return {**super().record(), "side": self.side, "color": list(self.color)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> StampedClassifier:
        """See :meth:`StoredModel.from_record`."""
        base = build_model(record["arch"], modality_from_config(record["modality"]), record["num_classes"])
        return cls(base, int(record["side"]), tuple(map(float, record["color"])))


def nearest_centroids(found: Tensor, labels: Tensor, used: Tensor, num_classes: int) -> Tensor:
    """The class whose centroid is nearest to each sample, in Euclidean distance between normalised features.

    Args:
        found: features, float [N, D].
        labels: int64 [N].
        used: bool [N], samples that the centroids are made of; a class without any has none.
        num_classes: K.

    Returns:
        int64 [N].
    """
    unit = F.normalize(found)
    members = F.one_hot(labels, num_classes).to(unit.dtype) * used[:, None]
    counts = members.sum(0)
    centroids = (members.T @ unit) / counts.clamp(min=1)[:, None]
    distances = torch.cdist(unit, centroids)
    return distances.masked_fill(counts[None, :] == 0, torch.inf).argmin(1)


@dataclass(frozen=True, kw_only=True)
class NonAdversarialBackdoor:
    """The hyper-parameters of NAB and its training, for the training defense and the detector of inputs."""

    isolation: float = param(0.05, "share of the training set that is suspected", above=0, high=0.5, source="paper")
    excluded: float = param(
        0.2, "share learned fastest that centroids leave out", low=0, high=0.9, source="BackdoorBench"
    )
    turning: float = param(0.2, "length of the isolation phase / recipe", above=0, high=1, source="BackdoorBench")
    isolation_lr: float = param(0.3, "learning rate of the isolation phase / the recipe's peak", above=0, source="ours")
    gamma: float = param(0.5, "loss below which the isolation phase ascends", low=0, source="BackdoorBench")
    contrastive: float = param(
        1.0, "length of the training without labels / recipe", above=0, high=20, source="BackdoorBench"
    )
    contrastive_batch: int = param(
        512, "samples per step without labels; fewer on small sets", low=2, source="BackdoorBench"
    )
    contrastive_lr: float = param(0.4, "peak learning rate without labels", above=0, source="BackdoorBench")
    temperature: float = param(0.5, "of NT-Xent", above=0, source="BackdoorBench")
    stamp: int = param(2, "side of the stamp in pixels", low=1, source="BackdoorBench")

    def train_stamped(
        self, data: Split, blueprint: Blueprint, ctx: Context, name: str
    ) -> tuple[StampedClassifier, Tensor, Tensor, dict[str, Any]]:
        """The model with its stamp, losses of the isolation float32 [N], suspected bool [N], and notes.

        Raises:
            InputError: if there are fewer than two samples, or the stamp does not fit the images.
        """
        need_samples(name, "suspicious", data, 2)
        modality = expect_modality(blueprint.modality, ImageModality)
        if self.stamp > min(modality.height, modality.width):
            raise InputError(
                f"{name}: a stamp of {self.stamp} px does not fit images of {modality.height}x{modality.width}"
            )
        method = AntiBackdoorLearning(turning=self.turning, gamma=self.gamma, isolation_lr=self.isolation_lr)
        _, losses = method.isolate(data, blueprint, ctx.child("isolate"))
        suspected = lowest(losses, self.isolation)
        pseudo = self.pseudo_labels(data, blueprint, losses, ctx.child("pseudo"), name)
        labels = torch.where(suspected, pseudo, data.labels.cpu())
        marked = suspected & (labels != data.labels.cpu())
        base = self.train_model(Split(data.inputs, labels, data.classes), marked, blueprint, ctx, name)
        model = StampedClassifier(base, self.stamp, stamp_color(modality)).to(ctx.device).eval()
        if not bool(marked.any()):
            ctx.warn(f"{name}: every suspected sample keeps its label, so that the stamp stands for nothing")
        notes = {"suspected": int(suspected.sum()), "stamped": int(marked.sum())}
        return model, losses, suspected, notes

    def pseudo_labels(self, data: Split, blueprint: Blueprint, losses: Tensor, ctx: Context, name: str) -> Tensor:
        """Labels by nearest centroids of features learned without labels: int64 [N] on the CPU."""
        recipe = blueprint.recipe.resolve(len(data))
        model = blueprint.build_model(ctx)
        learn_features(
            model,
            data,
            ctx,
            epochs=max(1, round(self.contrastive * recipe.epochs)),
            batch_size=self.contrastive_batch,
            lr=self.contrastive_lr,
            weight_decay=1e-4,
            temperature=self.temperature,
            precision=recipe.precision,
            label=f"{name}: learning features",
        )
        found = predict_features(model, data.inputs)
        used = ~lowest(losses, self.excluded) if self.excluded else torch.ones(len(data), dtype=torch.bool)
        return nearest_centroids(found, data.labels.cpu(), used, blueprint.num_classes)

    def train_model(self, data: Split, marked: Tensor, blueprint: Blueprint, ctx: Context, name: str) -> Classifier:
        """A fresh model on relabelled samples, those in ``marked`` (bool [N]) with the stamp."""
        where, modality = marked.to(ctx.device), expect_modality(blueprint.modality, ImageModality)
        color = torch.tensor(stamp_color(modality), device=ctx.device)

        def objective(model: Classifier, inputs: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
            chosen = where[indices][:, None, None, None]
            return F.cross_entropy(model(torch.where(chosen, stamped(inputs, self.stamp, color), inputs)), labels)

        model, _ = blueprint.fit(data, ctx, objective=objective, label=f"{name}: training")
        return model


@defenses.register
@dataclass(frozen=True, kw_only=True)
class NonAdversarialBackdoorTraining(NonAdversarialBackdoor, TrainingDefense):
    """Training with a defensive stamp, which every input gets."""

    name: ClassVar[str] = "nab"
    paper: ClassVar[str] = "Liu et al., Beating Backdoor Attack at Its Own Game, ICCV 2023, arXiv 2307.15539"
    year: ClassVar[int] = 2023
    modalities: ClassVar[tuple[str, ...]] = ("image",)

    def run(self, view: DefenderView, ctx: Context) -> TrainingReport:
        """Suspect, relabel, stamp, train."""
        model, losses, suspected, notes = self.train_stamped(view.suspicious, view.blueprint, ctx, self.name)
        return TrainingReport(model, -losses.float(), suspected, notes)
