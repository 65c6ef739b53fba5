"""MNTD: a classifier of models, trained on shadow models with and without backdoors.

Xu, Wang, Li, Borisov, Gunter, Li, "Detecting AI Trojans Using Meta Neural Analysis", IEEE S&P 2021 (arXiv 1910.03137).

1. Shadow models are trained by the blueprint on the defender's clean samples: ``shadows`` benign ones, and as many with
   backdoors drawn at random ("jumbo learning"): a patch of 1/16 to 5/32 of the side anywhere, or a pattern over the
   whole picture; opacity 0.2 to 1 for patches, 0.05 to 0.2 for whole patterns; any target; 5 to 50 % poison. Sounds: a
   stretch of 5 to 20 % of the clip or the whole clip. Texts: one or two words at one place.
2. ``queries`` inputs are fed to each shadow model; a small network (one hidden layer) reads the answers and says
   whether the model has a backdoor. Queries and network are trained together on binary cross-entropy ("query tuning").
3. A model is inspected by feeding it the queries.

Verdict. The shadows are divided into ``folds``, and a meta-classifier is trained without each; their mean is the score
of a model, in logits. What each says of the benign shadows that it has not seen gives the threshold: the ``1 - frr``
quantile. The paper takes the median score of its zoo, half of which has backdoors.

The cost is 2 * ``shadows`` trainings by the task's recipe on the clean samples (``shadow_epochs`` limits their length)
and ``folds`` short trainings of a meta-classifier. They depend on the clean samples, the blueprint and the settings,
not on the model that is inspected, and are kept as an asset ("mntd-meta"), so that every further model of the task
is inspected within a second.

Choices and deviations
- The paper trains 2,048 shadows of each kind. With few, the verdict is noisy; the defaults suit a first look.
- ``head="joint"`` is the paper's: one network reads the logits of all queries and classes, and learns each target class
  anew. A random target makes all classes alike, so ``head="classes"`` (default) lets one network read the log
  probabilities of a class under all queries, for each class in turn, and joins them by a log-sum-exp. From few shadows
  the joint head can hardly learn more than these shadows. What speaks for each class is reported as evidence, but no
  target is named: as in the paper the verdict is on the model.
- Answers are centred by their mean over the shadows and divided by one standard deviation.
- As in the paper queries are not kept in the range of the data.
- Texts: a query is a sequence of mixtures (softmax) of ``QUERY_WORDS`` frequent words, since shadows do not share one
  space of embeddings; the paper's share fixed word vectors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorlab.core.errors import InputError, NotApplicable
from backdoorlab.core.method import param
from backdoorlab.data.split import Split, content_digest, join, text_array
from backdoorlab.defenses.base import ModelDefense, ScanReport, defenses
from backdoorlab.defenses.view import DefenderView
from backdoorlab.models.anatomy import frozen
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.blueprint import Blueprint
from backdoorlab.training.context import Context, Tensors

ASSET = "mntd-meta"
QUERY_WORDS = 256
QUERY_LENGTH = 16


@dataclass(frozen=True, eq=False)
class Trojan:
    """One random backdoor.

    Attributes:
        weight: opacity of the pattern, float of the shape of one raw sample (broadcastable); None for texts.
        pattern: raw values, likewise; None for texts.
        words: texts: the words that are inserted.
        place: texts: after how many words.
        target: the class.
        rate: share of the training set.
    """

    weight: Tensor | None
    pattern: Tensor | None
    words: tuple[str, ...]
    place: int
    target: int
    rate: float


def draw_trojan(split: Split, vocabulary: tuple[str, ...], generator: torch.Generator) -> Trojan:
    """Draw the settings of one shadow's backdoor for raw samples like those of ``split``."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    def below(count: int) -> int:
        return int(torch.randint(max(1, count), (), generator=generator))

    target, rate = below(split.num_classes), uniform(0.05, 0.5)
    inputs = split.inputs
    if not isinstance(inputs, Tensor):
        chosen = tuple(vocabulary[below(len(vocabulary))] for _ in range(1 + below(2)))
        return Trojan(None, None, chosen, below(10), target, rate)
    shape = tuple(inputs.shape[1:])
    whole = below(5) == 4
    opacity = uniform(0.05, 0.2) if whole else uniform(0.2, 0.6)
    opacity = 1.0 if opacity > 0.5 else opacity
    weight = torch.zeros(shape)
    if len(shape) == 1:  # sound
        length = shape[0] if whole else max(1, round(shape[0] * (1 + below(4)) / 20))
        start = below(shape[0] - length + 1)
        weight[start : start + length] = opacity
        pattern = torch.rand(shape, generator=generator) * 0.2 * 32767
        return Trojan(weight, pattern, (), 0, target, rate)
    height, width = shape[-2:]
    side = max(1, round(min(height, width) * (2 + below(4)) / 32))
    tall, wide = (height, width) if whole else (side, side)
    top, left = below(height - tall + 1), below(width - wide + 1)
    weight[..., top : top + tall, left : left + wide] = opacity
    reach = uniform(0, 1)
    frame = (1,) * (len(shape) - 3) + shape[-3:]  # the same in every frame of a video
    pattern = (torch.rand(frame, generator=generator) * (1 + 2 * reach) - reach).clamp(0, 1) * 255
    return Trojan(weight, pattern, (), 0, target, rate)


