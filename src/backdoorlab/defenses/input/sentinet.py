"""SentiNet: the region that decides an image's class is cut out and pasted onto clean images.

Chou, Tramer, Pellegrino, "SentiNet: Detecting Localized Universal Attacks Against Deep Learning Systems", IEEE Security
and Privacy Workshops 2020 (arXiv 1812.00292).

1. Grad-CAM of the predicted class y at a late map of convolutional features; the region R is where the heat is at
   least ``heat`` of its maximum. Salient regions of other likely classes are taken away from it, which leaves what
   speaks for y alone (``proposals`` further candidates; an empty remainder is replaced by R).
2. R is pasted onto N clean images: ``fooled`` is the share that is then classified as y.
3. The same region of the same images is filled with noise: ``confidence`` is the mean of the highest probabilities. A
   large region hides much and lowers it.
4. Clean inputs give points (confidence, fooled). Their upper envelope, the largest ``fooled`` in each interval of 0.02
   of the confidence, is fitted by a parabola. The score is how far an input lies above it: a small region that fools
   nearly everything is a trigger.

Inputs are rejected whose score exceeds the ``frr`` quantile of clean samples. One half of the clean samples is pasted
upon, the other gives envelope and threshold. With several candidate regions the most suspicious one counts.

Choices and deviations
- The other likely classes are the next best of the network on the whole image; the paper classifies the segments of a
  selective search.
- The map is the last one with ``resolution`` entries in height and width; 1 takes the very last, as the paper does.
- The parabola is not continued beyond the confidences of the clean points; there its end value holds.
- Clean images that are classified as y anyway fool nobody and are not counted.
- The distance from the parabola is the vertical one, instead of the nearest point found by a constrained optimiser.
- ``rule="confidence"`` scores by the confidence alone, as BackdoorBench does (its fixed limit is 0.9);
  ``rule="fooled"`` by the share that is fooled.
- All inputs, regions and clean images of a group form one batch [M * regions * N * 2].
- For videos region and noise extend over time.

Limits: localised triggers only; blends, warps and sample-specific changes have no region that could be pasted. The
resolution of the region is that of the feature map. For vision transformers the map is that of the patch embedding,
where Grad-CAM says little.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.core.errors import NotApplicable
from backdoorlab.core.method import param
from backdoorlab.data.split import Inputs
from backdoorlab.defenses.base import InputDefense, InputDetector, defenses
from backdoorlab.defenses.common.calibration import clean_quantile, halves
from backdoorlab.defenses.view import DefenderView
from backdoorlab.models.anatomy import frozen, spatial_layers, trace
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.context import Context, autocast

FORWARD_BATCH = 2048
"""Pasted images per forward pass."""


def grad_cam(model: Classifier, layer: nn.Module, x: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Heat maps of the most likely classes.

    Args:
        model: frozen (see :func:`~backdoorlab.models.anatomy.frozen`).
        layer: returns feature maps [B, C, *extent]; everything behind it must follow from them.
        x: prepared input [B, C, *space].
        most: classes P, the predicted one first.

    Returns:
        Heat float32 [B, P, *space] with maximum 1 (or 0 everywhere), and the classes int64 [B, P].
    """
    kept: list[Tensor] = []

    def cut(module: nn.Module, args: tuple[object, ...], output: Tensor) -> Tensor:
        kept[:] = [output.detach().float().requires_grad_()]
        return kept[0]

    with torch.inference_mode(False), torch.enable_grad():
        handle = layer.register_forward_hook(cut)
        try:
            logits = model(x.clone() if x.is_inference() else x).float()
        finally:
            handle.remove()
        maps, classes = kept[0], logits.detach().topk(most, 1).indices
        heats = []
        for rank in range(most):
            score = logits.gather(1, classes[:, rank : rank + 1]).sum()
            (gradient,) = torch.autograd.grad(score, maps, retain_graph=rank + 1 < most)
            weights = gradient.flatten(2).mean(2).reshape(*gradient.shape[:2], *(1,) * (gradient.dim() - 2))
            heats.append((weights * maps.detach()).sum(1).relu())
    heat = torch.stack(heats, 1)
    mode = "trilinear" if x.dim() == 5 else "bilinear"
    heat = F.interpolate(heat, size=x.shape[2:], mode=mode, align_corners=False)
    peak = heat.flatten(2).amax(2).reshape(*heat.shape[:2], *(1,) * (x.dim() - 2))
    return heat / peak.clamp_min(1e-12), classes


