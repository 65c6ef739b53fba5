"""NPD: insert one linear layer into the frozen model and train it to filter what a trigger adds.

Zhu, Wei, Zha, Wu, "Neural Polarizer: A Lightweight and Effective Backdoor Defense via Purifying Poisoned Features",
NeurIPS 2023 (arXiv 2306.16697). The polarizer g is a 1x1 convolution with a batch norm in front of a late convolution;
only g is trained. A trigger is unknown, so targeted adversarial perturbations stand in for it. For every clean sample,
with the class y' that comes second,

    d = argmin_{|d|_2 <= r}  CE(f_g(x + d), y')

by sign-gradient steps that are scaled back into the ball, until most of the batch reaches y'. Then g goes down

    l1 CE(f_g(x), y) + l2 CE(f_g(x + d), f_g(x)) - l3 log(1 - p_k(x + d)) - l4 log(1 - p_y'(x + d)),

k the likeliest class of x + d other than y.

Choices and deviations
- g starts as the identity: the convolution is the identity matrix, and its norm undoes itself with the statistics that
  the layer's input has on the clean samples. A norm with fresh statistics changes the model before anything is learned,
  for which published code has a warm-up; here none is needed.
- The repaired model is stored as what it is, polarizer included, and comes back so. (Published code stores the
  backdoored weights as the result, the polarizer elsewhere.)
- ``layer`` names the layer in front of which g is put. By default it is the last convolution but one, 1x1 ones not
  counted: the first one of the last block of a ResNet, as in the paper. Models that consist of layer norms on tokens
  rather than of convolutions get a d x d map in front of the last of these.
- The rate is annealed over all epochs; published code makes such a schedule and never steps it.
- Gradients are clipped: -log(1 - p) has steep ones where the model is sure of a wrong class.
- The bound r is meant for 3x32x32 values and scaled with the root of the number of values; x + d is clipped to the
  valid range.
- That norm keeps these statistics; its gain and bias are trained with the convolution. Statistics of small batches
  are another model than the one that is stored.

Limits: g cannot remove what its channels do not separate; in a narrow network it has few weights. It needs continuous
inputs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from backdoorlab.core.errors import ArtifactError, InputError, NotApplicable, nearest
from backdoorlab.core.method import param
from backdoorlab.core.seeding import isolated_rng
from backdoorlab.data.split import Inputs
from backdoorlab.defenses.base import RepairDefense, defenses
from backdoorlab.defenses.common.classes import need_samples
from backdoorlab.defenses.common.finetuning import batch_for
from backdoorlab.defenses.common.perturbation import scaled_norm, shifted, valid_range, within_norm
from backdoorlab.defenses.common.pruning import Moments
from backdoorlab.defenses.view import DefenderView
from backdoorlab.modalities.base import modality_from_config
from backdoorlab.models.anatomy import Call, evaluating, frozen, trace
from backdoorlab.models.classifier import Classifier, build_model
from backdoorlab.training.batches import Batch
from backdoorlab.training.context import Context, autocast
from backdoorlab.training.loop import Descent, Objective, fit
from backdoorlab.training.recipes import Recipe

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Polarizer(nn.Module):
    """A linear map of channels with a norm, in front of a layer; the identity until it is trained."""

    def __init__(self, layer: nn.Module) -> None:
        """For a convolution (channels of maps) or a layer norm (last axis of tokens)."""
        super().__init__()
        self.layer = layer
        with isolated_rng(0):  # what is drawn is replaced below
            if isinstance(layer, _ConvNd):
                dims, width = len(layer.kernel_size), layer.in_channels
                self.mix: nn.Module = CONVOLUTIONS[dims](width, width, 1, bias=False)
                self.norm: nn.Module = NORMS[dims](width)
            elif isinstance(layer, nn.LayerNorm):
                width = layer.normalized_shape[-1]
                self.mix, self.norm = nn.Linear(width, width, bias=False), nn.Identity()
            else:
                raise InputError(f"a polarizer fits a convolution or a layer norm, got {type(layer).__name__}")
        with torch.no_grad():
            weight = self.mix.get_parameter("weight")
            weight.copy_(torch.eye(width).reshape(weight.shape))

    def forward(self, x: Tensor) -> Tensor:
        """Polarize, then what the layer does."""
        output: Tensor = self.layer(self.norm(self.mix(x)))
        return output

    @torch.no_grad()
    def settle(self, mean: Tensor, variance: Tensor) -> None:
        """Make the norm undo itself for inputs of these statistics, each float [C]."""
        norm = self.norm
        if not isinstance(norm, _BatchNorm):
            return
        for name, value in (
            ("running_mean", mean),
            ("running_var", variance),
            ("bias", mean),
            ("weight", (variance + norm.eps).sqrt()),
        ):
            getattr(norm, name).copy_(value)


class PolarizedClassifier(Classifier):
    """A classifier with a polarizer in front of one of its layers.

    Attributes:
        layer: name of that layer, as in ``named_modules`` of the classifier without polarizer.
    """

    kind: ClassVar[str] = "polarized"

    def __init__(self, base: Classifier, layer: str) -> None:
        """Takes the network of ``base``, which must not be used any more.

        Raises:
            InputError: if there is no such layer, or no polarizer fits it.
        """
        super().__init__(base.net, base.modality, base.arch, base.num_classes)
        self.layer = layer
        names = dict(self.named_modules())
        if layer not in names or not layer:
            fitting = [name for name, module in names.items() if isinstance(module, (_ConvNd, nn.LayerNorm))]
            raise InputError(f"npd: {base.arch} has no layer {layer!r}.{nearest(layer, fitting)}")
        parent, _, child = layer.rpartition(".")
        setattr(self.get_submodule(parent), child, Polarizer(names[layer]))

    @property
    def polarizer(self) -> Polarizer:
        """What was inserted."""
        found = self.get_submodule(self.layer)
        assert isinstance(found, Polarizer)
        return found

    def record(self) -> dict[str, Any]:
        """See :meth:`StoredModel.record`."""
        return {**super().record(), "layer": self.layer}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> PolarizedClassifier:
        """See :meth:`StoredModel.from_record`."""
        base = build_model(record["arch"], modality_from_config(record["modality"]), record["num_classes"])
        try:
            model = cls(base, record["layer"])
        except InputError as error:
            raise ArtifactError(str(error)) from None
        return model.to(memory_format=torch.channels_last) if base.modality.name == "image" else model


def find_layer(model: Classifier, name: str = "") -> Call:
    """The call of the layer in front of which the polarizer goes; "" chooses it.

    Raises:
        InputError: for a name that no fitting layer has.
        NotApplicable: if the model has neither a second convolution of maps nor layer norms on tokens.
    """
    convolutions, tokens = [], []
    for call in trace(model):
        module, received = call.module, call.input
        if received is None:
            continue
        if isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd):
            if received.dim() == 2 + len(module.kernel_size) and received.shape[2:].numel() > 1:
                convolutions.append(call)
        elif (
            isinstance(module, nn.LayerNorm)
            and received.dim() >= 3
            and tuple(received.shape[-1:]) == tuple(module.normalized_shape)
        ):
            tokens.append(call)
    if name:
        fitting = {call.name: call for call in (*convolutions, *tokens)}
        if name not in fitting:
            raise InputError(
                f"npd: {model.arch} has no layer {name!r} that a polarizer fits.{nearest(name, fitting)} "
                f"It has: {', '.join(fitting) or 'none'}"
            )
        return fitting[name]
    # What comes before the first convolution is the input itself.
    late = [call for call in convolutions[1:] if max(cast(_ConvNd, call.module).kernel_size) > 1]
    if late and len(late) >= len(tokens):
        return late[-2:][0]
    if tokens:
        return tokens[-1]
    raise NotApplicable(f"npd: {model.arch} has neither two convolutions of maps nor layer norms on tokens")


@torch.no_grad()
def settle(model: PolarizedClassifier, inputs: Inputs, batch_size: int = 500) -> None:
    """Give the polarizer's norm the statistics of raw samples, with the gain and bias that undo it."""
    moments, held = Moments(), model.polarizer

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        moments.add(args[0].float().movedim(1, -1))

    handle = held.norm.register_forward_pre_hook(look)
    try:
        with evaluating(model):
            for start in range(0, len(inputs), batch_size):
                table = model.modality.encode(inputs[start : start + batch_size]).to(model.device)
                model(model.modality.prepare(table))
    finally:
        handle.remove()
    held.settle(moments.mean.float(), moments.variance.float())


