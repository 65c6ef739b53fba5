"""FreeEagle: without any data, what the later half of a network takes for each class, and for which class besides.

Fu, Zhang, Ji, Wang, Wang, Lin, Wang, "FreeEagle: Detecting Complex Neural Trojans in Data-Free Cases", USENIX Security
2023 (arXiv 2302.14500).

The network is split at a middle layer L. For each class c an intermediate representation z_c is optimised that the part
behind L takes for c,

    min_z  CE(back(z), c) + (weight decay) |z|_2^2,      z >= 0 if L ends in a ReLU,

and the mean z_c of ``dummies`` such runs is looked at: M[s, t] is the probability of t when z_s is fed, M[s, s] = 0. In
a backdoored network the features of other classes lean toward the target, so that a column stands out. With
v_t = mean_s M[s, t] the anomaly metric is

    A = (max v - Q3) / (Q3 - Q1)

with the quartiles of v; above ``threshold`` the model is called backdoored toward argmax v.

Where to split is found on any architecture: a layer qualifies if nothing of the input reaches the logits except through
it (with its output held fixed, the logits of two inputs agree). Of those the one nearest to ``depth`` of all executed
modules is taken, or ``layer`` by name; layers that return nothing negative are preferred, since the bound keeps z where
features can be. The representations of all classes form one batch.

Choices and deviations
- Quartiles are interpolated; the authors take the sorted entries at a quarter and three quarters of K.
- Below five classes quartiles mean nothing. The score is then the largest v_t over the second largest.
- The authors choose the split by hand for each architecture, in the middle of deep networks. In shallow ones the
  classes have not parted there; hence a ``depth`` beyond it.

Limits: A is scale-free and can be large for benign networks whose columns are nearly equal; what is "equal" depends on
the architecture and how long it was trained. Texts and sounds: only layers behind pooling may qualify.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.core.errors import InputError, NotApplicable, nearest
from backdoorlab.core.method import param
from backdoorlab.defenses.base import ModelDefense, ScanReport, defenses
from backdoorlab.defenses.common.inversion import FEW_CLASSES, RATIO
from backdoorlab.defenses.view import DefenderView
from backdoorlab.models.anatomy import example_input, frozen, trace
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.context import Context


@contextmanager
def replaced(module: nn.Module, value: Tensor) -> Iterator[None]:
    """Inside the block the module returns ``value`` (a copy, which later layers may change in place)."""

    def swap(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return value.clone()

    handle = module.register_forward_hook(swap)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True, eq=False)
class Cut:
    """A layer through which everything passes.

    Attributes:
        name: of the layer.
        module: the layer.
        place: share of the executed modules that return before it.
        output: what it returns for two noise inputs: float [2, ...].
    """

    name: str
    module: nn.Module
    place: float
    output: Tensor

    @property
    def rectified(self) -> bool:
        """Is nothing that it returns negative?"""
        return bool((self.output >= 0).all())


def noise_input(model: Classifier, generator: torch.Generator, batch: int = 2) -> Tensor:
    """Prepared input without content of its own: uniform noise, or random words."""
    example = example_input(model, batch)
    if example.is_floating_point():
        noise = torch.rand(example.shape, generator=generator)
        return (noise * 2 - 1 if model.modality.name == "audio" else noise).to(example)
    words = int(model.modality.num_tokens)  # type: ignore[attr-defined]
    ids = torch.randint(min(1, words - 1), words, example.shape, generator=generator).to(example)
    # A tokenizer of a pre-trained model puts special tokens where they must stay.
    return torch.cat([example[:, :1], ids[:, 1:]], 1) if getattr(model.modality, "tokenizer", "") else ids


def find_cuts(model: Classifier, generator: torch.Generator) -> list[Cut]:
    """All layers through which everything passes, except what returns the logits, in execution order.

    Args:
        model: frozen, in evaluation mode.
        generator: of the noise that is sent through.
    """
    first, second = noise_input(model, generator), noise_input(model, generator)
    calls, outputs = trace(model, first), _outputs(model, first)
    runs = {name: sum(c.name == name for c in calls) for name in {c.name for c in calls}}
    with torch.no_grad():
        wanted, other = model(first), model(second)
    found = []
    for place, call in enumerate(calls):
        output = outputs.get(call.name)
        if runs[call.name] != 1 or output is None or not output.is_floating_point() or len(output) != len(first):
            continue
        if output.shape == wanted.shape and torch.equal(output, wanted):
            continue
        with torch.no_grad(), replaced(call.module, output):
            same = model(second)
        if torch.allclose(same, wanted, rtol=1e-4, atol=1e-5) and not torch.allclose(other, wanted, rtol=1e-4):
            found.append(Cut(call.name, call.module, place / len(calls), output))
    return found


def _outputs(model: Classifier, x: Tensor) -> dict[str, Tensor]:
    """Copies of what each module returns, made before a later layer can change them in place."""
    kept: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if module is model:
            continue

        def keep(module: nn.Module, args: tuple[Any, ...], output: Any, name: str = name) -> None:
            if isinstance(output, Tensor):
                kept[name] = output.detach().clone()

        handles.append(module.register_forward_hook(keep))
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return kept


def class_matrix(logits: Tensor) -> Tensor:
    """M of the module's docstring from the logits of z_1..z_K: float [K, K], zero diagonal."""
    return logits.softmax(1) * (1 - torch.eye(len(logits), device=logits.device, dtype=logits.dtype))


