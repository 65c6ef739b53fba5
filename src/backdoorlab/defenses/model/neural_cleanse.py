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
- The paper's repair (unlearning with the recovered trigger) is not part of this scan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorlab.core.errors import InputError, NotApplicable
from backdoorlab.core.method import param
from backdoorlab.defenses.base import ModelDefense, ScanReport, defenses
from backdoorlab.defenses.view import DefenderView
from backdoorlab.models.anatomy import frozen
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.context import Context, autocast

FEW_CLASSES = 5
RATIO = 2.0


class Candidates(Protocol):
    """One candidate trigger for every class."""

    parameters: list[Tensor]
    largest: float
    """Cost of a class that is never reached."""

    def logits(self, inputs: Tensor, classes: Tensor) -> Tensor:
        """Logits [A, B, K] of prepared inputs [B, ...] under the candidates of A classes."""
        ...

    def cost(self, classes: Tensor) -> Tensor:
        """What is to be small: [A], differentiable."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The candidates of all classes, K rows each."""
        ...


class MaskedPatterns:
    """Masks and patterns for continuous inputs (images, sounds, videos)."""

    def __init__(self, model: Classifier, sample: Tensor, generator: torch.Generator) -> None:
        shape, kind = tuple(sample.shape), model.modality.name
        patterns = {"video": (shape[0], 1, *shape[2:])}.get(kind, shape)
        masks = {"image": (1, *shape[1:]), "video": (1, 1, *shape[2:])}.get(kind, shape)
        self.model, self.signed = model, kind == "audio"
        # Uniform in the unit interval, then through the inverse of the squashing function.
        self.parameters = [
            torch.atanh((torch.rand(model.num_classes, *s, generator=generator).mul(2).sub(1)) * 0.999)
            .to(model.device)
            .requires_grad_()
            for s in (masks, patterns)
        ]
        self.largest = float(math.prod(masks))

    def _mask(self, classes: Tensor) -> Tensor:
        return self.parameters[0][classes].tanh() / 2 + 0.5

    def _pattern(self, classes: Tensor) -> Tensor:
        squashed = self.parameters[1][classes].tanh()
        return squashed if self.signed else squashed / 2 + 0.5

    def logits(self, inputs: Tensor, classes: Tensor) -> Tensor:
        """See :class:`Candidates`."""
        stamped = torch.lerp(inputs.unsqueeze(0), self._pattern(classes).unsqueeze(1), self._mask(classes).unsqueeze(1))
        return self.model(stamped.flatten(0, 1)).unflatten(0, (len(classes), len(inputs)))

    def cost(self, classes: Tensor) -> Tensor:
        """||m||_1 of each class."""
        return self._mask(classes).flatten(1).sum(1)

    def tensors(self) -> dict[str, Tensor]:
        """``mask`` and ``pattern``."""
        every = torch.arange(self.model.num_classes, device=self.model.device)
        return {"mask": self._mask(every).detach().clone(), "pattern": self._pattern(every).detach().clone()}


class SoftPrompts:
    """Vectors in the space of word embeddings, inserted before the text."""

    def __init__(self, model: Classifier, length: int, generator: torch.Generator) -> None:
        net, modality = model.net, model.modality
        if not (hasattr(net, "embed") and hasattr(net, "forward_embedded")):
            raise NotApplicable(f"neural_cleanse: {model.arch} gives no access to its word embeddings")
        self.model, self.length = model, length
        # A tokenizer of a pre-trained model starts each text with a special token that must stay first.
        self.place, self.pad = int(bool(getattr(modality, "tokenizer", ""))), int(getattr(modality, "pad_id", 0))
        words = torch.arange(int(modality.num_tokens), device=model.device)  # type: ignore[attr-defined]
        self.words = words[words != self.pad]
        self.embed: Callable[[Tensor], Tensor] = net.embed  # type: ignore[assignment]
        self.forward_embedded: Callable[[Tensor, Tensor], Tensor] = net.forward_embedded  # type: ignore[assignment]
        with torch.no_grad():
            self.rows = self.embed(self.words[None])[0].float()
        self.unit = self.rows.std()
        start = torch.randn(model.num_classes, length, self.rows.shape[1], generator=generator).to(model.device)
        self.parameters = [start.requires_grad_()]
        self.largest = length * math.sqrt(self.rows.shape[1]) * 4

    def logits(self, inputs: Tensor, classes: Tensor) -> Tensor:
        """See :class:`Candidates`; what no longer fits is cut off at the end, as for any inserted word."""
        count, kept = len(classes), inputs.shape[1] - self.length
        filler = inputs.new_full((len(inputs), self.length), int(self.words[0]))
        ids = torch.cat([inputs[:, : self.place], filler, inputs[:, self.place : kept]], 1)
        embedded = self.embed(ids).expand(count, *ids.shape, -1)
        prompts = (self.parameters[0][classes] * self.unit).unsqueeze(1).expand(-1, len(inputs), -1, -1)
        before, after = embedded[:, :, : self.place], embedded[:, :, self.place + self.length :]
        joined = torch.cat([before, prompts.to(embedded.dtype), after], 2).flatten(0, 1)
        return self.forward_embedded(joined, ids.repeat(count, 1)).unflatten(0, (count, len(inputs)))

    def cost(self, classes: Tensor) -> Tensor:
        """Distances to the nearest words, summed over the prompt."""
        return self._distances(classes).amin(2).sum(1)

    def _distances(self, classes: Tensor) -> Tensor:
        prompts = self.parameters[0][classes]
        return torch.cdist(prompts.flatten(0, 1), self.rows / self.unit).unflatten(0, prompts.shape[:2])

    def tensors(self) -> dict[str, Tensor]:
        """``prompt`` (embeddings) and ``nearest`` (token ids of the nearest words)."""
        every = torch.arange(self.model.num_classes, device=self.model.device)
        with torch.no_grad():
            nearest = self.words[self._distances(every).argmin(2)]
        return {"prompt": (self.parameters[0] * self.unit).detach().clone(), "nearest": nearest}


