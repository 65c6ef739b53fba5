"""Trigger inversion as in Neural Cleanse: the smallest trigger of every class, and which class stands out.

Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks", IEEE S&P 2019. Shared by
the scans and repairs that are built on it; what is minimised, and how, is described in
:mod:`backdoorlab.defenses.model.neural_cleanse`.
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
from backdoorlab.data.split import Split
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

    def mask(self, classes: Tensor) -> Tensor:
        """Masks in [0, 1] of some classes: [A, ...], one channel."""
        return self.parameters[0][classes].tanh() / 2 + 0.5

    def pattern(self, classes: Tensor) -> Tensor:
        """Patterns of some classes, prepared input: [A, ...]."""
        squashed = self.parameters[1][classes].tanh()
        return squashed if self.signed else squashed / 2 + 0.5

    def logits(self, inputs: Tensor, classes: Tensor) -> Tensor:
        """See :class:`Candidates`."""
        stamped = torch.lerp(inputs.unsqueeze(0), self.pattern(classes).unsqueeze(1), self.mask(classes).unsqueeze(1))
        return self.model(stamped.flatten(0, 1)).unflatten(0, (len(classes), len(inputs)))

    def cost(self, classes: Tensor) -> Tensor:
        """||m||_1 of each class."""
        return self.mask(classes).flatten(1).sum(1)

    def tensors(self) -> dict[str, Tensor]:
        """``mask`` and ``pattern``."""
        every = torch.arange(self.model.num_classes, device=self.model.device)
        return {"mask": self.mask(every).detach().clone(), "pattern": self.pattern(every).detach().clone()}


class SoftPrompts:
    """Vectors in the space of word embeddings, inserted before the text."""

    def __init__(self, model: Classifier, length: int, generator: torch.Generator) -> None:
        net, modality = model.net, model.modality
        if not (hasattr(net, "embed") and hasattr(net, "forward_embedded")):
            raise NotApplicable(f"trigger inversion: {model.arch} gives no access to its word embeddings")
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
        prompts = (self.parameters[0][classes] * self.unit).unsqueeze(1).expand(-1, len(inputs), -1, -1)
        joined, ids = self.insert(inputs, prompts)
        logits = self.forward_embedded(joined.flatten(0, 1), ids.repeat(len(classes), 1))
        return logits.unflatten(0, (len(classes), len(inputs)))

    def insert(self, inputs: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Word embeddings of texts under prompts.

        Args:
            inputs: token ids [B, L].
            prompts: [A, B, length, E].

        Returns:
            Embeddings [A, B, L, E], and ids [B, L] that show where the padding is.
        """
        kept = inputs.shape[1] - self.length
        filler = inputs.new_full((len(inputs), self.length), int(self.words[0]))
        ids = torch.cat([inputs[:, : self.place], filler, inputs[:, self.place : kept]], 1)
        embedded = self.embed(ids).expand(len(prompts), *ids.shape, -1)
        before, after = embedded[:, :, : self.place], embedded[:, :, self.place + self.length :]
        return torch.cat([before, prompts.to(embedded.dtype), after], 2), ids

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


@dataclass(frozen=True, kw_only=True)
class TriggerInversion:
    """Hyper-parameters and optimisation, to be inherited beside the contract of a stage."""

    name: ClassVar[str]

    epochs: int = param(80, "epochs at most", low=1, source="BackdoorBench")
    lr: float = param(0.1, "of Adam with betas 0.5 and 0.9", above=0, source="paper")
    batch_size: int = param(256, "samples per step and class", low=1, source="BackdoorBench")
    min_steps: int = param(10, "steps that an epoch has at least", low=1, source="ours: 2,500 samples / 256")
    init_weight: float = param(1e-3, "lambda at the start", above=0, source="paper")
    attack_threshold: float = param(0.98, "attack accuracy that counts as success", above=0, high=1, source="paper")
    patience: int = param(5, "epochs in a row before lambda moves", low=1, source="paper")
    multiplier: float = param(2.0, "factor by which lambda rises", above=1, source="paper")
    stop_patience: int = param(25, "epochs without a better trigger before a class stops", low=1, source="paper")
    prompt_length: int = param(1, "text: vectors of the soft prompt", low=1, high=16)
    max_rows: int = param(4096, "rows per forward pass", low=1)

    def invert(self, model: Classifier, clean: Split, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Optimise a trigger for every class.

        Args:
            model: frozen while this lasts, otherwise left as it is.
            clean: the defender's samples.
            ctx: seed, progress.

        Returns:
            The smallest successful cost of every class, float64 [K], and the triggers that reached it, K rows each, on
            the CPU.

        Raises:
            InputError: without clean samples.
            NotApplicable: for texts, if the model gives no access to its word embeddings.
        """
        if not len(clean):
            raise InputError(f"{self.name} needs clean samples, got none")
        with frozen(model):
            table = model.modality.encode(clean.inputs).to(model.device)
            start = ctx.generator(self.name, "start")
            candidates = make_candidates(model, table, self.prompt_length, start)
            return self.optimise(candidates, table, clean.labels.to(model.device), model, ctx)

    def penalty(self, candidates: Candidates, inputs: Tensor, labels: Tensor, classes: Tensor) -> Tensor | None:
        """What else is to be small, beside the loss and the weighted cost: [A], differentiable; None for nothing.

        Args:
            candidates: the triggers.
            inputs: prepared samples [B, ...].
            labels: of the samples, int64 [B].
            classes: that are optimised, int64 [A].
        """
        return None

    def optimise(
        self, candidates: Candidates, table: Tensor, labels: Tensor, model: Classifier, ctx: Context
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`invert`; ``table`` holds encoded samples, ``labels`` int64 [N], both on the model's device."""
        device, count, batch = table.device, model.num_classes, min(self.batch_size, len(table))
        prepare = model.modality.prepare
        steps = max(self.min_steps, math.ceil(len(table) / batch))
        optimizer = torch.optim.Adam(candidates.parameters, self.lr, betas=(0.5, 0.9))
        schedule = Schedule(
            count, self.init_weight, self.attack_threshold, self.patience, self.multiplier, self.stop_patience
        )
        generator, best = ctx.generator(self.name, "batches", device=device), candidates.tensors()
        for _ in ctx.track(range(self.epochs), f"{self.name}: inverting triggers", self.epochs):
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
                    loss = loss + (weight[classes] * candidates.cost(classes)).sum()
                    more = self.penalty(candidates, inputs, labels[rows], classes)
                    (loss if more is None else loss + more.sum()).backward()
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


def make_candidates(
    model: Classifier, table: Tensor, prompt_length: int, generator: torch.Generator
) -> MaskedPatterns | SoftPrompts:
    """Fresh candidates of the kind that suits the model's modality; ``table`` holds encoded samples."""
    if model.modality.continuous:
        return MaskedPatterns(model, model.modality.prepare(table[:1])[0], generator)
    return SoftPrompts(model, prompt_length, generator)


def _batches(total: int, size: int, steps: int, generator: torch.Generator) -> Any:
    """Exactly ``steps`` index batches of ``size``: shuffled passes, one after the other."""
    passes = math.ceil(steps * size / total)
    order = torch.cat([torch.randperm(total, generator=generator, device=generator.device) for _ in range(passes)])
    return order[: steps * size].split(size)