def lean(matrix: Tensor) -> Tensor:
    """Mean of each column of M without the diagonal: float64 [K]."""
    return matrix.double().sum(0) / max(1, len(matrix) - 1)


def anomaly_metric(columns: Tensor) -> float:
    """(max - Q3) / (Q3 - Q1); below five classes the largest over the second largest. Float64 [K]."""
    columns = columns.double()
    if len(columns) < FEW_CLASSES:
        second, largest = columns.sort().values[-2:].tolist()
        return float(largest / max(second, 1e-6))
    low, high = columns.quantile(0.25), columns.quantile(0.75)
    return float((columns.max() - high) / (high - low).clamp_min(1e-9))


@defenses.register
@dataclass(frozen=True, kw_only=True)
class FreeEagle(ModelDefense):
    """Looks for a class toward which the intermediate representations of all others lean."""

    name: ClassVar[str] = "freeeagle"
    paper: ClassVar[str] = "Fu et al., FreeEagle, USENIX Security 2023, arXiv 2302.14500"
    year: ClassVar[int] = 2023
    modalities: ClassVar[tuple[str, ...]] = ("image", "text", "audio", "video")
    reads: ClassVar[tuple[str, ...]] = ("model",)
    needs_clean_fraction: ClassVar[float] = 0.0

    depth: float = param(0.7, "where to split, as a share of the executed modules", low=0, high=1, source="ours")
    layer: str = param("", "name of the layer to split at instead", source="ours")
    steps: int = param(1000, "steps of Adam", low=1, source="authors' code")
    lr: float = param(1e-2, "learning rate of Adam", above=0, source="authors' code")
    weight_decay: float = param(5e-3, "penalty of Adam on the representation", low=0, source="authors' code")
    dummies: int = param(1, "representations per class that are averaged", low=1, source="authors' code")
    threshold: float = param(2.0, "anomaly metric above which the model is called backdoored", low=0, source="paper")

    def run(self, view: DefenderView, ctx: Context) -> ScanReport:
        """Optimise a representation for every class and see which others it resembles.

        Raises:
            InputError: if ``layer`` names no layer through which everything passes.
            NotApplicable: if the model has no such layer.
        """
        model = view.model
        with frozen(model):
            cut = self.choose(find_cuts(model, ctx.generator(self.name, "probe")), model)
            matrix = self.matrix(model, cut, ctx)
        columns = lean(matrix)
        score = anomaly_metric(columns)
        limit = RATIO if len(columns) < FEW_CLASSES else self.threshold
        targets = (int(columns.argmax()),) if score > limit else ()
        return ScanReport(score, bool(targets), targets, tuple(columns.tolist()), {"matrix": matrix.cpu()})

    def choose(self, cuts: list[Cut], model: Classifier) -> Cut:
        """The layer to split at."""
        if not cuts:
            raise NotApplicable(f"freeeagle: {model.arch} has no layer through which everything passes")
        if self.layer:
            named = {cut.name: cut for cut in cuts}
            if self.layer not in named:
                raise InputError(
                    f"freeeagle: {model.arch} cannot be split at {self.layer!r}.{nearest(self.layer, named)} "
                    f"It can be split at {', '.join(named)}"
                )
            return named[self.layer]
        rectified = [cut for cut in cuts if cut.rectified and cut.place >= self.depth / 2]
        return min(rectified or cuts, key=lambda cut: abs(cut.place - self.depth))

    def matrix(self, model: Classifier, cut: Cut, ctx: Context) -> Tensor:
        """M of the network split at ``cut``: float32 [K, K]."""
        count, device = model.num_classes, cut.output.device
        shape = (count * self.dummies, *cut.output.shape[1:])
        z = torch.rand(shape, generator=ctx.generator(self.name, "start")).to(device).requires_grad_()
        wanted = torch.arange(count, device=device).repeat_interleave(self.dummies)
        carrier = noise_input(model, ctx.generator(self.name, "carrier"), 1)
        optimizer = torch.optim.Adam([z], self.lr, weight_decay=self.weight_decay)
        for _ in ctx.track(range(self.steps), "freeeagle: representations", self.steps):
            optimizer.zero_grad()
            with replaced(cut.module, z):
                logits = model(carrier).float()
            if logits.shape != (len(wanted), count):
                raise NotApplicable(
                    f"freeeagle: behind {cut.name}, {model.arch} still depends on the size of the batch"
                )
            F.cross_entropy(logits, wanted, reduction="sum").backward()
            optimizer.step()
            if cut.rectified:
                with torch.no_grad():
                    z.clamp_min_(0)
        with torch.no_grad(), replaced(cut.module, z.unflatten(0, (count, self.dummies)).mean(1)):
            return class_matrix(model(carrier).float())
