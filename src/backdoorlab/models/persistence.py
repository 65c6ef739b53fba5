"""How models are stored: each class of models writes and reads itself, so that nothing else needs to know them.

A method that inserts layers, stamps inputs or adds adapters returns a model of another class, with its own
``kind``, ``record`` and ``from_record``; whoever loads the artifact gets the same thing back.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from backdoorlab.core.errors import ArtifactError, BackdoorLabError, nearest
from backdoorlab.modalities.base import Modality

State = tuple[dict[str, dict[str, Tensor]], dict[str, Any]]
"""Tensors by file name, and a JSON-able record."""


class StoredModel(nn.Module):
    """A network that can be stored under a ``kind`` and rebuilt from what was stored."""

    modality: Modality
    """How raw samples become its input."""
    kind: ClassVar[str]
    """Unique name under which the class is found again, for example "classifier"."""

    _kinds: ClassVar[dict[str, type[StoredModel]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" not in cls.__dict__:
            return
        other = StoredModel._kinds.get(cls.kind)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise BackdoorLabError(
                f"two classes store models of kind {cls.kind!r}: {other.__module__} and {cls.__module__}"
            )
        StoredModel._kinds[cls.kind] = cls

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return next(self.parameters()).device

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """JSON-able settings from which :meth:`from_record` builds an equal network, up to its weights."""

    @classmethod
    @abstractmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """A network with other weights, of the architecture that a record describes.

        Raises:
            ArtifactError: if the record is incomplete.
        """

    def state(self) -> State:
        """What is stored: tensors by file name, and a record that names the kind."""
        record = json.loads(json.dumps({"kind": self.kind, **self.record()}, allow_nan=False))
        return {"model": dict(self.state_dict())}, record


def restore_model(state: State, device: torch.device | str = "cpu") -> StoredModel:
    """Inverse of :meth:`StoredModel.state`: the model in evaluation mode, on a device.

    Raises:
        ArtifactError: for an unknown kind, an incomplete record, or weights that do not fit.
    """
    tensors, record = state
    kind = record.get("kind")
    cls = StoredModel._kinds.get(str(kind))
    if cls is None:
        known = ", ".join(sorted(StoredModel._kinds))
        raise ArtifactError(f"unknown kind of model {kind!r}.{nearest(str(kind), StoredModel._kinds)} Known: {known}")
    try:
        model = cls.from_record(record)
        model.load_state_dict(tensors["model"])
    except KeyError as error:
        raise ArtifactError(f"the record of a {kind} lacks {error}") from None
    except (TypeError, AttributeError) as error:
        raise ArtifactError(f"the record of a {kind} has a value of the wrong kind: {error}") from None
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ArtifactError(f"weights do not fit {record.get('arch', kind)}: {reason}") from None
    return model.eval().to(device)