def candidate_regions(heat: Tensor, least: float) -> Tensor:
    """The region of the first class, and what of it lies outside of the region of each other class.

    Args:
        heat: float [B, P, *space] with maximum 1.
        least: heat that belongs to a region.

    Returns:
        bool [B, P, *space].
    """
    region = heat >= least
    own, others = region[:, :1], region[:, 1:]
    rest = own & ~others
    empty = ~rest.flatten(2).any(2).reshape(*rest.shape[:2], *(1,) * (heat.dim() - 2))
    return torch.cat([own, torch.where(empty, own, rest)], 1)


@dataclass(frozen=True, eq=False)
class Paste:
    """What regions are pasted onto.

    Attributes:
        model: the suspicious model.
        canvas: prepared clean samples [N, C, *space].
        canvas_classes: int64 [N], their predicted classes.
        noise: [C, *space], uniform in the range of the data.
    """

    model: Classifier
    canvas: Tensor
    canvas_classes: Tensor
    noise: Tensor

    def __call__(self, x: Tensor, classes: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
        """Share of clean samples fooled, and mean confidence under noise.

        Args:
            x: prepared inputs [B, C, *space].
            classes: int64 [B], predicted.
            regions: bool [B, P, *space].

        Returns:
            Two float32 [B, P].
        """
        mask = regions[:, :, None, None]  # [B, P, N, C, *space]
        pasted = torch.where(mask, x[:, None, None], self.canvas)
        muted = torch.where(mask, self.noise, self.canvas)
        shape = pasted.shape[:3]
        with autocast(x.device):
            logits = self.model(torch.cat([pasted.flatten(0, 2), muted.flatten(0, 2)])).float()
        taken, filled = (part.unflatten(0, shape) for part in logits.split(len(logits) // 2))
        others = (self.canvas_classes != classes[:, None]).float()[:, None]  # [B, 1, N]
        hit = (taken.argmax(3) == classes[:, None, None]).float()
        fooled = (hit * others).sum(2) / others.sum(2).clamp_min(1)
        return fooled, filled.softmax(3).amax(3).mean(2)


def map_name(layers: list[tuple[str, tuple[int, ...]]], least: int) -> str:
    """The last map with at least ``least`` entries in height and width; without one the last of the finest.

    Args:
        layers: name and extent (height, width) of each map, in execution order.
        least: entries.
    """
    fine = min(least, max(min(extent) for _, extent in layers))
    return [name for name, extent in layers if min(extent) >= fine][-1]


def envelope(confidence: Tensor, fooled: Tensor, width: float = 0.02) -> tuple[float, ...]:
    """Coefficients of a parabola (highest power first) through the largest ``fooled`` per interval of confidence.

    Fewer than three occupied intervals give a line or a constant.

    Args:
        confidence: float [M] in [0, 1].
        fooled: float [M] in [0, 1].
        width: of an interval.
    """
    x, y = confidence.double().numpy(), fooled.double().numpy()
    interval = np.floor(x / width).astype(np.int64)
    tops = [(float(x[rows][y[rows].argmax()]), float(y[rows].max())) for rows in _groups(interval)]
    points = np.array(tops)
    degree = min(2, len(points) - 1)
    return tuple(float(c) for c in np.polyfit(points[:, 0], points[:, 1], degree))


def _groups(keys: np.ndarray) -> list[np.ndarray]:
    """Rows of equal key."""
    order = np.argsort(keys, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(keys[order])) + 1)


@dataclass(frozen=True, eq=False)
class SentiNetDetector(InputDetector):
    """Scores inputs by what their decisive region does to clean samples."""

    paste: Paste
    layer: str
    heat: float
    candidates: int
    rule: str
    curve: tuple[float, ...] = ()
    seen: tuple[float, float] = (0.0, 1.0)
    threshold: float = math.inf

    def points(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """(confidence, fooled) of the candidate regions of raw inputs: float32 [N, P] each, on the CPU."""
        model = self.paste.model
        layer = model.get_submodule(self.layer)
        group = max(1, FORWARD_BATCH // (2 * self.candidates * len(self.paste.canvas)))
        empty = torch.zeros(0, self.candidates)
        confidences, shares = [empty], [empty]
        with frozen(model):
            for start in range(0, len(inputs), group):
                x = model.modality.prepare(model.modality.encode(inputs[start : start + group]).to(model.device))
                heat, classes = grad_cam(model, layer, x, self.candidates)
                with torch.no_grad():
                    fooled, confidence = self.paste(x, classes[:, 0], candidate_regions(heat, self.heat))
                confidences.append(confidence.cpu())
                shares.append(fooled.cpu())
        return torch.cat(confidences), torch.cat(shares)

    def score(self, inputs: Inputs) -> Tensor:
        """Height above the envelope (or what ``rule`` says) of the most suspicious region: float32 [N] on the CPU."""
        confidence, fooled = self.points(inputs)
        if self.rule == "confidence":
            return confidence.amax(1)
        if self.rule == "fooled":
            return fooled.amax(1)
        bound, inside = torch.zeros_like(confidence), confidence.clamp(*self.seen)
        for coefficient in self.curve:
            bound = bound * inside + coefficient
        return (fooled - bound).amax(1)


@defenses.register
@dataclass(frozen=True, kw_only=True)
class SentiNet(InputDefense):
    """Pastes the decisive region of an input onto clean samples."""

    name: ClassVar[str] = "sentinet"
    paper: ClassVar[str] = "Chou et al., SentiNet, IEEE SPW 2020, arXiv 1812.00292"
    year: ClassVar[int] = 2020
    modalities: ClassVar[tuple[str, ...]] = ("image", "video")
    needs_conv: ClassVar[bool] = True

    overlays: int = param(
        100, "clean samples that are pasted upon (fewer if half of them are fewer)", low=1, source="BackdoorBench"
    )
    heat: float = param(
        0.85, "share of the largest heat that belongs to the region", above=0, high=1, source="BackdoorBench"
    )
    resolution: int = param(
        8,
        "entries that the feature map of Grad-CAM must have in height and width, where there is one",
        low=1,
        source="ours",
    )
    proposals: int = param(2, "other likely classes whose regions are taken away", low=0, source="paper")
    rule: str = param(
        "boundary",
        "what scores: height above the envelope, or one number",
        choices=("boundary", "fooled", "confidence"),
    )
    frr: float = param(0.05, "share of clean inputs that may be rejected", above=0, high=1, source="ours")

    def run(self, view: DefenderView, ctx: Context) -> SentiNetDetector:
        """Paste onto one half of the clean samples, fit envelope and threshold on the other.

        Raises:
            InputError: if there are fewer than four clean samples.
            NotApplicable: for models without convolutional feature maps of the extent of the input.
        """
        model = view.model
        if model.modality.name not in self.modalities:
            raise NotApplicable(f"sentinet pastes regions of pictures and videos, not of {model.modality.name}")
        canvas, held_out = halves(view.clean, self.name, ctx)
        x = model.modality.prepare(model.modality.encode(canvas.inputs[: self.overlays]).to(model.device))
        shapes = {c.name: tuple(c.output.shape[-2:]) for c in trace(model, x[:2]) if c.output is not None}
        layers = [(name, shapes[name]) for name, _ in spatial_layers(model, x[:2])]
        if not layers:
            raise NotApplicable(f"sentinet: {model.arch} has no convolutional feature maps for Grad-CAM")
        noise = torch.rand(x.shape[1:], generator=ctx.generator(self.name, "noise")).to(x.device)
        with frozen(model), torch.no_grad():
            paste = Paste(model, x, model(x).argmax(1), noise)
        count = min(1 + self.proposals, model.num_classes)
        detector = SentiNetDetector(paste, map_name(layers, self.resolution), self.heat, count, self.rule)
        if self.rule == "boundary":
            confidence, fooled = detector.points(held_out.inputs)
            detector = dataclasses.replace(
                detector,
                curve=envelope(confidence.flatten(), fooled.flatten()),
                seen=(float(confidence.min()), float(confidence.max())),
            )
        return dataclasses.replace(detector, threshold=clean_quantile(detector.score(held_out.inputs), self.frr))
