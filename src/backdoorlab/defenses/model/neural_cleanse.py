"""Neural Cleanse: reverse-engineer a minimal trigger for every class; a class with a far smaller one is a target.

Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks", IEEE S&P 2019. For each
class k a mask m in [0, 1] (shared by the channels) and a pattern p are optimised on clean samples,

    min_{m, p}  mean_x CE(f((1 - m) x + m p), k) + lambda ||m||_1,

where lambda doubles after ``patience`` epochs in a row with an attack accuracy of at least 98 % and is divided by
2^1.5 after as many below. The smallest ||m||_1 that an epoch with enough accuracy reached is v_k. With the anomaly
index a_k = |v_k - median(v)| / (1.4826 MAD(v)), class k is suspected if a_k > 2 and v_k < median(v).

All classes are optimised at once, K x B rows a forward pass (in chunks of ``max_rows``); Adam works element by
element, so this is the same as one class after the other. The model is frozen in evaluation mode and the samples are
not augmented.

Choices and deviations
- An epoch has at least ``min_steps`` batches, drawn again from the same samples if they are few: the schedules count
  epochs.
- Fewer than 5 classes give no meaningful MAD. The score is then the second smallest v_k over the smallest, and a
  model is suspected above 2 (the smallest is less than half of the next).
- The batches of an epoch see a candidate that still changes. One that would be kept is therefore measured once more as
  it stands, on all clean samples and in full precision, and must reach 98 % there as well.
- The median of an even number is the mean of the middle two (a lower median flips verdicts); a class for which no
  epoch reached 98 % counts with the largest possible mask.
- Sounds: one mask and pattern over time, in [-1, 1]. Videos: mask and pattern of one frame, shared by all frames.
- Texts: masks make no sense for words. ``prompt_length`` vectors are inserted before the text, in the space of word
  embeddings, and ||m||_1 gives way to their distance to the nearest rows of the embedding matrix (in standard
  deviations of its entries): a trigger word is a prompt at distance 0. The nearest words are reported as token ids.
- The paper's repair, unlearning with the recovered trigger, is a method of its own, ``nc``.

The optimisation is shared with others and lies in :mod:`backdoorlab.defenses.common.inversion`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from backdoorlab.core.method import param
from backdoorlab.defenses.base import ModelDefense, ScanReport, defenses
from backdoorlab.defenses.common.inversion import TriggerInversion, verdict
from backdoorlab.defenses.view import DefenderView
from backdoorlab.training.context import Context


@defenses.register
@dataclass(frozen=True, kw_only=True)
class NeuralCleanse(TriggerInversion, ModelDefense):
    """Compares the sizes of the smallest triggers of all classes."""

    name: ClassVar[str] = "neural_cleanse"
    paper: ClassVar[str] = "Wang et al., Neural Cleanse, IEEE S&P 2019"
    year: ClassVar[int] = 2019
    modalities: ClassVar[tuple[str, ...]] = ("image", "text", "audio", "video")

    anomaly_threshold: float = param(2.0, "anomaly index above which a class is suspected", low=0, source="paper")

    def run(self, view: DefenderView, ctx: Context) -> ScanReport:
        """Optimise a trigger for every class and compare their sizes."""
        costs, recovered = self.invert(view.model, view.clean, ctx)
        score, targets = verdict(costs, self.anomaly_threshold)
        return ScanReport(score, bool(targets), targets, tuple(costs.tolist()), recovered)