class Schedule:
    """Lambda, best cost and early stopping of every class, updated once an epoch.

    A class stops when lambda has moved both up and down and the best cost has not fallen by 1 % for ``stop_patience``
    epochs.
    """

    def __init__(
        self, count: int, start: float, threshold: float, patience: int, multiplier: float, stop_patience: int
    ) -> None:
        self.weight = torch.full((count,), start, dtype=torch.float64)
        self.best = torch.full((count,), math.inf, dtype=torch.float64)
        self.reference, self.done = self.best.clone(), torch.zeros(count, dtype=torch.bool)
        self.above, self.below, self.stale = torch.zeros(3, count, dtype=torch.int64)
        self.raised, self.lowered = torch.zeros(2, count, dtype=torch.bool)
        self.threshold, self.patience, self.multiplier = threshold, patience, multiplier
        self.stop_patience = stop_patience

    def update(self, accuracy: Tensor, cost: Tensor) -> Tensor:
        """Take an epoch's attack accuracies and costs, float [K]; returns which classes improved, bool [K]."""
        reached, live = accuracy >= self.threshold, ~self.done
        improved = live & reached & (cost < self.best)
        self.best = torch.where(improved, cost, self.best)
        found = self.best.isfinite()
        stale = found & (self.best >= 0.99 * self.reference)
        self.stale = torch.where(stale, self.stale + 1, 0)
        self.reference = torch.minimum(self.reference, self.best)
        self.done |= self.raised & self.lowered & (self.stale >= self.stop_patience)
        self.above = torch.where(reached, self.above + 1, 0)
        self.below = torch.where(reached, 0, self.below + 1)
        up, down = self.above >= self.patience, self.below >= self.patience
        self.weight = torch.where(up, self.weight * self.multiplier, self.weight)
        self.weight = torch.where(down, self.weight / self.multiplier**1.5, self.weight)
        self.above[up], self.below[down] = 0, 0
        self.raised |= up
        self.lowered |= down
        return improved


def anomaly_index(values: Tensor) -> Tensor:
    """|v - median| / (1.4826 MAD) of each of K values; the median of an even number is the mean of the middle two."""
    values = values.double()
    gap = (values - values.quantile(0.5)).abs()
    return gap / (1.4826 * gap.quantile(0.5)).clamp_min(1e-12)


def verdict(costs: Tensor, threshold: float = 2.0) -> tuple[float, tuple[int, ...]]:
    """Score of the model and its suspected targets, most suspicious first, from the smallest costs [K]."""
    costs = costs.double()
    if len(costs) < FEW_CLASSES:
        low, second = costs.sort().values[:2].tolist()
        score = second / max(low, 1e-6)
        return score, (int(costs.argmin()),) if score > RATIO else ()
    index = torch.where(costs < costs.quantile(0.5), anomaly_index(costs), 0.0)
    order = index.argsort(descending=True, stable=True)
    return float(index.max()), tuple(int(k) for k in order if index[k] > threshold)


