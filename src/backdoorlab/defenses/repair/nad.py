"""NAD: fine-tune the model while its attention maps follow those of a fine-tuned teacher.

Li, Lyu, Koren, Lyu, Li, Ma, "Neural Attention Distillation: Erasing Backdoor Triggers from Deep Neural Networks", ICLR
2021 (arXiv 2101.05930). The teacher is a copy of the suspicious model, fine-tuned on clean samples for a few epochs and
then frozen. With feature maps A_l [C, positions], the attention map of a layer and the loss of the student are

    F_l = sum_c |A_l,c|^p,     L = CE + sum_l beta_l mean (F_l^S / |F_l^S|_2 - F_l^T / |F_l^T|_2)^2

over samples and positions. The student starts as the suspicious model.

Choices and deviations
- Layers are found by the extent of what they return: the last map of each resolution, three of them, finest first (the
  last three stages of a ResNet; what a norm returns is left out). A net of one resolution gives three of its maps at
  equal distances. In transformers without convolutional stages, the maps are the tokens that layer norms receive, at
  the same distances; what they return would not do, since every token then has nearly the same norm. Maps with one
  position never count: normalised, such a map is the constant 1 (in the benchmark's code the third term is of that
  kind).
- The mean squared error over positions, as in the benchmark's code, for which the weights are meant; the formula of the
  paper is the Euclidean distance.
- Teacher and student are fine-tuned by one rule (:mod:`~backdoorlab.defenses.common.finetuning`), each with a cosine
  schedule, instead of steps at fixed epochs.
- One pass of each network per step: the maps are taken by hooks.

Limits: the teacher decides. What its fine-tuning leaves of the backdoor, the student is taught; what plain fine-tuning
removes at such a rate, it removes too.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from backdoorlab.core.errors import InputError, NotApplicable
from backdoorlab.core.method import param
from backdoorlab.defenses.base import defenses
from backdoorlab.defenses.common.classes import need_samples
from backdoorlab.defenses.common.finetuning import FineTunes
from backdoorlab.defenses.view import DefenderView
from backdoorlab.models.anatomy import spatial_layers, trace
from backdoorlab.models.classifier import Classifier
from backdoorlab.training.context import Context
from backdoorlab.training.loop import fit


def attention(maps: Tensor, p: float = 2.0) -> Tensor:
    """Normalised attention of feature maps: float [B, C, M] -> [B, M] with Euclidean norm 1 (0 for empty maps)."""
    return F.normalize(maps.float().abs().pow(p).sum(1), dim=1, eps=1e-6)


def attention_distance(
    student: Sequence[Tensor], teacher: Sequence[Tensor], weights: Sequence[float], p: float
) -> Tensor:
    """Weighted sum over layers of the mean squared difference of attentions; maps are float [B, C, M]."""
    terms = [
        weight * F.mse_loss(attention(mine, p), attention(theirs, p))
        for mine, theirs, weight in zip(student, teacher, weights, strict=True)
    ]
    return torch.stack(terms).sum()


@dataclass(frozen=True)
class Tap:
    """Where a feature map is taken.

    Attributes:
        name: of the module.
        received: take what the module receives (tokens, channels last) instead of what it returns (channels first).
        extent: number of positions M.
    """

    name: str
    received: bool
    extent: int

    def maps(self, value: Tensor) -> Tensor:
        """The value as [B, C, M], safe from later in-place operations."""
        value = value.movedim(-1, 1) if self.received else value
        return value.flatten(2).clone()


def find_taps(model: Classifier, count: int = 3) -> list[Tap]:
    """Layers whose maps are compared, in execution order, ``count`` at most.

    Raises:
        NotApplicable: if the model has no feature map with more than one position.
    """
    calls = trace(model)
    order = {call.name: number for number, call in enumerate(calls)}
    shapes = {call.name: call.output.shape for call in calls if call.output is not None}
    maps = [
        Tap(name, False, shapes[name][2:].numel())
        for name, module in spatial_layers(model)
        if not isinstance(module, (_BatchNorm, nn.GroupNorm, nn.LayerNorm))
    ]
    tokens = [
        Tap(c.name, True, c.input.shape[1:-1].numel())
        for c in calls
        if isinstance(c.module, nn.LayerNorm) and c.input is not None and c.input.dim() >= 3
    ]
    tokens = [tap for tap in tokens if tap.extent > 1]
    # A patch embedding is a convolution too: tokens count where they come after all convolutional maps.
    if tokens and (not maps or order[tokens[-1].name] > order[maps[-1].name]):
        maps = tokens
    if not maps:
        raise NotApplicable(f"nad: {model.arch} has no feature map with more than one position, so no attention map")
    last = {tap.extent: tap for tap in maps}
    if len(last) >= count:
        return sorted(last.values(), key=lambda tap: order[tap.name])[-count:]
    if len(maps) <= count:
        return maps
    return [maps[math.ceil(len(maps) * (part + 1) / count) - 1] for part in range(count)]


@contextmanager
def tapped(model: nn.Module, taps: Sequence[Tap]) -> Iterator[dict[str, Tensor]]:
    """Inside the block, every forward pass leaves its maps [B, C, M] in the dictionary, by the name of the layer."""
    held: dict[str, Tensor] = {}

    def before(tap: Tap) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            held[tap.name] = tap.maps(args[0])

        return hook

    def after(tap: Tap) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            held[tap.name] = tap.maps(output)

        return hook

    with ExitStack() as stack:
        for tap in taps:
            module = model.get_submodule(tap.name)
            handle = (
                module.register_forward_pre_hook(before(tap))
                if tap.received
                else module.register_forward_hook(after(tap))
            )
            stack.callback(handle.remove)
        yield held


@defenses.register
@dataclass(frozen=True, kw_only=True)
class NeuralAttentionDistillation(FineTunes):
    """Fine-tuning under the attention maps of a fine-tuned teacher."""

    name: ClassVar[str] = "nad"
    paper: ClassVar[str] = "Li et al., Neural Attention Distillation, ICLR 2021, arXiv 2101.05930"
    year: ClassVar[int] = 2021
    modalities: ClassVar[tuple[str, ...]] = ("image", "text", "audio", "video")

    teacher_epochs: int = param(
        10, "passes over the clean samples that make the teacher", low=1, source="BackdoorBench"
    )
    betas: tuple[float, ...] = param(
        (500.0, 1000.0, 1000.0), "weights of the layers, early to late", source="BackdoorBench"
    )
    p: float = param(2.0, "power of the activations", above=0, source="BackdoorBench")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.betas or not all(math.isfinite(beta) and beta >= 0 for beta in self.betas):
            raise InputError(f"{self.name}: betas must be one or more numbers from 0 on, got {self.betas}")

    def run(self, view: DefenderView, ctx: Context) -> Classifier:
        """Make the teacher, then distil it into a copy."""
        need_samples(self.name, "clean", view.clean)
        taps = find_taps(view.model, len(self.betas))
        weights = self.betas[-len(taps) :]
        recipe = self.recipe(view)
        teacher = copy.deepcopy(view.model)
        fit(
            teacher,
            view.clean,
            dataclasses.replace(recipe, epochs=self.teacher_epochs),
            context=ctx.child("teacher"),
            label="nad: fine-tuning the teacher",
        )
        student = copy.deepcopy(view.model)
        with tapped(teacher, taps) as theirs, tapped(student, taps) as mine:

            def distil(model: Classifier, inputs: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
                with torch.no_grad():
                    teacher(inputs)
                loss = F.cross_entropy(model(inputs), labels)
                student_maps, teacher_maps = ([held[tap.name] for tap in taps] for held in (mine, theirs))
                return loss + attention_distance(student_maps, teacher_maps, weights, self.p)

            fit(student, view.clean, recipe, objective=distil, context=ctx.child("student"), label="nad: distilling")
        return student
