"""STRIP: a triggered input keeps its label under any overlay.

Gao, Xu, Wang, Chen, Ranasinghe, Nepal, "STRIP: A Defence Against Trojan Attacks on Deep Neural Networks", ACSAC 2019
(arXiv 1902.06531).

An input x is superimposed with N clean samples c_1..c_N and the entropy of the predictions, in bits, is averaged:

    H(x) = 1/N sum_j - sum_k p_k log2 p_k,     p = softmax f(x + weight c_j)

Blends of clean inputs confuse the model; a strong trigger survives them, so that H stays low. Inputs whose entropy lies
below the ``frr`` quantile of the entropies of clean samples are rejected. The score is -H: higher = more suspicious.

Choices: the clean samples are divided in halves, one giving the overlays and the other the threshold; sharing them lets
every calibration sample meet itself and lowers the threshold. All inputs meet the same N overlays, so that a score does
not depend on what else is in the batch. The blends of many inputs form one batch [M * N], laid out sample by sample.

Superimposing is a saturating sum of raw samples, as in the authors' code, which leaves a bright trigger as bright as it
was. ``superimpose="blend"`` takes the modality's blend instead (images: a mean), which halves the trigger. Words cannot
be added, so that text is always blended (words of the overlay replace words of the input).

Limits: weak against blended, sample-specific and clean-label triggers, which do not survive an overlay. The cost is N
forward passes an input; lower ``overlays`` on a CPU.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backdoorlab.core.errors import InputError
from backdoorlab.core.method import param
from backdoorlab.data.split import Inputs, take
from backdoorlab.defenses.base import InputDefense, InputDetector, defenses
from backdoorlab.defenses.view import DefenderView
from backdoorlab.modalities.base import Modality
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.context import Context
from backdoorlab.training.evaluate import predict

FORWARD_BATCH = 2048
"""Blends per forward pass."""


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy in bits of softmax predictions; float [..., K] -> float [...]."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1) / torch.log(torch.tensor(2.0))


def saturating_sum(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Sum a + weight b of raw samples of the same shape, within the range of their dtype (floats: [-1, 1])."""
    total = a.float() + weight * b.float()
    if a.is_floating_point():
        return total.clamp(-1, 1).to(a.dtype)
    bounds = torch.iinfo(a.dtype)
    return total.clamp(bounds.min, bounds.max).round().to(a.dtype)


@dataclass(frozen=True)
class Overlay:
    """How an overlay is laid over a sample.

    Attributes:
        superimpose: "add" or "blend".
        weight: of the overlay in a sum.
        ratio: of the overlay in a blend.
    """

    superimpose: str
    weight: float
    ratio: float

    def __call__(self, modality: Modality, a: Inputs, b: Inputs, generator: torch.Generator) -> Inputs:
        """Raw samples ``a`` under overlays ``b``, row by row; text is always blended."""
        if self.superimpose == "add" and isinstance(a, Tensor) and isinstance(b, Tensor):
            return saturating_sum(a, b, self.weight)
        return modality.blend(a, b, self.ratio, generator)


def overlay_entropy(
    model: Classifier, inputs: Inputs, overlays: Inputs, overlay: Overlay, generator: torch.Generator
) -> Tensor:
    """Mean entropy of the predictions for each input under every overlay.

    Args:
        model: the suspicious model.
        inputs: raw samples, M rows.
        overlays: raw clean samples, N rows.
        overlay: how they are laid over the inputs.
        generator: for modalities whose blending is random (text).

    Returns:
        float32 [M] on the CPU.
    """
    overlays = overlays.to(model.device) if isinstance(overlays, Tensor) else overlays
    count, parts = len(overlays), []
    group = max(1, FORWARD_BATCH // count)
    for start in range(0, len(inputs), group):
        batch = inputs[start : start + group]
        batch = batch.to(model.device) if isinstance(batch, Tensor) else batch
        each = torch.arange(len(batch)).repeat_interleave(count)
        every = torch.arange(count).repeat(len(batch))
        blends = overlay(model.modality, take(batch, each), take(overlays, every), generator)
        parts.append(entropy(predict(model, blends, batch_size=FORWARD_BATCH)).reshape(-1, count).mean(1))
    return torch.cat(parts) if parts else torch.zeros(0)


@dataclass(frozen=True, eq=False)
class StripDetector(InputDetector):
    """Scores inputs by -H under fixed overlays."""

    model: Classifier
    overlays: Inputs
    overlay: Overlay
    ctx: Context
    threshold: float = float("inf")

    def score(self, inputs: Inputs) -> Tensor:
        """-H of raw inputs, float32 [N] on the CPU."""
        return -overlay_entropy(self.model, inputs, self.overlays, self.overlay, self.ctx.generator("blend"))


@defenses.register
@dataclass(frozen=True, kw_only=True)
class Strip(InputDefense):
    """Entropy of predictions under superimposed clean samples."""

    name: ClassVar[str] = "strip"
    paper: ClassVar[str] = "Gao et al., STRIP, ACSAC 2019, arXiv 1902.06531"
    year: ClassVar[int] = 2019
    modalities: ClassVar[tuple[str, ...]] = ("image", "text", "audio", "video")

    overlays: int = param(
        100, "overlays per input (fewer if half of the clean samples are fewer)", low=1, source="paper"
    )
    superimpose: str = param(
        "add",
        "saturating sum, or the modality's blend (text: always)",
        choices=("add", "blend"),
        source="authors' code",
    )
    weight: float = param(1.0, "weight of the overlay in the sum", above=0, high=10, source="authors' code")
    ratio: float = param(0.5, "share of the overlay in the blend", above=0, high=1, source="ours")
    frr: float = param(0.05, "share of clean inputs that may be rejected", above=0, high=1, source="BackdoorBench")

    def run(self, view: DefenderView, ctx: Context) -> StripDetector:
        """Draw overlays from one half of the clean samples, set the threshold on the other.

        Raises:
            InputError: if there are fewer than four clean samples.
        """
        clean = view.clean
        if len(clean) < 4:
            raise InputError(f"strip needs at least 4 clean samples (overlays and calibration), got {len(clean)}")
        order = torch.randperm(len(clean), generator=ctx.generator("overlays"))
        drawn, held_out = order[: len(clean) // 2][: self.overlays], order[len(clean) // 2 :]
        overlay = Overlay(self.superimpose, self.weight, self.ratio)
        detector = StripDetector(view.model, take(clean.inputs, drawn), overlay, ctx)
        scores = detector.score(take(clean.inputs, held_out))
        threshold = float(torch.quantile(scores.double(), 1 - self.frr, interpolation="higher"))
        return dataclasses.replace(detector, threshold=threshold)
