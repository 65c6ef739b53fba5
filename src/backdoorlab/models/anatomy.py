"""How defenses read models: head, features, feature maps, maskable units and conv-norm pairs of *any* network.

Everything is found by watching one forward pass (hooks, data flow), never by the module names of one architecture. Two
facts make that reliable: a tensor that a later module receives *is* the object that an earlier one returned, and its
version counter shows whether an in-place operation has touched it in between.

A "unit" is one output of a convolution or linear layer or one channel of a normalisation layer; :func:`channels` lists
the groups of units (one group a layer) and :func:`masked` runs the model with all of them scaled, differentiably:

    groups = channels(model, kinds=("batchnorm",))
    m = torch.ones(unit_count(groups), requires_grad=True)      # one flat vector over all groups
    with masked(groups, m):
        loss = objective(model(inputs))
    loss.backward()                                             # m.grad
    for group, mine in zip(groups, split_units(m, groups)):
        group.zero(mine <= 0.2)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from backdoorlab.core.errors import InputError, NotApplicable
from backdoorlab.data.split import Inputs
from backdoorlab.models.classifier import Classifier

KINDS = ("conv", "linear", "batchnorm", "layernorm", "groupnorm")
"""Kinds of layers that have maskable units."""


@dataclass(frozen=True, eq=False)
class Call:
    """One execution of one module.

    Attributes:
        name: of the module, as in ``named_modules``.
        module: the module.
        input: first tensor that it received, or None.
        output: first tensor that it returned, or None.
        input_version: version counter of ``input`` on entry.
        output_version: version counter of ``output`` on return.
    """

    name: str
    module: nn.Module
    input: Tensor | None
    output: Tensor | None
    input_version: int
    output_version: int

    def feeds(self, later: Call) -> bool:
        """Is this output, unchanged, what ``later`` received?"""
        return self.output is not None and later.input is self.output and later.input_version == self.output_version


def example_input(model: Classifier, batch: int = 2) -> Tensor:
    """Prepared input of the model's modality (silence, black images, ...) on the model's device, ``batch`` rows."""
    modality = model.modality
    return modality.prepare(modality.encode(modality.example(batch)).to(model.device))


def trace(model: Classifier, example: Tensor | None = None) -> list[Call]:
    """All module executions of one forward pass in evaluation mode, in the order in which they returned."""
    example = example_input(model) if example is None else example
    calls: list[Call] = []
    entries: dict[int, list[tuple[Tensor | None, int]]] = {}

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        received = _first_tensor((args, list(kwargs.values())))
        entries.setdefault(id(module), []).append((received, -1 if received is None else received._version))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        received, version = entries[id(module)].pop()
        returned = _first_tensor(output)
        calls.append(
            Call(names[module], module, received, returned, version, -1 if returned is None else returned._version)
        )

    names = {module: name for name, module in model.named_modules() if module is not model}
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for module in names:
            for handle in (
                module.register_forward_pre_hook(enter, with_kwargs=True),
                module.register_forward_hook(leave),
            ):
                stack.callback(handle.remove)
        model(example.clone() if example.is_inference() else example)
    return calls


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    items: Any = ()
    if isinstance(value, (tuple, list)):
        items = value
    elif isinstance(value, dict):  # also the output objects of transformers
        items = value.values()
    return next((tensor for item in items if (tensor := _first_tensor(item)) is not None), None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; every module gets its former mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients for parameters inside the block (optimise inputs, triggers, prompts)."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    with evaluating(model):
        for p in trainable:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in trainable:
                p.requires_grad_(True)


def features_and_logits(model: Classifier, x: Tensor) -> tuple[Tensor, Tensor]:
    """Penultimate features [B, D] and logits [B, K] of prepared input, in one forward pass (gradients flow).

    Raises:
        NotApplicable: if no linear layer yields the logits.
    """
    _, head_input, logits = _run_to_head(model, x)
    return head_input.flatten(1), logits


def features(model: Classifier, x: Tensor) -> Tensor:
    """Penultimate features, the input of :func:`head`: [B, D]."""
    return features_and_logits(model, x)[0]


def head(model: Classifier, example: Tensor | None = None) -> nn.Linear:
    """The linear layer that yields the logits.

    Raises:
        NotApplicable: if there is none.
    """
    with evaluating(model), torch.no_grad():
        return _run_to_head(model, example_input(model) if example is None else example)[0]


def _run_to_head(model: Classifier, x: Tensor) -> tuple[nn.Linear, Tensor, Tensor]:
    """(last linear layer that returned [B, K], what it received, logits)."""
    last: list[tuple[nn.Linear, Tensor]] = []

    def watch(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if isinstance(module, nn.Linear) and output.dim() == 2 and output.shape == (len(x), model.num_classes):
            last[:] = [(module, args[0])]

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                stack.callback(module.register_forward_hook(watch).remove)
        logits = model(x)
    if not last:
        raise NotApplicable(f"{model.arch}: no linear layer yields the logits, so it has no penultimate features")
    return *last[0], logits


def spatial_layers(model: Classifier, example: Tensor | None = None) -> list[tuple[str, nn.Module]]:
    """Modules that return convolutional feature maps [B, C, *extent] with an extent above 1, in execution order.

    Of modules that return the very same tensor (a container and its last layer, an in-place activation) only the
    outermost is listed. Token sequences and channels-last maps inside transformer-like blocks do not count.
    """
    calls = trace(model, example)
    convs = [c for c in calls if isinstance(c.module, _ConvNd) and c.output is not None]
    if not convs:
        return []
    dims = {c.output.dim() for c in convs if c.output is not None}
    # A module's second axis holds channels if some convolution or batch norm of that width exists.
    widths: set[int] = set()
    for call in calls:
        if isinstance(call.module, _ConvNd):
            widths |= {call.module.in_channels, call.module.out_channels}
        elif isinstance(call.module, _BatchNorm):
            widths.add(call.module.num_features)
    layers: dict[int, tuple[str, nn.Module]] = {}
    for call in calls[calls.index(convs[0]) :]:
        out = call.output
        if out is None or out.dim() not in dims or out.shape[1] not in widths or out.shape[2:].numel() < 2:
            continue
        if isinstance(call.module, (nn.Linear, nn.Identity)):
            continue
        if _kind(call.module) == "layernorm" and _axis(call) != 1:
            continue
        layers.pop(id(out), None)
        layers[id(out)] = (call.name, call.module)
    return list(layers.values())


@dataclass(frozen=True, eq=False)
class Channels:
    """The units of one layer.

    Attributes:
        name: of the layer.
        module: the layer.
        kind: one of :data:`KINDS`.
        count: number of units U.
        axis: axis of the layer's output along which its units lie.
    """

    name: str
    module: nn.Module
    kind: str
    count: int
    axis: int

    @property
    def weight(self) -> Tensor:
        """Weight with the units along its first axis (a view): [U, ...]."""
        return _weight(self.module).transpose(0, self._weight_axis)

    @property
    def bias(self) -> Tensor | None:
        """Bias [U], or None."""
        return self.module._parameters.get("bias")

    @property
    def _weight_axis(self) -> int:
        return 1 if isinstance(self.module, nn.modules.conv._ConvTransposeNd) else 0

    @contextmanager
    def mask(self, m: Tensor, bias: Tensor | None = None) -> Iterator[None]:
        """Inside the block, unit u has its weight scaled by ``m[u]`` and its bias by ``bias[u]`` (default ``m[u]``).

        For convolutions, linear layers and norms this scales the unit's output. Differentiable in ``m``, ``bias`` and
        the layer's own parameters; a backward pass may come after the block.
        """
        if m.shape != (self.count,):
            raise InputError(f"{self.name} has {self.count} units, got a mask of shape {tuple(m.shape)}")
        parameters = dict(self.module._parameters)
        unit_weight, unit_bias = self.weight, self.bias
        scaled = unit_weight * m.reshape(-1, *(1,) * (unit_weight.dim() - 1))
        # As nn.Module itself does in functional_call: plain tensors stand in for the parameters.
        self.module._parameters["weight"] = cast(nn.Parameter, scaled.transpose(0, self._weight_axis))
        if unit_bias is not None:
            self.module._parameters["bias"] = cast(nn.Parameter, unit_bias * (m if bias is None else bias))
        try:
            yield
        finally:
            self.module._parameters.update(parameters)

    @torch.no_grad()
    def scale(self, units: Tensor | int, factor: Tensor | float) -> None:
        """Scale weight and bias of some units in place; ``units`` is an index, int64 [M] or bool [U]."""
        weight, bias = self.weight, self.bias
        rows = torch.arange(self.count, device=weight.device)
        rows = rows[units.to(weight.device) if isinstance(units, Tensor) else units].reshape(-1)
        factors = torch.as_tensor(factor, dtype=weight.dtype, device=weight.device).expand(len(rows))
        weight[rows] = weight[rows] * factors.reshape(-1, *(1,) * (weight.dim() - 1))
        if bias is not None:
            bias[rows] = bias[rows] * factors

    def zero(self, units: Tensor | int) -> None:
        """Silence some units in place: weight *and* bias become 0."""
        self.scale(units, 0.0)

    def units_last(self, output: Tensor) -> Tensor:
        """The layer's output as [..., U]."""
        return output.movedim(self.axis, -1)


