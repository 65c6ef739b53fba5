"""SD: tell poisoned samples by how much a random turn and shift changes their features.

The sample-distinguishing module of Chen, Wu, Wang, "Effective Backdoor Defense by Exploiting Sensitivity of Poisoned
Samples", NeurIPS 2022. With h the penultimate features of a model, d their number and t a random transformation,

    D(x) = |h(x) - h(t(x))|^2 / d

is large for poisoned samples: the transformation breaks the trigger, and with it the prediction.

1. A fresh model is trained on the suspicious set for a few epochs, without augmentation, and learns the trigger.
2. Its features are trained on, without the head, so that classes draw apart: the mean cosine similarity between the
   centroids of different classes in a batch goes down.
3. D is measured for every sample, t being a turn by any angle and a shift by up to a fifth of the sides.
4. Of each class the share ``trusted`` of lowest D is trusted, the share ``suspected`` of highest D of all samples is
   suspected; the rest is neither.

Choices and deviations
- D is the mean over ``transforms`` random transformations, and the same D sets the thresholds and is held against them.
  (Published code draws new transformations in between, so that the shares are not those asked for.)
- ``normalise`` divides features by their length first, so that D measures directions alone, for networks whose second
  stage shrinks all features. What triggers change is largely the length, so that it is off by default.
- Trust is given class by class; of all samples together the lowest fifth may lack whole classes, namely those that a
  turn changes most.
- Lengths are shares of the recipe, with its learning rate and schedule; each stage has at least two epochs.

Limits: in images that look alike after a turn (textures, aerial views) or whose class changes with it (6 and 9) D says
less. A trigger that survives turns and shifts, or one as wide as the image, is not sensitive.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorlab.core.method import param
from backdoorlab.data.split import Split
from backdoorlab.defenses.common.trust import lowest, lowest_of_each
from backdoorlab.modalities.base import expect_modality
from backdoorlab.modalities.image import ImageModality
from backdoorlab.modalities.views import turned_and_shifted
from backdoorlab.models.anatomy import evaluating, features
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.blueprint import Blueprint
from backdoorlab.training.context import Context, autocast
from backdoorlab.training.loop import fit


def centroid_similarity(found: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Mean cosine similarity between the centroids of different classes in a batch: a scalar, 0 for a single class.

    Args:
        found: features, float [B, D].
        labels: int64 [B].
        num_classes: K.
    """
    members = F.one_hot(labels, num_classes).to(found.dtype)
    centroids = F.normalize(members.T @ found)  # the number of members changes no direction
    present = (members.sum(0) > 0).to(found.dtype)
    pairs = present[:, None] * present[None, :] * (1 - torch.eye(num_classes, device=found.device))
    return (centroids @ centroids.T * pairs).sum() / pairs.sum().clamp(min=1)


def feature_distance(model: Classifier, first: Tensor, second: Tensor, normalise: bool) -> Tensor:
    """|h(a) - h(b)|^2 / d of two batches of prepared inputs: float32 [B]."""
    found = features(model, torch.cat([first, second])).float()
    found = F.normalize(found) if normalise else found
    before, after = found.chunk(2)
    return (before - after).square().mean(1)


@torch.no_grad()
def sensitivity(
    model: Classifier, data: Split, ctx: Context, *, transforms: int, normalise: bool, batch_size: int = 500
) -> Tensor:
    """D of every sample, the mean over random transformations, in evaluation mode.

    Args:
        model: an image classifier.
        data: raw images.
        ctx: its seed draws the transformations.
        transforms: how many of each sample.
        normalise: whether features are divided by their length.
        batch_size: samples per forward pass.

    Returns:
        Float32 [N] on the CPU.
    """
    modality = expect_modality(model.modality, ImageModality)
    generator = ctx.generator("turns and shifts", device=model.device)
    parts = []
    with evaluating(model), autocast(model.device):
        for start in range(0, len(data), batch_size):
            images = modality.prepare(modality.encode(data.inputs[start : start + batch_size]).to(model.device))
            rounds = [
                feature_distance(model, images, turned_and_shifted(images, generator, 180, 0.2), normalise)
                for _ in range(transforms)
            ]
            parts.append(torch.stack(rounds).mean(0).cpu())
    return torch.cat(parts)


@dataclass(frozen=True, kw_only=True)
class Distinguishing:
    """The hyper-parameters of sample distinguishing, and what it says of a training set."""

    learn: float = param(0.02, "length of the training that learns triggers / recipe", above=0, high=1, source="paper")
    separate: float = param(
        0.1, "length of the training that separates classes / recipe; 0 leaves it out", low=0, high=1, source="paper"
    )
    transforms: int = param(5, "random turns and shifts of each sample", low=1, source="ours (paper: 1)")
    normalise: bool = param(False, "divide features by their length", source="paper: no")
    trusted: float = param(0.2, "share of each class that is trusted", above=0, high=0.9, source="paper")
    suspected: float = param(0.05, "share of all samples that is suspected", above=0, high=0.5, source="paper")

    def distinguish(self, data: Split, blueprint: Blueprint, ctx: Context, name: str) -> Tensor:
        """D of every sample by a fresh model: float32 [N] on the CPU.

        Args:
            data: the suspicious set.
            blueprint: how models are built and trained.
            ctx: seed, device, progress.
            name: of the defense, for progress bars.
        """
        recipe = dataclasses.replace(blueprint.recipe.resolve(len(data)), augment=False)
        first = dataclasses.replace(recipe, epochs=max(2, round(self.learn * recipe.epochs)))
        model, _ = blueprint.fit(data, ctx.child("learn"), recipe=first, label=f"{name}: learning what is easy")
        if self.separate:
            second = dataclasses.replace(recipe, epochs=max(2, round(self.separate * recipe.epochs)))
            fit(
                model,
                data,
                second,
                objective=_apart,
                chance=math.inf,
                context=ctx.child("separate"),
                label=f"{name}: separating classes",
            )
        return sensitivity(model, data, ctx, transforms=self.transforms, normalise=self.normalise)

    def divided(self, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Which samples are trusted and which suspected: two bool [N], never both; each class has a trusted one."""
        trusted = lowest_of_each(scores, labels.cpu(), self.trusted)
        suspected = lowest(-scores.masked_fill(trusted, -math.inf), self.suspected) & ~trusted
        return trusted, suspected


def _apart(model: Classifier, inputs: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
    return centroid_similarity(features(model, inputs).float(), labels, model.num_classes)