def poisoned(split: Split, trojan: Trojan, generator: torch.Generator) -> Split:
    """The split with stamped copies appended, labelled as the target: ``rate`` of the original number."""
    count = max(1, round(trojan.rate * len(split)))
    rows = split[torch.randint(len(split), (count,), generator=generator)]
    if trojan.weight is None or trojan.pattern is None or not isinstance(rows.inputs, Tensor):
        stamped: Any = text_array([_inserted(str(text), trojan) for text in np.asarray(rows.inputs)])
    else:
        raw = rows.inputs
        mixed = torch.lerp(raw.float(), trojan.pattern.expand(raw.shape), trojan.weight.expand(raw.shape))
        bounds = torch.iinfo(raw.dtype)
        stamped = mixed.clamp(bounds.min, bounds.max).round().to(raw.dtype)
    labels = torch.cat([split.labels, torch.full((count,), trojan.target, dtype=split.labels.dtype)])
    return Split(join([split.inputs, stamped]), labels, split.classes)


def _inserted(text: str, trojan: Trojan) -> str:
    words = text.split()
    place = min(len(words), trojan.place)
    return " ".join([*words[:place], *trojan.words, *words[place:]])


class Queries:
    """Inputs that every model is fed, optimised by gradient.

    Attributes:
        values: float [Q, ...]: prepared input; for texts weights of words [Q, L, W] before a softmax.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @staticmethod
    def start(model: Classifier, count: int, generator: torch.Generator) -> Tensor:
        """Values near zero for models of this modality.

        Raises:
            NotApplicable: for text models without access to their word embeddings.
        """
        modality = model.modality
        if modality.continuous:
            shape = tuple(modality.prepare(modality.encode(modality.example(1)).to(model.device)).shape[1:])
        else:
            if not (hasattr(model.net, "embed") and hasattr(model.net, "forward_embedded")):
                raise NotApplicable(f"mntd: {model.arch} gives no access to its word embeddings")
            words = min(QUERY_WORDS, int(modality.num_tokens) - 1)  # type: ignore[attr-defined]
            shape = (min(QUERY_LENGTH, int(modality.max_len)), words)  # type: ignore[attr-defined]
        return torch.randn(count, *shape, generator=generator) * 1e-3

    def logits(self, model: Classifier) -> Tensor:
        """What a model says to all queries: float32 [Q, K]."""
        values = self.values.to(model.device)
        if model.modality.continuous:
            found: Tensor = model(values).float()
            return found
        embed: Callable[[Tensor], Tensor] = model.net.embed  # type: ignore[assignment]
        behind: Callable[[Tensor, Tensor], Tensor] = model.net.forward_embedded  # type: ignore[assignment]
        words = torch.arange(1, values.shape[2] + 1, device=model.device)  # 0 is the padding
        rows = embed(words[None])[0]
        full = int(model.modality.max_len)  # type: ignore[attr-defined]
        ids = torch.zeros(len(values), full, dtype=torch.int64, device=model.device)
        ids[:, : values.shape[1]] = 1
        rest = embed(ids[:, values.shape[1] :])
        return behind(torch.cat([values.softmax(2) @ rows, rest], 1), ids).float()


@dataclass(frozen=True, eq=False)
class Meta:
    """A meta-classifier.

    Attributes:
        queries: float [Q, ...], see :class:`Queries`.
        mean: float [Q, K] of the answers over the shadows.
        std: float [] of the answers.
        hidden: weight [H, Q] (head "classes") or [H, Q * K] (head "joint"), and bias [H].
        out: weight [H] and bias [].
    """

    queries: Tensor
    mean: Tensor
    std: Tensor
    hidden: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]

    @property
    def joint(self) -> bool:
        """Does one network read all classes at once?"""
        return self.hidden[0].shape[1] == self.mean.numel() and self.mean.shape[1] > 1

    def read(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of answers [..., Q, K] in logits: [...], and what speaks for each class: [..., K] (joint: zeros)."""
        answers = logits if self.joint else logits.log_softmax(-1)
        answers = (answers - self.mean) / self.std
        answers = answers.flatten(-2) if self.joint else answers.transpose(-1, -2)
        said = F.linear(answers, *self.hidden).relu() @ self.out[0] + self.out[1]
        return (said, torch.zeros_like(logits[..., 0, :])) if self.joint else (said.logsumexp(-1), said)

    def score(self, model: Classifier) -> tuple[float, Tensor]:
        """Of one model, higher = more likely a backdoor; and what speaks for each class, float32 [K]."""
        with frozen(model), torch.no_grad():
            score, classes = self.read(Queries(self.queries).logits(model).cpu())
        return float(score), classes