def channels(
    model: Classifier, example: Tensor | None = None, kinds: Sequence[str] = KINDS, with_head: bool = False
) -> list[Channels]:
    """Groups of maskable units, one for each executed layer, in execution order.

    Args:
        model: any classifier.
        example: prepared input to watch; made from the modality if not given.
        kinds: which of :data:`KINDS` to list.
        with_head: whether the layer that yields the logits is listed too.
    """
    unknown = set(kinds) - set(KINDS)
    if unknown:
        raise InputError(f"unknown kinds of units {sorted(unknown)}; choose among {', '.join(KINDS)}")
    calls = trace(model, example)
    last = next(
        (
            c.module
            for c in reversed(calls)
            if isinstance(c.module, nn.Linear) and c.output is not None and c.output.shape[1:] == (model.num_classes,)
        ),
        None,
    )
    groups: dict[int, Channels] = {}
    for call in calls:
        kind, weight = _kind(call.module), call.module._parameters.get("weight")
        if kind not in kinds or weight is None or (call.module is last and not with_head):
            continue
        if id(call.module) not in groups:
            groups[id(call.module)] = Channels(call.name, call.module, kind, _unit_count(call.module), _axis(call))
    return list(groups.values())


def _kind(module: nn.Module) -> str:
    """Kind of a layer, or "" for layers without units (grouped transposed convolutions and joint norms included)."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return "conv" if module.groups == 1 else ""
    if isinstance(module, nn.LayerNorm):
        return "layernorm" if len(module.normalized_shape) == 1 else ""
    types = {"conv": _ConvNd, "linear": nn.Linear, "batchnorm": _BatchNorm, "groupnorm": nn.GroupNorm}
    return next((kind for kind, cls in types.items() if isinstance(module, cls)), "")


def _weight(module: nn.Module) -> Tensor:
    weight = module._parameters["weight"]
    if weight is None:
        raise InputError(f"a {type(module).__name__} without weight has no units")
    return weight


def _unit_count(module: nn.Module) -> int:
    return int(_weight(module).shape[1 if isinstance(module, nn.modules.conv._ConvTransposeNd) else 0])


def _axis(call: Call) -> int:
    kind, out = _kind(call.module), call.output
    if kind == "layernorm" and type(call.module) is not nn.LayerNorm and out is not None and out.dim() > 2:
        # A subclass may normalise the channels of [B, C, H, W] maps.
        return 1 if out.shape[1] == _unit_count(call.module) else -1
    return -1 if kind in ("linear", "layernorm") else 1


def unit_count(groups: Sequence[Channels]) -> int:
    """Number of units in all groups."""
    return sum(g.count for g in groups)


def split_units(flat: Tensor, groups: Sequence[Channels]) -> tuple[Tensor, ...]:
    """One vector over all units -> one vector per group."""
    return flat.split([g.count for g in groups])


@contextmanager
def masked(groups: Sequence[Channels], m: Tensor, bias: Tensor | None = None) -> Iterator[None]:
    """:meth:`Channels.mask` for many groups at once.

    Args:
        groups: of one model.
        m: [unit_count(groups)], factors of the weights.
        bias: likewise for the biases; by default ``m``.
    """
    if m.shape != (unit_count(groups),):
        raise InputError(f"{unit_count(groups)} units need a mask of that length, got shape {tuple(m.shape)}")
    parts = split_units(m, groups)
    biases: Sequence[Tensor | None] = [None] * len(groups) if bias is None else split_units(bias, groups)
    with ExitStack() as stack:
        for group, part, group_bias in zip(groups, parts, biases, strict=True):
            stack.enter_context(group.mask(part, group_bias))
        yield


def conv_norm_pairs(model: Classifier, example: Tensor | None = None) -> list[tuple[_ConvNd, _BatchNorm]]:
    """Convolutions with the batch norm that receives exactly their output, by data flow, in execution order.

    A sum, a concatenation or an activation in between (also an in-place one) breaks the pair: in pre-activation blocks
    conv1 -> bn2 is one and bn1 has none.
    """
    calls = trace(model, example)
    convs = {id(c.output): (c, c.module) for c in calls if isinstance(c.module, _ConvNd)}
    pairs: dict[int, tuple[_ConvNd, _BatchNorm]] = {}
    for call in calls:
        source, conv = convs.get(id(call.input), (None, None))
        if isinstance(call.module, _BatchNorm) and source is not None and conv is not None and source.feeds(call):
            pairs[id(call.module)] = (conv, call.module)
    return list(pairs.values())


@torch.no_grad()
def reestimate_batchnorm(model: Classifier, inputs: Inputs, batch_size: int = 256) -> None:
    """Forget the running statistics of all batch norms and average them anew over raw samples, in place.

    Everything else stays in evaluation mode (no dropout); without batch norms nothing happens.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [n.momentum for n in norms]
    with evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative average
            norm.train()
        for start in range(0, len(inputs) if norms else 0, batch_size):
            batch = model.modality.encode(inputs[start : start + batch_size]).to(model.device)
            model(model.modality.prepare(batch))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