def second_class(logits: Tensor, labels: Tensor) -> Tensor:
    """The likeliest class other than the label: [B, K], int64 [B] -> int64 [B]."""
    return logits.scatter(1, labels[:, None], -torch.inf).argmax(1)


def unlikelihood(logits: Tensor, classes: Tensor) -> Tensor:
    """Mean of -log(1 - p) of one class of each sample: [B, K], int64 [B] -> scalar."""
    return -torch.log1p(1e-6 - logits.softmax(1).gather(1, classes[:, None])).mean()


def polarizing_loss(
    clean: Tensor, moved: Tensor, labels: Tensor, wanted: Tensor, weights: tuple[float, float, float, float]
) -> Tensor:
    """What the polarizer minimises: a scalar.

    Args:
        clean: logits [B, K] of clean samples.
        moved: logits [B, K] of perturbed ones.
        labels: y, int64 [B].
        wanted: y', what the perturbation aimed at, int64 [B].
        weights: l1 to l4.
    """
    terms = (
        F.cross_entropy(clean, labels),
        F.cross_entropy(moved, clean.argmax(1)),
        unlikelihood(moved, second_class(moved.detach(), labels)),
        unlikelihood(moved, wanted),
    )
    return torch.stack([weight * term for weight, term in zip(weights, terms, strict=True)]).sum()


