"""SCALE-UP: a triggered input keeps its label when its amplitudes are multiplied.

Guo, Li, Chen, Guo, Sun, Liu, "SCALE-UP: An Efficient Black-box Input-level Backdoor Detection via Analyzing Scaled
Prediction Consistency", ICLR 2023 (arXiv 2302.03251).

The scaled prediction consistency of an input x, with amplitudes in [0, 1] (sounds: [-1, 1]), is the share of scaled
copies that are classified as x is:

    SPC(x) = 1/|S| sum_{n in S} [ argmax f(clip(n x)) = argmax f(x) ],      S = {3, 5, 7, 9, 11}

Benign images saturate and change their class; a trigger that is bright, or that the network has learned far beyond what
it needs, still wins. Each copy is made from x itself, never from another copy.

All copies of an input are one batch [M * (|S| + 1)].

``setting="free"`` (the paper's data-free case) takes SPC itself. ``setting="limited"`` standardises it by mean and
standard deviation of the clean samples that are *predicted* as x is, since some classes survive scaling better than
others. A class with fewer than two clean samples, or without spread, is standardised by all clean samples; no standard
deviation counts for less than that of one changed copy in |S|, which bounds the score.

Choices
- The decision. The paper leaves it to the user: T on the SPC, from 0.5 to 0.8 in published code. Whether that is
  right depends on the data (bright strokes on black survive any scaling), so by default inputs are rejected that score
  above the ``frr`` quantile of clean samples (``limited``: one half of them gives the statistics of the classes, the
  other the threshold). ``decision="fixed"`` rejects SPC > ``spc_threshold``.
- Ties. SPC has |S| + 1 values, and where more than a share ``frr`` of the clean samples reach 1 no quantile separates
  anything. Among inputs of equal SPC the mean confidence of the scaled copies in the class of x decides, which adds
  less than one step to the score. ``ties="none"`` is the paper's score, for models that tell classes only.
- ``free`` is the default: a backdoor's target class with a high usual SPC hides the trigger from ``limited``.

Limits: triggers that do not grow with the amplitude (dark ones, warps, changes of color) are missed, and data whose
content is binary by nature (digits, line drawings) survive scaling as triggers do.
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
from backdoorlab.defenses.common.calibration import clean_quantile, halves
from backdoorlab.defenses.view import DefenderView
from backdoorlab.models.anatomy import evaluating
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.context import Context, autocast

FORWARD_BATCH = 2048
"""Scaled copies per forward pass."""


def scaled_copies(x: Tensor, scales: tuple[float, ...], signed: bool) -> Tensor:
    """Every scaled copy of prepared inputs [B, ...] in [0, 1] (``signed``: [-1, 1]): [|S|, B, ...], clipped."""
    factors = torch.tensor(scales, dtype=x.dtype, device=x.device).reshape(-1, *(1,) * x.dim())
    return (x.unsqueeze(0) * factors).clamp(-1.0 if signed else 0.0, 1.0)


def consistency(
    model: Classifier, inputs: Inputs, scales: tuple[float, ...], ties: str = "none"
) -> tuple[Tensor, Tensor]:
    """SPC of raw inputs, float32 [N], and their predicted classes, int64 [N], on the CPU.

    Args:
        model: in evaluation mode while this lasts.
        inputs: raw samples, N rows.
        scales: factors S.
        ties: "confidence" adds the mean confidence of the scaled copies in the class, times 0.99 / |S|: less than one
            step of the SPC.
    """
    modality, device = model.modality, model.device
    group = max(1, FORWARD_BATCH // (1 + len(scales)))
    shares, classes = [torch.zeros(0)], [torch.zeros(0, dtype=torch.int64)]
    with evaluating(model), torch.inference_mode():
        for start in range(0, len(inputs), group):
            x = modality.prepare(modality.encode(inputs[start : start + group]).to(device))
            stacked = torch.cat([x.unsqueeze(0), scaled_copies(x, scales, modality.name == "audio")])
            with autocast(device):
                logits = model(stacked.flatten(0, 1)).float().unflatten(0, stacked.shape[:2])
            predicted = logits.argmax(2)
            share = (predicted[1:] == predicted[0]).float().mean(0)
            if ties == "confidence":
                sure = logits[1:].softmax(2).gather(2, predicted[:1].expand(len(scales), -1).unsqueeze(2))
                share = share + sure.mean((0, 2)) * 0.99 / len(scales)
            shares.append(share.cpu())
            classes.append(predicted[0].cpu())
    return torch.cat(shares), torch.cat(classes)


@dataclass(frozen=True, eq=False)
class Standard:
    """Mean and standard deviation of the SPC of clean samples, by predicted class: float32 [K] each."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, spc: Tensor, classes: Tensor, count: int, copies: int) -> Standard:
        """From clean samples; classes with fewer than two, or without spread, take the statistics of all samples.

        Args:
            spc: float32 [N].
            classes: int64 [N], predicted.
            count: K.
            copies: |S|; a standard deviation is at least what one changed copy makes, 1 / |S|.
        """
        own = torch.nn.functional.one_hot(classes, count).to(spc.dtype)
        number = own.sum(0)
        mean = (own * spc[:, None]).sum(0) / number.clamp_min(1)
        variance = (own * (spc[:, None] - mean).square()).sum(0) / (number - 1).clamp_min(1)
        usable = (number >= 2) & (variance > 0)
        everything = spc.std() if len(spc) > 1 else spc.new_zeros(())
        std = torch.where(usable, variance.sqrt(), everything)
        return cls(torch.where(number >= 2, mean, spc.mean()), std.clamp_min(1 / copies))

    def __call__(self, spc: Tensor, classes: Tensor) -> Tensor:
        """Standard scores of inputs: float32 [N]."""
        return (spc - self.mean[classes]) / self.std[classes]


