"""ASSET: a detector whose loss is small on clean samples and is driven up on what differs from them.

Pan, Zeng, Lyu, Lin, Jia, "ASSET: Robust Backdoor Data Detection Across a Multiplicity of Deep Learning Paradigms",
USENIX Security 2023 (arXiv 2302.11408).

A fresh network phi of the model's architecture takes steps on pairs of batches, B_p of the suspicious set and B_c of
the clean samples:

1. Minimise the mean variance of phi's logits on B_c: clean samples get a uniform guess, of cross-entropy ln K.
2. Concentrate on what may be poison. A small network (128-128-1) learns for some steps to say 1 to the penultimate
   features, in the suspicious model, of B_p and 0 to those of B_c. Samples of B_p whose output s lies above the median
   with an adjusted outlyingness of more than ``outlyingness`` are taken. With quartiles q1, q3, the medcouple M >= 0,

       (s - median) / (q3 + 1.5 exp(3 M) (q3 - q1) - median)      (exp(4 M) for M < 0)

3. Maximise the cross-entropy of phi on these.

The score of a sample is its cross-entropy under phi. A normal distribution is fitted to the lower half of the scores;
what lies above the point where its density falls to 1e-6 is flagged.

Choices and deviations
- The inner network learns by cross-entropy as in the paper (published code: squared error) on standardised features.
  Its outputs are taken before the sigmoid, which presses all that is certain against 1 where nothing can be an outlier;
  the fence is that of the adjusted box plot, 1, and not 2. In return benign batches too have a few outliers.
- In step 3 the whole of B_p goes through phi, so that batch norms see no batch of poison alone.
- On small sets passes are added until there are ``iterations`` steps (the paper: one pass of a set of 50,000).
- The cross-entropy that is driven up is capped at ``cap`` ln K. The normal distribution has the median as its mean and
  the root mean square distance of the lower half from it as its standard deviation.
- Samples are not augmented. Results are in the order of the set.

Limits: what differs from the clean samples for another reason than poison is driven up too; a batch in which the poison
is no minority has no outliers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.core.method import param
from backdoorlab.core.seeding import isolated_rng, spawn
from backdoorlab.defenses.base import DatasetDefense, defenses
from backdoorlab.defenses.common.classes import need_classes, need_samples
from backdoorlab.defenses.view import DefenderView
from backdoorlab.models.anatomy import head
from backdoorlab.models.classifier import Classifier, build_model
from backdoorlab.training.batches import Batch, Drawn, Paired, Shuffled
from backdoorlab.training.context import Context
from backdoorlab.training.evaluate import predict, predict_features
from backdoorlab.training.steps import run_steps

DENSITY = 1e-6


def medcouple(values: Tensor) -> float:
    """Robust skewness of float64 [N], in [-1, 1].

    The median, over all pairs x_i >= m >= x_j with the median m, of ((x_i - m) - (m - x_j)) / (x_i - x_j); pairs that
    both equal m count 0.
    """
    centred = values - values.quantile(0.5)
    above, below = centred[centred >= 0], centred[centred <= 0]
    gap = above[:, None] - below[None]
    kernel = torch.where(gap > 0, (above[:, None] + below[None]) / gap.clamp_min(1e-300), 0.0)
    return float(kernel.flatten().quantile(0.5)) if kernel.numel() <= 2**24 else float(kernel.flatten().median())


def outlyingness(values: Tensor) -> Tensor:
    """Adjusted outlyingness of what lies above the median, 0 below it: float64 [N] -> [N]."""
    middle, low, high = (float(values.quantile(q)) for q in (0.5, 0.25, 0.75))
    skew = medcouple(values)
    whisker = high + 1.5 * math.exp((3 if skew >= 0 else 4) * skew) * (high - low)
    return (values - middle).clamp_min(0) / max(whisker - middle, 1e-12)


def logit_variance(logits: Tensor) -> Tensor:
    """Mean variance of the logits of a sample: float [B, K] -> scalar."""
    return logits.var(1, correction=0).mean()


def normal_cut(scores: Tensor) -> float:
    """Where the density of the normal distribution of the lower half of float [N] scores falls to 1e-6."""
    scores = scores.double()
    middle = scores.quantile(0.5)
    spread = float((scores[scores <= middle] - middle).square().mean().sqrt().clamp_min(1e-9))
    peak = -math.log(DENSITY * spread * math.sqrt(2 * math.pi))
    return float(middle) + spread * math.sqrt(2 * max(0.0, peak))


class Inner(nn.Module):
    """The network of step 2, trained anew for each batch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Logits [B] of features [B, D]."""
        found: Tensor = self.layers(features)[:, 0]
        return found

    @classmethod
    def separating(cls, suspicious: Tensor, clean: Tensor, steps: int, lr: float) -> Inner:
        """Trained to tell two sets of features apart."""
        net = cls(suspicious.shape[1]).to(suspicious.device)
        optimizer = torch.optim.Adam(net.parameters(), lr)
        both = torch.cat([suspicious, clean])
        wanted = torch.cat([torch.ones(len(suspicious)), torch.zeros(len(clean))]).to(both.device)
        for _ in range(steps):
            loss = F.binary_cross_entropy_with_logits(net(both), wanted)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        return net


class Separation:
    """One step on a pair of batches (suspicious, clean)."""

    def __init__(self, detector: Classifier, features: Tensor, clean_features: Tensor, method: Asset) -> None:
        """Standardised features of both sets lie on the device of the detector."""
        self.detector, self.features, self.clean_features, self.method = (
            detector.train(),
            features,
            clean_features,
            method,
        )
        down, up = (torch.optim.Adam(detector.parameters(), method.lr) for _ in range(2))
        self.modules: Sequence[nn.Module] = [detector]
        self.optimizers: Sequence[torch.optim.Optimizer] = [down, up]

    def __call__(self, batch: tuple[Batch, Batch]) -> Tensor:
        """Steps 1 to 3; returns the variance."""
        suspicious, clean = batch
        down, up = self.optimizers
        variance = logit_variance(self.detector(clean.inputs))
        down.zero_grad(set_to_none=True)
        variance.backward()
        down.step()
        chosen = self.unlike(suspicious.indices, clean.indices)
        if bool(chosen.any()):
            # The whole batch goes through, so that batch norms see no batch of poison alone.
            logits = self.detector(suspicious.inputs)[chosen]
            losses = F.cross_entropy(logits, suspicious.labels[chosen], reduction="none")
            loss = -losses.clamp(max=self.method.cap * math.log(logits.shape[1])).mean()
            up.zero_grad(set_to_none=True)
            loss.backward()
            up.step()
        return variance.detach()

    def unlike(self, rows: Tensor, clean_rows: Tensor) -> Tensor:
        """Which suspicious samples of a batch stand out from its clean ones: bool [B]."""
        features = self.features[rows]
        net = Inner.separating(features, self.clean_features[clean_rows], self.method.inner_steps, self.method.inner_lr)
        with torch.no_grad():
            outputs = net(features).double()
        return outlyingness(outputs.cpu()).to(rows.device) > self.method.outlyingness


@defenses.register
@dataclass(frozen=True, kw_only=True)
class Asset(DatasetDefense):
    """Loss of a detector that is offset on what differs from clean samples."""

    name: ClassVar[str] = "asset"
    paper: ClassVar[str] = "Pan et al., ASSET, USENIX Security 2023, arXiv 2302.11408"
    year: ClassVar[int] = 2023
    modalities: ClassVar[tuple[str, ...]] = ("image", "text", "audio", "video")
    reads: ClassVar[tuple[str, ...]] = ("model", "suspicious", "clean")
    needs_clean_fraction: ClassVar[float] = 0.02

    iterations: int = param(200, "pairs of batches at least, in whole passes over the set", low=1, source="ours")
    batch_size: int = param(256, "samples of either set per step", low=2, source="BackdoorBench")
    lr: float = param(1e-4, "learning rate of Adam, both ways", above=0, source="BackdoorBench")
    inner_steps: int = param(30, "steps of the inner network per batch", low=1, source="ours (BackdoorBench: 100)")
    inner_lr: float = param(1e-2, "learning rate of Adam for the inner network", above=0, source="ours")
    outlyingness: float = param(
        1.0, "adjusted outlyingness above which a sample is taken", above=0, source="ours (paper: 2)"
    )
    cap: float = param(10.0, "losses above cap * ln K are not driven up further", above=0, source="ours")

    def score(self, view: DefenderView, ctx: Context) -> Tensor:
        """Cross-entropy under the detector."""
        model, data, clean = view.model, view.suspicious, view.clean
        need_samples(self.name, "suspicious", data, 2)
        need_samples(self.name, "clean", clean, 2)
        need_classes(self.name, model, data)
        head(model)
        features, clean_features = (predict_features(model, part.inputs) for part in (data, clean))
        centre, spread = features.mean(0), features.std(0, correction=0).clamp_min(1e-6)
        placed = [((part - centre) / spread).to(ctx.device) for part in (features, clean_features)]
        detector = build_model(model.arch, model.modality, model.num_classes, ctx.child("asset").seed).to(ctx.device)
        generator = ctx.generator("asset", device=ctx.device)
        size = min(self.batch_size, len(data))
        suspicious = Shuffled(data, model.modality, size, generator, augment=False)
        known = Drawn(clean, model.modality, self.batch_size, generator, len(suspicious))
        with isolated_rng(spawn(generator)):
            run_steps(
                Separation(detector, placed[0], placed[1], self),
                Paired(suspicious, known),
                math.ceil(self.iterations / len(suspicious)),
                context=ctx,
                label="asset: separating",
            )
        detector.eval()
        return F.cross_entropy(predict(detector, data.inputs), data.labels.cpu(), reduction="none")

    def flags(self, scores: Tensor, view: DefenderView) -> Tensor:
        """Beyond the normal distribution of the lower half."""
        return scores > normal_cut(scores)