@defenses.register
@dataclass(frozen=True, kw_only=True)
class NeuralCleanse(ModelDefense):
    """Compares the sizes of the smallest triggers of all classes."""

    name: ClassVar[str] = "neural_cleanse"
    paper: ClassVar[str] = "Wang et al., Neural Cleanse, IEEE S&P 2019"
    year: ClassVar[int] = 2019
    modalities: ClassVar[tuple[str, ...]] = ("image", "text", "audio", "video")

    epochs: int = param(80, "epochs at most", low=1, source="BackdoorBench")
    lr: float = param(0.1, "of Adam with betas 0.5 and 0.9", above=0, source="paper")
    batch_size: int = param(256, "samples per step and class", low=1, source="BackdoorBench")
    min_steps: int = param(10, "steps that an epoch has at least", low=1, source="ours: 2,500 samples / 256")
    init_weight: float = param(1e-3, "lambda at the start", above=0, source="paper")
    attack_threshold: float = param(0.98, "attack accuracy that counts as success", above=0, high=1, source="paper")
    patience: int = param(5, "epochs in a row before lambda moves", low=1, source="paper")
    multiplier: float = param(2.0, "factor by which lambda rises", above=1, source="paper")
    stop_patience: int = param(25, "epochs without a better trigger before a class stops", low=1, source="paper")
    anomaly_threshold: float = param(2.0, "anomaly index above which a class is suspected", low=0, source="paper")
    prompt_length: int = param(1, "text: vectors of the soft prompt", low=1, high=16)
    max_rows: int = param(4096, "rows per forward pass", low=1)

    def run(self, view: DefenderView, ctx: Context) -> ScanReport:
        """Optimise a trigger for every class and compare their sizes."""
        model, clean = view.model, view.clean
        if not len(clean):
            raise InputError("neural_cleanse needs clean samples, got none")
        with frozen(model):
            table = model.modality.encode(clean.inputs).to(model.device)
            start = ctx.generator("neural_cleanse", "start")
            candidates: Candidates
            if model.modality.continuous:
                candidates = MaskedPatterns(model, model.modality.prepare(table[:1])[0], start)
            else:
                candidates = SoftPrompts(model, self.prompt_length, start)
            costs, recovered = self.invert(candidates, table, model.modality.prepare, model.num_classes, ctx)
        score, targets = verdict(costs, self.anomaly_threshold)
        return ScanReport(score, bool(targets), targets, tuple(costs.tolist()), recovered)

    def invert(
        self, candidates: Candidates, table: Tensor, prepare: Callable[..., Tensor], count: int, ctx: Context
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Smallest successful cost of every class, float64 [K], and the triggers that reached it."""
        device, batch = table.device, min(self.batch_size, len(table))
        steps = max(self.min_steps, math.ceil(len(table) / batch))
        optimizer = torch.optim.Adam(candidates.parameters, self.lr, betas=(0.5, 0.9))
        schedule = Schedule(
            count, self.init_weight, self.attack_threshold, self.patience, self.multiplier, self.stop_patience
        )
        generator, best = ctx.generator("neural_cleanse", "batches", device=device), candidates.tensors()
        for _ in ctx.track(range(self.epochs), "neural_cleanse: inverting triggers", self.epochs):
            live = (~schedule.done).nonzero().flatten()
            chunks = live.to(device).split(max(1, self.max_rows // batch))
            weight, hits = schedule.weight.to(device, torch.float32), torch.zeros(count, device=device)
            for rows in _batches(len(table), batch, steps, generator):
                inputs = prepare(table[rows])
                optimizer.zero_grad()
                for classes in chunks:
                    with autocast(device):
                        logits = candidates.logits(inputs, classes).float()
                    wanted = classes[:, None].expand(-1, batch)
                    hits[classes] += (logits.detach().argmax(2) == wanted).float().mean(1)
                    loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum") / batch
                    (loss + (weight[classes] * candidates.cost(classes)).sum()).backward()
                optimizer.step()
            with torch.no_grad():
                cost = candidates.cost(torch.arange(count, device=device)).double().cpu()
            accuracy = (hits / steps).double().cpu()
            kept = (~schedule.done & (accuracy >= self.attack_threshold) & (cost < schedule.best)).nonzero().flatten()
            accuracy[kept] = torch.minimum(accuracy[kept], self.attack_accuracy(candidates, table, prepare, kept))
            improved = schedule.update(accuracy, cost).to(device)
            now = candidates.tensors()
            best = {k: torch.where(improved.reshape(-1, *(1,) * (v.dim() - 1)), now[k], v) for k, v in best.items()}
            if bool(schedule.done.all()):
                break
        costs = schedule.best.where(schedule.best.isfinite(), torch.tensor(candidates.largest).double())
        return costs, {name: value.cpu() for name, value in best.items()}

    def attack_accuracy(
        self, candidates: Candidates, table: Tensor, prepare: Callable[..., Tensor], classes: Tensor
    ) -> Tensor:
        """Share of all samples that the candidates of some classes [A] bring there, in fp32: float64 [A] on the CPU."""
        found = torch.zeros(len(classes), dtype=torch.float64)
        rows = max(1, self.max_rows // max(1, len(classes)))
        with torch.no_grad():
            for part in table.split(rows) if len(classes) else ():
                for chunk in torch.arange(len(classes)).split(max(1, self.max_rows // len(part))):
                    chosen = classes[chunk].to(table.device)
                    hit = candidates.logits(prepare(part), chosen).argmax(2) == chosen[:, None]
                    found[chunk] += hit.double().sum(1).cpu()
        return found / len(table)


def _batches(total: int, size: int, steps: int, generator: torch.Generator) -> Any:
    """Exactly ``steps`` index batches of ``size``: shuffled passes, one after the other."""
    passes = math.ceil(steps * size / total)
    order = torch.cat([torch.randperm(total, generator=generator, device=generator.device) for _ in range(passes)])
    return order[: steps * size].split(size)
