"""STRIP: a triggered input keeps its label under any overlay.

Gao, Xu, Wang, Chen, Ranasinghe, Nepal, "STRIP: A Defence Against Trojan Attacks on Deep Neural Networks", ACSAC 2019
(arXiv 1902.06531).

An input x is superimposed with N clean samples c_1..c_N and the entropy of the predictions, in bits, is averaged:

    H(x) = 1/N sum_j - sum_k p_k log2 p_k,     p = softmax f(blend(x, c_j))

Blends of clean inputs confuse the model; a strong trigger survives them, so that H stays low. Inputs whose entropy lies
below the ``frr`` quantile of the entropies of clean samples are rejected. The score is -H: higher = more suspicious.

Choices: the clean samples are divided in halves, one giving the overlays and the other the threshold; sharing them lets
every calibration sample meet itself and lowers the threshold. All inputs meet the same N overlays, so that a score does
not depend on what else is in the batch. Blending is the modality's own (images and video: pixel mean, audio: clips at
equal loudness, text: words of the overlay replace words of the input). The blends of many inputs form one batch
[M * N], laid out sample by sample.

Limits: weak against blended, sample-specific and clean-label triggers, which do not survive an overlay. The cost is N
forward passes an input; lower ``overlays`` on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backdoorlab.core.errors import InputError
from backdoorlab.core.method import param
from backdoorlab.data.split import Inputs, Split, take
from backdoorlab.defenses.base import InputDefense, InputDetector, defenses
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.context import Context
from backdoorlab.training.evaluate import predict

FORWARD_BATCH = 2048
"""Blends per forward pass."""


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy in bits of softmax predictions; float [..., K] -> float [...]."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1) / torch.log(torch.tensor(2.0))


def blend_entropy(
    model: Classifier, inputs: Inputs, overlays: Inputs, ratio: float, generator: torch.Generator
) -> Tensor:
    """Mean entropy of the predictions for each input under every overlay.

    Args:
        model: the suspicious model.
        inputs: raw samples, M rows.
        overlays: raw clean samples, N rows.
        ratio: weight of the overlay.
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
        blends = model.modality.blend(take(batch, each), take(overlays, every), ratio, generator)
        parts.append(entropy(predict(model, blends, batch_size=FORWARD_BATCH)).reshape(-1, count).mean(1))
    return torch.cat(parts) if parts else torch.zeros(0)


@dataclass(frozen=True, eq=False)
class StripDetector(InputDetector):
    """Scores inputs by -H under fixed overlays."""

    model: Classifier
    overlays: Inputs
    ratio: float
    ctx: Context
    threshold: float = float("inf")

    def score(self, inputs: Inputs) -> Tensor:
        """-H of raw inputs, float32 [N] on the CPU."""
        return -blend_entropy(self.model, inputs, self.overlays, self.ratio, self.ctx.generator("blend"))


@defenses.register
@dataclass(frozen=True, kw_only=True)
class Strip(InputDefense):
    """Entropy of predictions under superimposed clean samples."""

    name: ClassVar[str] = "strip"
    paper: ClassVar[str] = "Gao et al., STRIP, ACSAC 2019, arXiv 1902.06531"
    year: ClassVar[int] = 2019
    modalities: ClassVar[tuple[str, ...]] = ("image", "text", "audio", "video")

    overlays: int = param(100, "overlays per input (fewer if half of the clean samples are fewer)", low=1,
                          source="paper")  # fmt: skip
    ratio: float = param(0.5, "weight of the overlay in the blend", above=0, high=1, source="paper")
    frr: float = param(0.05, "share of clean inputs that may be rejected", above=0, high=1, source="BackdoorBench")

    def fit(self, model: Classifier, clean: Split, ctx: Context) -> StripDetector:
        """Draw overlays from one half of the clean samples, set the threshold on the other.

        Raises:
            InputError: if there are fewer than four clean samples.
        """
        if len(clean) < 4:
            raise InputError(f"strip needs at least 4 clean samples (overlays and calibration), got {len(clean)}")
        order = torch.randperm(len(clean), generator=ctx.generator("overlays"))
        drawn, held_out = order[: len(clean) // 2][: self.overlays], order[len(clean) // 2 :]
        detector = StripDetector(model, take(clean.inputs, drawn), self.ratio, ctx)
        scores = detector.score(take(clean.inputs, held_out))
        threshold = float(torch.quantile(scores.double(), 1 - self.frr, interpolation="higher"))
        return StripDetector(model, detector.overlays, self.ratio, ctx, threshold)