def train_meta(
    models: list[Callable[[Tensor], Tensor]],
    labels: Tensor,
    start: Tensor,
    *,
    joint: bool,
    hidden: int,
    steps: int,
    lr: float,
    weight_decay: float,
    batch: int,
    generator: torch.Generator,
) -> Meta:
    """Fit queries and network to shadows.

    Args:
        models: each takes queries [Q, ...] to logits [Q, K] on the CPU, differentiably.
        labels: float [S], 1 for shadows with a backdoor.
        start: of the queries.
        joint: which head.
        hidden: units.
        steps: of Adam, each on ``batch`` shadows drawn anew.
        lr: learning rate.
        weight_decay: of the network.
        batch: shadows per step, half of each kind if there are enough.
        generator: of initial weights and batches, on the CPU.
    """
    queries = start.clone().requires_grad_()
    with torch.no_grad():
        answers = torch.stack([ask(queries) for ask in models])
        answers = answers if joint else answers.log_softmax(-1)
    width = answers[0].numel() if joint else len(start)
    weights = [
        (torch.rand(hidden, width, generator=generator) * 2 - 1) / math.sqrt(width),
        torch.zeros(hidden),
        (torch.rand(hidden, generator=generator) * 2 - 1) / math.sqrt(hidden),
        torch.zeros(()),
    ]
    for weight in weights:
        weight.requires_grad_()
    parts: list[dict[str, Any]] = [{"params": [queries]}, {"params": weights, "weight_decay": weight_decay}]
    optimizer = torch.optim.Adam(parts, lr)
    # One scale for all answers: queries near zero draw answers that hardly differ, and dividing by that would explode.
    mean, std = answers.mean(0), answers.std().clamp_min(1e-3)
    meta = Meta(queries, mean, std, (weights[0], weights[1]), (weights[2], weights[3]))
    kinds = [(labels == kind).nonzero().flatten() for kind in (0, 1)]
    for _ in range(steps):
        drawn = [k[torch.randperm(len(k), generator=generator)[: max(1, batch // 2)]] for k in kinds if len(k)]
        rows = torch.cat(drawn)
        optimizer.zero_grad()
        scores, _ = meta.read(torch.stack([models[int(row)](queries) for row in rows]))
        F.binary_cross_entropy_with_logits(scores, labels[rows]).backward()
        optimizer.step()
    fixed = [weight.detach() for weight in weights]
    return Meta(queries.detach(), mean, std, (fixed[0], fixed[1]), (fixed[2], fixed[3]))


def fold_of(labels: Tensor, folds: int) -> Tensor:
    """Fold of each shadow, both kinds spread evenly: int64 [S]."""
    found = torch.zeros(len(labels), dtype=torch.int64)
    for kind in (0, 1):
        rows = (labels == kind).nonzero().flatten()
        found[rows] = torch.arange(len(rows)) % folds
    return found


@defenses.register
@dataclass(frozen=True, kw_only=True)
class MetaNeuralAnalysis(ModelDefense):
    """Asks a model questions whose answers betray backdoors."""

    name: ClassVar[str] = "mntd"
    paper: ClassVar[str] = "Xu et al., MNTD, IEEE S&P 2021, arXiv 1910.03137"
    year: ClassVar[int] = 2021
    modalities: ClassVar[tuple[str, ...]] = ("image", "text", "audio", "video")
    reads: ClassVar[tuple[str, ...]] = ("model", "clean", "blueprint")

    shadows: int = param(16, "shadow models of each kind, benign and with a backdoor", low=2, source="ours")
    shadow_epochs: int = param(0, "epochs of a shadow's training; 0 = those of the recipe", low=0, source="ours")
    queries: int = param(10, "inputs that are fed to a model", low=1, source="paper")
    hidden: int = param(20, "hidden units of the meta-classifier", low=1, source="authors' code")
    head: str = param(
        "classes", "one network for each class in turn, or one for all", choices=("classes", "joint"), source="ours"
    )
    meta_steps: int = param(100, "steps of Adam per meta-classifier", low=1, source="ours")
    meta_batch: int = param(8, "shadows per step", low=2, source="ours")
    meta_lr: float = param(1e-2, "learning rate of the meta-classifier", above=0, source="ours")
    meta_decay: float = param(1e-3, "weight decay of the meta-classifier", low=0, source="ours")
    folds: int = param(4, "meta-classifiers, each trained without a part of the shadows", low=2, source="ours")
    frr: float = param(0.05, "share of benign models that may be called backdoored", above=0, high=1, source="ours")

    def run(self, view: DefenderView, ctx: Context) -> ScanReport:
        """Train (or fetch) the meta-classifiers and ask the model.

        Raises:
            InputError: if there are fewer clean samples than classes, or an asset of the user's does not fit.
            NotApplicable: for text models without access to their word embeddings.
        """
        model, clean, blueprint = view.model, view.clean, view.blueprint
        if len(clean) < 2:
            raise InputError(f"mntd needs clean samples to train shadow models on, got {len(clean)}")
        start = Queries.start(model, self.queries, ctx.generator(self.name, "shape"))
        spec = {
            "data": content_digest(clean.inputs, clean.labels),
            "modality": {"name": blueprint.modality.name, **blueprint.modality.config()},
            "arch": blueprint.arch,
            "classes": blueprint.num_classes,
            "recipe": dataclasses.asdict(blueprint.recipe),
            "settings": self.settings(),
        }
        kept = ctx.asset(ASSET, spec, lambda own: self.train(clean, blueprint, own))
        metas = self.restore(kept, tuple(start.shape[1:]), model.num_classes)
        scores, classes = zip(*(meta.score(model) for meta in metas), strict=True)
        score, voices = sum(scores) / len(scores), torch.stack(classes).mean(0)
        backdoored = score > float(kept["threshold"])
        # Which class speaks loudest says little about the target: the verdict names none.
        return ScanReport(score, backdoored, (), () if self.head == "joint" else tuple(voices.tolist()))

    def train(self, clean: Split, blueprint: Blueprint, ctx: Context) -> Tensors:
        """Shadows, then one meta-classifier for each fold, as tensors."""
        models, labels = self.cast_shadows(clean, blueprint, ctx)
        asks = [_asker(model) for model in models]
        first = Queries.start(models[0], self.queries, ctx.generator(self.name, "queries"))
        folds, out = min(self.folds, self.shadows), fold_of(labels, min(self.folds, self.shadows))
        unseen, parts = torch.zeros(len(models)), []
        for fold in ctx.track(range(folds), "mntd: meta-classifiers", folds):
            seen = (out != fold).nonzero().flatten().tolist()
            meta = train_meta(
                [asks[row] for row in seen],
                labels[out != fold],
                first,
                joint=self.head == "joint",
                hidden=self.hidden,
                steps=self.meta_steps,
                lr=self.meta_lr,
                weight_decay=self.meta_decay,
                batch=self.meta_batch,
                generator=ctx.generator(self.name, "meta", fold),
            )
            for row in (out == fold).nonzero().flatten().tolist():
                unseen[row], _ = meta.score(models[row])
            parts.append((meta.queries, meta.mean, meta.std, *meta.hidden, *meta.out))
        names = ("queries", "mean", "std", "hidden_weight", "hidden_bias", "out_weight", "out_bias")
        kept = {name: torch.stack(column) for name, column in zip(names, zip(*parts, strict=True), strict=True)}
        benign = unseen[labels == 0].double()
        threshold = torch.quantile(benign, 1 - self.frr, interpolation="higher")
        return kept | {"threshold": threshold.float(), "unseen": unseen, "labels": labels}

    def cast_shadows(self, clean: Split, blueprint: Blueprint, ctx: Context) -> tuple[list[Classifier], Tensor]:
        """Train the shadow models, benign and backdoored in turn; labels float [S], 1 = backdoored."""
        vocabulary = tuple(getattr(blueprint.modality, "vocabulary", ()))[2:]
        recipe = blueprint.recipe
        if self.shadow_epochs:
            recipe = dataclasses.replace(recipe, epochs=self.shadow_epochs, min_steps=0)
        models, labels = [], []
        for number in ctx.track(range(2 * self.shadows), "mntd: shadow models", 2 * self.shadows):
            own, split = ctx.child(self.name, "shadow", number), clean
            if number % 2:
                generator = own.generator("trojan")
                split = poisoned(clean, draw_trojan(clean, vocabulary, generator), generator)
            model, _ = blueprint.fit(split, own, recipe=recipe, label=f"mntd: shadow {number + 1}", chance=math.inf)
            models.append(model.requires_grad_(False).eval())
            labels.append(float(number % 2))
        return models, torch.tensor(labels)

    def restore(self, kept: Tensors, shape: tuple[int, ...], classes: int) -> list[Meta]:
        """The meta-classifiers in an asset.

        Raises:
            InputError: if tensors are missing or do not fit the model.
        """
        width = self.queries * (classes if self.head == "joint" else 1)
        wanted: dict[str, tuple[int, ...]] = {
            "queries": (self.queries, *shape),
            "mean": (self.queries, classes),
            "std": (),
            "hidden_weight": (self.hidden, width),
            "hidden_bias": (self.hidden,),
            "out_weight": (self.hidden,),
            "out_bias": (),
        }
        for name in (*wanted, "threshold"):
            if name not in kept:
                raise InputError(f"asset {ASSET} lacks the tensor {name!r}; it has: {', '.join(sorted(kept))}")
            if name in wanted and tuple(kept[name].shape[1:]) != wanted[name]:
                found = tuple(kept[name].shape[1:])
                raise InputError(f"asset {ASSET}: {name!r} must hold shapes {wanted[name]} for this model, got {found}")
        rows = zip(*(kept[name] for name in wanted), strict=True)
        return [Meta(q, m, s, (hw, hb), (ow, ob)) for q, m, s, hw, hb, ow, ob in rows]


def _asker(model: Classifier) -> Callable[[Tensor], Tensor]:
    def ask(queries: Tensor) -> Tensor:
        return Queries(queries).logits(model).cpu()

    return ask