@dataclass(frozen=True, eq=False)
class ScaleUpDetector(InputDetector):
    """Scores inputs by their (standardised) consistency."""

    model: Classifier
    scales: tuple[float, ...]
    ties: str
    standard: Standard | None
    threshold: float = float("inf")

    def score(self, inputs: Inputs) -> Tensor:
        """SPC, or how far it lies above what is usual in the predicted class; float32 [N] on the CPU."""
        spc, classes = consistency(self.model, inputs, self.scales, self.ties)
        return spc if self.standard is None else self.standard(spc, classes)


@defenses.register
@dataclass(frozen=True, kw_only=True)
class ScaleUp(InputDefense):
    """Consistency of predictions when amplitudes are multiplied."""

    name: ClassVar[str] = "scale_up"
    paper: ClassVar[str] = "Guo et al., SCALE-UP, ICLR 2023, arXiv 2302.03251"
    year: ClassVar[int] = 2023
    modalities: ClassVar[tuple[str, ...]] = ("image", "audio", "video")

    scales: tuple[float, ...] = param((3.0, 5.0, 7.0, 9.0, 11.0), "factors, each above 1", source="paper")
    setting: str = param(
        "free", "the SPC itself, or standardised by clean samples of the predicted class", choices=("free", "limited")
    )
    ties: str = param(
        "confidence",
        "what ranks inputs of equal SPC: confidence of the copies, or nothing",
        choices=("confidence", "none"),
    )
    decision: str = param(
        "quantile", "reject above a quantile of clean samples, or above a fixed SPC", choices=("quantile", "fixed")
    )
    frr: float = param(0.05, "quantile: share of clean inputs that may be rejected", above=0, high=1, source="ours")
    spc_threshold: float = param(
        0.7, "fixed: SPC above which inputs are rejected (free setting)", above=0, high=1, source="published code"
    )

    def __post_init__(self) -> None:
        """Check the factors too."""
        super().__post_init__()
        if not self.scales or not all(1 < s < float("inf") for s in self.scales):
            raise InputError(f"{self.name}: scales must be one or more finite factors above 1, got {self.scales}")
        if self.decision == "fixed" and (self.setting != "free" or self.ties != "none"):
            raise InputError(
                f"{self.name}: decision=fixed compares the SPC itself; it needs setting=free and ties=none"
            )

    def run(self, view: DefenderView, ctx: Context) -> ScaleUpDetector:
        """Set the threshold on clean samples, after learning from half of them what is usual in a class.

        Raises:
            InputError: without clean samples (``limited``: with fewer than four).
        """
        held_out, standard = view.clean, None
        if self.setting == "limited":
            usual, held_out = halves(view.clean, self.name, ctx)
            spc, classes = consistency(view.model, usual.inputs, self.scales, self.ties)
            standard = Standard.of(spc, classes, view.model.num_classes, len(self.scales))
        if not len(held_out):
            raise InputError("scale_up needs clean samples for its threshold, got none")
        detector = ScaleUpDetector(view.model, self.scales, self.ties, standard)
        if self.decision == "fixed":
            return dataclasses.replace(detector, threshold=self.spc_threshold)
        return dataclasses.replace(detector, threshold=clean_quantile(detector.score(held_out.inputs), self.frr))