class PolarizingStep(Descent[Classifier]):
    """Perturb the batch toward the second class, then a step of the polarizer."""

    def __init__(
        self, model: Classifier, recipe: Recipe, objective: Objective[Classifier], *, method: NeuralPolarizer
    ) -> None:
        """For a polarized classifier of which only the polarizer needs a gradient."""
        super().__init__(model, recipe, objective)
        assert isinstance(model, PolarizedClassifier)
        self.method, self.limits = method, valid_range(method.name, model)
        model.eval()

    def perturbed(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Prepared inputs close to the given ones, and the classes that they are to reach."""
        method, found = self.method, inputs
        norm = scaled_norm(method.norm, inputs[0])
        with frozen(self.model):
            with torch.no_grad():
                wanted = second_class(self.model(inputs), labels)
            for _ in range(method.steps):
                found = found.detach().requires_grad_()
                logits = self.model(found)
                (slope,) = torch.autograd.grad(F.cross_entropy(logits, wanted), found)
                enough = (logits.argmax(1) == wanted).float().mean() > method.enough
                delta = within_norm(found.detach() - method.step * slope.sign() - inputs, norm)
                found = torch.where(enough, found.detach(), shifted(inputs, delta, self.limits))
        return found, wanted

    def loss(self, batch: Batch) -> Tensor:
        """The polarizer's loss."""
        method, labels = self.method, batch.labels
        found, wanted = self.perturbed(batch.inputs, labels)
        with autocast(labels.device, self.recipe.precision):
            clean, moved = self.model(torch.cat([batch.inputs, found])).float().chunk(2)
        weights = (method.clean_weight, method.consistency, method.best_wrong, method.target_wrong)
        return polarizing_loss(clean, moved, labels, wanted, weights)


@defenses.register
@dataclass(frozen=True, kw_only=True)
class NeuralPolarizer(RepairDefense):
    """A trained linear layer in a frozen model."""

    name: ClassVar[str] = "npd"
    paper: ClassVar[str] = "Zhu et al., Neural Polarizer, NeurIPS 2023, arXiv 2306.16697"
    year: ClassVar[int] = 2023
    modalities: ClassVar[tuple[str, ...]] = ("image", "audio", "video")
    aliases: ClassVar[tuple[str, ...]] = ("neural_polarizer",)

    layer: str = param(
        "", "layer in front of which the polarizer goes, as in named_modules; none = chosen", source="ours"
    )
    epochs: int = param(50, "passes over the clean samples", low=1, source="BackdoorBench, CIFAR-10")
    lr: float = param(0.01, "peak learning rate of SGD", above=0, source="BackdoorBench")
    batch_size: int = param(
        128, "samples per step; at most an eighth of the samples, or 16", low=1, source="BackdoorBench, CIFAR-10"
    )
    weight_decay: float = param(5e-4, "L2 penalty on the polarizer", low=0, source="BackdoorBench")
    clip: float = param(1.0, "largest norm of the polarizer's gradient, 0 for none", low=0, source="ours")
    norm: float = param(
        3.0, "Euclidean bound of a perturbation of 3x32x32 values in [0, 1]", above=0, source="BackdoorBench, CIFAR-10"
    )
    steps: int = param(2, "of the perturbation per batch", low=1, source="BackdoorBench")
    step: float = param(0.1, "length of a step per value", above=0, source="BackdoorBench")
    enough: float = param(
        0.6,
        "share of a batch that reaches its class at which the perturbation ends",
        low=0,
        high=1,
        source="BackdoorBench",
    )
    clean_weight: float = param(1.0, "l1, weight of clean samples", low=0, source="BackdoorBench")
    consistency: float = param(0.4, "l2, weight of answering as to the clean sample", low=0, source="BackdoorBench")
    best_wrong: float = param(0.4, "l3, weight against the likeliest wrong class", low=0, source="BackdoorBench")
    target_wrong: float = param(0.4, "l4, weight against the class aimed at", low=0, source="BackdoorBench")

    def run(self, view: DefenderView, ctx: Context) -> Classifier:
        """Insert a polarizer into a copy and train it."""
        need_samples(self.name, "clean", view.clean)
        valid_range(self.name, view.model)
        call = find_layer(view.model, self.layer)
        repaired = PolarizedClassifier(copy.deepcopy(view.model), call.name).to(view.model.device).eval()
        settle(repaired, view.clean.inputs)
        ctx.reporter.note(f"npd: polarizer in front of {call.name}")
        trained = {id(p) for p in (*repaired.polarizer.mix.parameters(), *repaired.polarizer.norm.parameters())}
        for parameter in repaired.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        recipe = Recipe(
            epochs=self.epochs,
            batch_size=batch_for(self.batch_size, len(view.clean)),
            lr=self.lr,
            weight_decay=self.weight_decay,
            schedule="cosine",
            clip=self.clip,
            augment=False,
        )
        fit(
            repaired,
            view.clean,
            recipe,
            step=partial(PolarizingStep, method=self),
            chance=math.inf,
            context=ctx,
            label="npd: training the polarizer",
        )
        for parameter in repaired.parameters():
            parameter.requires_grad_(True)
        return repaired
