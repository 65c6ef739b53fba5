"""The wrapper of every classifier of the library, and the one function that builds them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from backdoorlab.core.errors import InputError, nearest
from backdoorlab.core.registry import Registry
from backdoorlab.core.seeding import derive_seed, isolated_rng
from backdoorlab.modalities.base import Modality, modality_from_config
from backdoorlab.models.passes import count
from backdoorlab.models.persistence import StoredModel


class Classifier(StoredModel):
    """A network together with the modality that feeds it, so that a checkpoint needs nothing else.

    ``forward`` takes *prepared* input (``modality.prepare``) and returns logits float [B, K]. Image and video input is
    in [0, 1]; normalisation is the first thing that happens inside.

    Attributes:
        net: the bare network.
        modality: how raw samples become input.
        arch: name by which :func:`build_model` made ``net``.
        num_classes: K.
        title: what tables call it, such as the defense that it came from; not stored.
    """

    kind: ClassVar[str] = "classifier"

    title: str = ""
    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, modality: Modality, arch: str, num_classes: int) -> None:
        super().__init__()
        self.net, self.modality, self.arch, self.num_classes = net, modality, arch, num_classes
        mean, std = getattr(modality, "mean", ()), getattr(modality, "std", ())
        self.normalises = bool(mean) and (any(mean) or any(s != 1 for s in std))
        if self.normalises:
            shape = (-1, *(1,) * 2) if modality.name == "image" else (-1, *(1,) * 3)
            self.register_buffer("mean", torch.tensor(mean).reshape(shape), persistent=False)
            self.register_buffer("std", torch.tensor(std).reshape(shape), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits float [B, K] of prepared input."""
        if self.normalises:
            inputs = (inputs - self.mean) / self.std
        logits: Tensor = self.net(inputs)
        count(logits)
        return logits

    def record(self) -> dict[str, Any]:
        """See :meth:`StoredModel.record`."""
        modality = {"name": self.modality.name, **self.modality.config()}
        return {"arch": self.arch, "num_classes": self.num_classes, "modality": modality}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Classifier:
        """See :meth:`StoredModel.from_record`; a class of its own overrides it."""
        return build_model(record["arch"], modality_from_config(record["modality"]), record["num_classes"])


class ModelBuilder(ABC):
    """One architecture of our own (timm's are reached without one)."""

    name: ClassVar[str]
    modalities: ClassVar[tuple[str, ...]]
    summary: ClassVar[str]
    argument: str = ""
    """What follows the colon in the user's name, for builders whose name ends in ":"."""

    def adapt(self, modality: Modality) -> Modality:
        """The modality as this architecture needs it (a pre-trained one brings its tokenizer); must be idempotent."""
        return modality

    @abstractmethod
    def build(self, modality: Modality, num_classes: int) -> nn.Module:
        """The bare network, freshly initialised from torch's (already seeded) global generator."""


models: Registry[ModelBuilder] = Registry("model", ("backdoorlab.models",), "backdoorlab.models")

_DEFAULTS = {"text": "textcnn", "audio": "audio_cnn", "video": "cnn3d_small"}


def default_model(modality: Modality) -> str:
    """The architecture that a CPU trains well on such data."""
    if modality.name == "image":
        small = min(getattr(modality, "height", 32), getattr(modality, "width", 32)) < 28
        return "convnet3" if small else "preact_resnet8"
    return _DEFAULTS[modality.name]


def build_model(name: str, modality: Modality, num_classes: int, seed: int = 0) -> Classifier:
    """Build a classifier with random weights.

    Args:
        name: "auto", one of ``backdoorlab list models``, any timm name for images, or ``hf:FOLDER`` for text.
        modality: what it will be fed.
        num_classes: K.
        seed: of the initial weights.

    Raises:
        InputError: for a name that no builder knows.
    """
    name = default_model(modality) if name == "auto" else name
    builder = _find_builder(name, modality)
    modality = modality if builder is None else builder.adapt(modality)
    with isolated_rng(derive_seed(seed, "init", name)):
        net = _build_net(name, modality, num_classes) if builder is None else builder.build(modality, num_classes)
    wrapped = Classifier(net, modality, name, num_classes)
    return wrapped.to(memory_format=torch.channels_last) if modality.name == "image" else wrapped


def _find_builder(name: str, modality: Modality) -> ModelBuilder | None:
    head, colon, argument = name.partition(":")
    if head + colon not in models.names(modality.name):
        return None
    builder = models.get(head + colon, modality.name)()
    builder.argument = argument
    return builder


def _build_net(name: str, modality: Modality, num_classes: int) -> nn.Module:
    if modality.name == "image":
        import timm

        if timm.is_model(name):
            try:
                settings: dict[str, Any] = {"in_chans": getattr(modality, "channels", 3), **_image_size(name, modality)}
                net: nn.Module = timm.create_model(name, num_classes=num_classes, **settings)
            except Exception as error:
                raise InputError(f"timm cannot build {name!r} for this data: {error}") from error
            return net
        choices = [*models.names("image"), *timm.list_models()]
        raise InputError(
            f"unknown image model {name!r}.{nearest(name, choices)} See `backdoorlab list models` and timm's list."
        )
    models.get(name, modality.name)
    raise InputError(f"unknown model {name!r} for {modality.name}")


def _image_size(name: str, modality: Modality) -> dict[str, int | tuple[int, int]]:
    """Transformers are built for the data's size (patch embedding), convolutional nets take any."""
    import timm

    fixed = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if fixed is None or not fixed.fixed_input_size:
        return {}
    size = (getattr(modality, "height", 224), getattr(modality, "width", 224))
    return {"img_size": size}
