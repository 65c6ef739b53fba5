"""Triggers: functions on raw samples with a state that can be stored and applied to new samples years later."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from backdoorlab.core.errors import ArtifactError, BackdoorLabError
from backdoorlab.data.split import Inputs, join, take

CPU_VALUES, DEVICE_VALUES = 1 << 20, 1 << 27
"""Raw values (pixels times channels) stamped at once: on a CPU float copies of so many stay in its cache, on other
devices one takes half a gigabyte."""


@dataclasses.dataclass(frozen=True, eq=False)
class Trigger(ABC):
    """A function on raw samples.

    Subclasses are frozen dataclasses whose fields are tensors (saved as safetensors) or JSON values (numbers, strings,
    tuples of them). A field that is a network is saved by overriding :meth:`state` and :meth:`from_state`.
    Calling a trigger never changes its input and returns the same shape and dtype.
    """

    kind: ClassVar[str]
    """Unique name under which the class is found again when a trigger is loaded, for example "image.patch"."""

    _kinds: ClassVar[dict[str, type[Trigger]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" not in cls.__dict__:
            return
        other = Trigger._kinds.get(cls.kind)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise BackdoorLabError(
                f"two triggers are of kind {cls.kind!r}: {other.__module__}.{other.__qualname__} and "
                f"{cls.__module__}.{cls.__qualname__}; a stored trigger could not be loaded as what it is"
            )
        Trigger._kinds[cls.kind] = cls

    @abstractmethod
    def __call__(
        self, inputs: Inputs, indices: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Inputs:
        """Stamp raw samples.

        Args:
            inputs: raw samples, N rows; left unchanged.
            indices: int64 [N], identity of each sample, for triggers that depend on it; None counts from 0.
            generator: for triggers that are random at test time; None means a seed stored in the trigger.

        Returns:
            Stamped samples of the same shape and dtype.

        Raises:
            InputError: if the samples do not fit (size, channels, dtype).
        """

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON-able settings from which :meth:`from_state` makes an equal trigger."""
        tensors, config = {}, {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                tensors[field.name] = value.detach().cpu().contiguous()
            else:
                config[field.name] = value
        return tensors, config

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], config: dict[str, Any]) -> Trigger:
        """Inverse of :meth:`state`; lists in the settings become tuples."""
        return cls(**tensors, **{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()})


def load_trigger(kind: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> Trigger:
    """Rebuild a stored trigger.

    Raises:
        ArtifactError: if no installed attack has triggers of that kind, or the record is incomplete.
    """
    from backdoorlab.attacks.base import attacks

    attacks.names()  # imports every attack, and with it its trigger class
    if kind not in Trigger._kinds:
        raise ArtifactError(f"no installed attack makes triggers of kind {kind!r}; known: {sorted(Trigger._kinds)}")
    try:
        return Trigger._kinds[kind].from_state(tensors, config)
    except (TypeError, KeyError, ValueError) as error:
        raise ArtifactError(f"trigger record of kind {kind!r} does not fit: {error}") from None


def stamp_all(
    trigger: Trigger, inputs: Inputs, *, device: torch.device | None = None, batch_size: int | None = None
) -> Inputs:
    """Stamp a whole set in batches on a device; rows keep their position as identity.

    Args:
        trigger: what to apply.
        inputs: raw samples, left unchanged.
        device: where to stamp; None for where the samples are.
        batch_size: samples per call; None for what suits the device, at most 4096.
    """
    if len(inputs) == 0:
        return inputs
    if batch_size is None:
        batch_size = 4096
        if isinstance(inputs, Tensor):
            room = CPU_VALUES if (device or inputs.device).type == "cpu" else DEVICE_VALUES
            batch_size = max(1, min(batch_size, room // max(1, inputs[0].numel())))
    parts: list[Inputs] = []
    for start in range(0, len(inputs), batch_size):
        rows = torch.arange(start, min(start + batch_size, len(inputs)))
        batch = take(inputs, rows)
        if isinstance(batch, Tensor) and device is not None:
            batch = batch.to(device)
        stamped = trigger(batch, rows)
        parts.append(stamped.cpu() if isinstance(stamped, Tensor) else stamped)
    return join(parts)
