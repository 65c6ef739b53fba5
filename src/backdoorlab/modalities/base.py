"""The contract that lets one defense serve images, text, audio and video."""

from __future__ import annotations

import dataclasses
import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from backdoorlab.core.errors import ArtifactError, InputError, unknown
from backdoorlab.data.split import Dataset, Inputs


@dataclass(frozen=True)
class Modality(ABC):
    """What a modality-agnostic method may know about samples; subclasses are frozen dataclasses of JSON-able fields.

    Raw inputs are what is stored or delivered (:data:`backdoorlab.data.split.Inputs`). ``encode`` turns raw inputs
    into one tensor that can live on the device for the whole training (images: the uint8 tensor itself; text: token
    ids). ``prepare`` turns a batch of raw *or* encoded inputs into model input.
    """

    name: ClassVar[str]
    continuous: ClassVar[bool]
    """May a trigger be optimised by gradient in the space of prepared inputs? (text: no, use the embedding)"""

    @abstractmethod
    def encode(self, inputs: Inputs) -> Tensor:
        """Raw samples as one tensor, N rows; a no-op for tensors."""

    @abstractmethod
    def prepare(self, inputs: Inputs, *, train: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """A batch of raw or encoded samples as model input, on the device of the batch; augmented if ``train``."""

    @abstractmethod
    def blend(self, a: Inputs, b: Inputs, ratio: float, generator: torch.Generator | None = None) -> Inputs:
        """Superimpose raw samples row by row: ``ratio`` of b over a (text: words of b replace a share of a's)."""

    @abstractmethod
    def perturb(self, inputs: Inputs, strength: float, generator: torch.Generator | None = None) -> Inputs:
        """Natural corruption of raw samples; ``strength`` from 0 (none) to 1 (severe)."""

    @abstractmethod
    def example(self, count: int) -> Inputs:
        """``count`` raw samples without content (black, silent, one word), with which models are traced."""

    def config(self) -> dict[str, Any]:
        """JSON-able settings (the dataclass fields) from which :func:`modality_from_config` makes an equal object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Inverse of :meth:`config`; lists, as JSON has them, become tuples."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()})

    @classmethod
    @abstractmethod
    def from_dataset(cls, dataset: Dataset) -> Modality:
        """The settings that suit a data set (size, normalisation, vocabulary, sample rate)."""


_HOMES = {
    "image": ("backdoorlab.modalities.image", "ImageModality"),
    "text": ("backdoorlab.modalities.text", "TextModality"),
    "audio": ("backdoorlab.modalities.audio", "AudioModality"),
    "video": ("backdoorlab.modalities.video", "VideoModality"),
}


def _find(name: str) -> type[Modality]:
    if name not in _HOMES:
        raise unknown("modality", name, _HOMES)
    module, cls = _HOMES[name]
    modality_class: type[Modality] = getattr(importlib.import_module(module), cls)
    return modality_class


_Kind = TypeVar("_Kind", bound=Modality)


def expect_modality(modality: Modality, kind: type[_Kind]) -> _Kind:
    """The modality itself, for code that serves one kind only.

    Raises:
        InputError: if it is of another kind.
    """
    if not isinstance(modality, kind):
        raise InputError(f"expected {kind.name} data, got {modality.name} data")
    return modality


def modality_of(dataset: Dataset) -> Modality:
    """The modality object for a data set."""
    return _find(dataset.modality).from_dataset(dataset)


def modality_from_config(config: dict[str, Any]) -> Modality:
    """Rebuild a modality from ``{"name": ..., **config}`` as stored beside a model.

    Raises:
        ArtifactError: if the record has no name or lacks settings.
    """
    if "name" not in config:
        raise ArtifactError("a modality record needs a 'name'")
    try:
        return _find(config["name"]).from_config({k: v for k, v in config.items() if k != "name"})
    except (TypeError, KeyError) as error:
        raise ArtifactError(f"modality record of kind {config['name']!r} is incomplete: {error}") from None
