"""Image networks of our own: pre-activation ResNets (registered with timm too) and a three-block ConvNet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor, nn

from backdoorlab.modalities.base import Modality, expect_modality
from backdoorlab.modalities.image import ImageModality
from backdoorlab.models.classifier import ModelBuilder, models


class PreActBlock(nn.Module):
    """Pre-activation basic block: BN-ReLU-conv-BN-ReLU-conv plus shortcut (He et al., ECCV 2016)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or width_in != width:
            self.shortcut = nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] -> [B,width,H/stride,W/stride]; a changing shortcut starts after the first BN-ReLU."""
        out = F.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(out)
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        return out + skip


class PreActResNet(nn.Module):
    """Stem 3x3 without norm, four stages (strides 1, 2, 2, 2), perhaps a BN-ReLU, global average pooling, linear.

    He et al. end the last stage with a BN-ReLU; the network of the backdoor literature lacks it (``last_norm=False``).
    Without it nothing bounds the scale of the residual stream, and large learning rates make training diverge.
    """

    def __init__(
        self, blocks: tuple[int, ...], width: int, num_classes: int = 10, in_chans: int = 3, last_norm: bool = False
    ) -> None:
        super().__init__()
        self.num_classes, self.num_features = num_classes, width * 8
        self.conv1 = nn.Conv2d(in_chans, width, 3, padding=1, bias=False)
        current, stages = width, []
        for stage, depth in enumerate(blocks):
            out, layers = width * 2**stage, []
            for block in range(depth):
                layers.append(PreActBlock(current, out, stride=2 if stage and not block else 1))
                current = out
            stages.append(nn.Sequential(*layers))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.norm = nn.BatchNorm2d(current) if last_norm else None
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(current, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B,C,H,W] -> logits [B,K]."""
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        if self.norm is not None:
            x = F.relu(self.norm(x))
        logits: Tensor = self.linear(self.pool(x).flatten(1))
        return logits

    def get_classifier(self) -> nn.Module:
        """The last linear layer (timm's convention)."""
        return self.linear


def _own(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in kwargs.items() if k in ("num_classes", "in_chans")}


@register_model
def preact_resnet18(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """PreAct-ResNet18 of the backdoor literature: widths 64-512, two blocks a stage, no last norm, 11.2 M weights."""
    return PreActResNet((2, 2, 2, 2), 64, **_own(kwargs))


@register_model
def preact_resnet8(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """The narrow one for CPUs: widths 16-128, one block a stage, BN-ReLU before the pool."""
    return PreActResNet((1, 1, 1, 1), 16, last_norm=True, **_own(kwargs))


@register_model
def preact_resnet18_w16(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """The reference network at a quarter of its width (16-128), with a BN-ReLU before the pool."""
    return PreActResNet((2, 2, 2, 2), 16, last_norm=True, **_own(kwargs))


@register_model
def preact_resnet18_w32(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """The reference network at half its width (32-256), with a BN-ReLU before the pool."""
    return PreActResNet((2, 2, 2, 2), 32, last_norm=True, **_own(kwargs))


class ConvNet3(nn.Module):
    """Three conv-BN-ReLU blocks (16, 32, 64 channels), 2x2 max pooling after the first two, average pool, linear."""

    def __init__(self, num_classes: int = 10, in_chans: int = 1, width: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = (in_chans, width, 2 * width, 4 * width)
        for block in range(3):
            layers += [
                nn.Conv2d(channels[block], channels[block + 1], 3, padding=1, bias=False),
                nn.BatchNorm2d(channels[block + 1]),
                nn.ReLU(),
            ]
            if block < 2:
                layers.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B,C,H,W] -> logits [B,K]."""
        logits: Tensor = self.linear(self.pool(self.body(x)).flatten(1))
        return logits


class _Image(ModelBuilder):
    modalities = ("image",)

    network: ClassVar[Callable[..., nn.Module]]
    """Takes ``num_classes`` and ``in_chans``."""

    def build(self, modality: Modality, num_classes: int) -> nn.Module:
        """See :meth:`ModelBuilder.build`."""
        channels = expect_modality(modality, ImageModality).channels
        return type(self).network(num_classes=num_classes, in_chans=channels)


@models.register
class BuildPreActResNet18(_Image):
    """The reference network of the benchmark."""

    name = "preact_resnet18"
    summary = "PreAct-ResNet18, 11.2 M parameters: the reference network of the benchmark"
    network = preact_resnet18


@models.register
class BuildPreActResNet18W16(_Image):
    """The reference network, four times narrower."""

    name = "preact_resnet18_w16"
    summary = "PreAct-ResNet18 of widths 16-128, 0.70 M parameters; 1.7 times the cost of preact_resnet8"
    network = preact_resnet18_w16


@models.register
class BuildPreActResNet18W32(_Image):
    """The reference network, half as wide."""

    name = "preact_resnet18_w32"
    summary = "PreAct-ResNet18 of widths 32-256, 2.8 M parameters"
    network = preact_resnet18_w32


@models.register
class BuildPreActResNet8(_Image):
    """The CPU default for 32x32."""

    name = "preact_resnet8"
    summary = "PreAct-ResNet of widths 16-128 with one block a stage, 0.31 M parameters: default for 28 px and more"
    network = preact_resnet8


@models.register
class BuildConvNet3(_Image):
    """The default for digits."""

    name = "convnet3"
    summary = "three conv-BN-ReLU blocks, 24 k parameters: default below 28 px"
    network = ConvNet3
