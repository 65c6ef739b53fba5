"""TeCo: triggered images survive some corruptions far better than others.

Liu, Li, Wang, Hu, Ye, Jin, Wu, Xiao, "Detecting Backdoors During the Inference Stage Based on Corruption Robustness
Consistency", CVPR 2023 (arXiv 2303.18191).

An image x that is classified as y is put through 15 common corruptions in severities 1 to 5. For corruption c,

    r_c(x) = smallest severity at which the class is no longer y,  6 if it never changes,

and the score is the standard deviation of r_1..r_15 (over N, not N - 1). Clean images fail at about the same severity
everywhere; a trigger withstands blur but not noise, or the other way round. Only predicted classes are needed.

Every corrupted image is made from the image as it was given, never from one that is corrupted already. The corruptions
are described in :mod:`backdoorlab.defenses.common.corruptions`.

Choices: the paper reports AUROC and the best F1 and states no threshold; here inputs are rejected that score above the
``frr`` quantile of the clean samples. No image is scored by random numbers of its own: all meet the same fields, so a
score does not depend on what else is in the batch.

Limits: 75 forward passes an input. A network that learned a corruption (augmentation) or data that survive most
corruptions (large, plain shapes) leave little to compare. Images only.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backdoorlab.core.errors import InputError
from backdoorlab.core.method import param
from backdoorlab.data.split import Inputs
from backdoorlab.defenses.base import InputDefense, InputDetector, defenses
from backdoorlab.defenses.common.calibration import clean_quantile
from backdoorlab.defenses.common.corruptions import LARGE, SEVERITIES, STRENGTHS, Corruptions
from backdoorlab.defenses.view import DefenderView
from backdoorlab.models.anatomy import evaluating
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.context import Context, autocast

FORWARD_BATCH = 1024
"""Images per forward pass."""


def first_change(changed: Tensor) -> Tensor:
    """Severity from 1 at which the class first changes, S + 1 if never; bool [R, S, N] -> int64 [R, N]."""
    severity = torch.arange(1, changed.shape[1] + 1, device=changed.device)[None, :, None]
    return torch.where(changed, severity, changed.shape[1] + 1).amin(1)


def deviation(first: Tensor) -> Tensor:
    """Standard deviation over corruptions; int64 [R, N] -> float32 [N]."""
    return first.float().std(0, correction=0)


def robustness(model: Classifier, inputs: Tensor, corruptions: Corruptions) -> Tensor:
    """Severity at which each corruption changes the class of raw images [N,C,H,W]: int64 [R, N] on the CPU."""
    parts = [torch.zeros(len(corruptions.names), 0, dtype=torch.int64)]
    with evaluating(model), torch.inference_mode(), autocast(model.device):
        for start in range(0, len(inputs), FORWARD_BATCH):
            x = model.modality.prepare(model.modality.encode(inputs[start : start + FORWARD_BATCH]).to(model.device))
            given = model(x).argmax(1)
            changed = [
                torch.stack([model(corruptions(x, name, s)).argmax(1) != given for s in range(1, SEVERITIES + 1)])
                for name in corruptions.names
            ]
            parts.append(first_change(torch.stack(changed)).cpu())
    return torch.cat(parts, 1)


@dataclass(frozen=True, eq=False)
class TeCoDetector(InputDetector):
    """Scores images by how unevenly they withstand corruptions."""

    model: Classifier
    corruptions: Corruptions
    threshold: float = float("inf")

    def score(self, inputs: Inputs) -> Tensor:
        """Standard deviation of the severities: float32 [N] on the CPU."""
        return deviation(robustness(self.model, self.model.modality.encode(inputs), self.corruptions))


@defenses.register
@dataclass(frozen=True, kw_only=True)
class TeCo(InputDefense):
    """Consistency of robustness to common corruptions."""

    name: ClassVar[str] = "teco"
    paper: ClassVar[str] = "Liu et al., TeCo, CVPR 2023, arXiv 2303.18191"
    year: ClassVar[int] = 2023
    modalities: ClassVar[tuple[str, ...]] = ("image",)

    strengths: str = param(
        "auto",
        f"of the corruptions; auto = small below {LARGE} px, else large",
        choices=("auto", *STRENGTHS),
        source="CIFAR-10-C, ImageNet-C",
    )
    frr: float = param(0.05, "share of clean inputs that may be rejected", above=0, high=1, source="ours")

    def run(self, view: DefenderView, ctx: Context) -> TeCoDetector:
        """Draw the corruptions' random fields and set the threshold on the clean samples.

        Raises:
            InputError: without clean samples.
        """
        model, clean = view.model, view.clean
        if not len(clean):
            raise InputError("teco needs clean samples for its threshold, got none")
        images = model.modality.encode(clean.inputs)
        shape = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))
        strengths = self.strengths if self.strengths != "auto" else "small" if min(shape[1:]) < LARGE else "large"
        fields = Corruptions(shape, strengths, ctx.generator("teco"), model.device)
        detector = TeCoDetector(model, fields)
        return dataclasses.replace(detector, threshold=clean_quantile(detector.score(images), self.frr))
