"""The last feature maps of a network, and how one of their channels is silenced for good, for any architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from backdoorlab.core.errors import NotApplicable
from backdoorlab.models.anatomy import (
    Channels,
    channels,
    conv_norm_pairs,
    evaluating,
    example_input,
    features,
    head,
    spatial_layers,
    trace,
)
from backdoorlab.models.classifier import Classifier


@dataclass(frozen=True, eq=False)
class LastMaps:
    """Where the last maps of a network are read, and what silences their channels.

    Attributes:
        name: of the module whose output they are.
        module: the module.
        count: number of channels C.
        axis: of the channels in the output, which has a batch axis first and at least one axis of positions.
        silence: called with bool [C]; sets weights to zero in place so that these channels have no effect.
    """

    name: str
    module: nn.Module
    count: int
    axis: int
    silence: Callable[[Tensor], None]

    def of(self, model: Classifier, inputs: Tensor) -> Tensor:
        """Maps float32 [B, P, C] of prepared inputs, after a ReLU; gradients flow."""
        seen: list[Tensor] = []
        handle = self.module.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            model(inputs)
        finally:
            handle.remove()
        maps = seen[-1].movedim(self.axis, -1)
        return maps.reshape(len(maps), -1, self.count).relu().float()

    @contextmanager
    def scaled(self, factors: Tensor) -> Iterator[None]:
        """Inside the block the channels are multiplied by ``factors`` [C]; 0 has the effect of :attr:`silence`."""

        def edit(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return (output.movedim(self.axis, -1) * factors.to(output)).movedim(-1, self.axis)

        handle = self.module.register_forward_hook(edit)
        try:
            yield
        finally:
            handle.remove()


def last_maps(model: Classifier) -> LastMaps:
    """The last feature maps of a network.

    If the features that the last linear layer receives keep the channels of the maps apart, as behind a pooling or a
    flattening, a channel is silenced by zeros in that layer, which takes away all that the channel does, shortcuts
    included. Otherwise the maps are the hidden units over the tokens of the last linear layer that feeds an activation
    (transformers), or else those of the last convolution with its batch norm; there the layer's own weights become 0.

    Raises:
        NotApplicable: if the network has no such layer.
    """
    layers = spatial_layers(model)
    found = _before_the_head(model, *layers[-1]) if layers else None
    found = found or _hidden_tokens(model) or _last_convolution(model)
    if found is None:
        raise NotApplicable(f"{model.arch}: no feature maps over positions, the last of which could be pruned")
    return found


@torch.no_grad()
def _before_the_head(model: Classifier, name: str, module: nn.Module) -> LastMaps | None:
    """The maps that a module returns, if the columns of the head can be told apart by their channels."""
    last, x = head(model), example_input(model)
    seen: list[Tensor] = []
    keep: list[Tensor] = []

    def edit(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        # Made-up maps: silence and black pictures leave many channels at 0.
        maps = 1 + torch.arange(output.numel(), device=output.device).reshape(output.shape) % 7 / 7
        seen.append(output)
        shape = (1, -1, *(1,) * (output.dim() - 2))
        return maps.to(output.dtype) * keep[0].reshape(shape).to(output)

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.callback(module.register_forward_hook(edit).remove)
        keep[:] = [torch.ones(1)]
        whole = features(model, x)
        count = seen[0].shape[1]
        if whole.shape[1] % count:
            return None
        half = torch.arange(count) % 2 == 0
        keep[:] = [half.float()]
        part = features(model, x)
    repeats = whole.shape[1] // count
    columns = half.repeat_interleave(repeats).to(part.device)
    if not torch.allclose(part[:, columns], whole[:, columns]) or bool((part[:, ~columns] != 0).any()):
        return None

    def silence(units: Tensor) -> None:
        with torch.no_grad():
            last.weight[:, units.repeat_interleave(repeats).to(last.weight.device)] = 0

    return LastMaps(name, module, count, 1, silence)


def _last_convolution(model: Classifier) -> LastMaps | None:
    norms = {id(conv): norm for conv, norm in conv_norm_pairs(model)}
    groups = {id(group.module): group for group in channels(model)}
    for call in reversed(trace(model)):
        group = groups.get(id(call.module))
        if group is None or group.kind != "conv" or call.output is None or call.output.shape[2:].numel() < 2:
            continue
        norm = groups.get(id(norms.get(id(group.module))))
        shown: Channels = norm or group

        def silence(units: Tensor, parts: tuple[Channels | None, ...] = (group, norm)) -> None:
            for part in parts:
                if part is not None:
                    part.zero(units)

        return LastMaps(shown.name, shown.module, shown.count, shown.axis, silence)
    return None


def _hidden_tokens(model: Classifier) -> LastMaps | None:
    calls = trace(model)
    plain = [c for c in calls if not isinstance(c.module, (nn.Dropout, nn.Identity)) and not [*c.module.parameters()]]
    groups = {id(group.module): group for group in channels(model, kinds=("linear",))}
    for call in reversed(calls):
        group, output = groups.get(id(call.module)), cast(Tensor, call.output)
        if group is not None and output.dim() == 3 and any(call.feeds(later) for later in plain):
            return LastMaps(group.name, group.module, group.count, -1, group.zero)
    return None
