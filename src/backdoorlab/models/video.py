"""Video networks on clips float [B,C,T,H,W]: a small 3-D ConvNet and torchvision's R3D-18."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from backdoorlab.modalities.base import Modality, expect_modality
from backdoorlab.modalities.video import VideoModality
from backdoorlab.models.classifier import ModelBuilder, models


class ConvNet3D(nn.Module):
    """Three conv-BN-ReLU blocks (16, 32, 64 channels, 3x3x3), max pooling after the first two, average pool, linear.

    The first convolution has a spatial stride of 2 and the first pooling leaves time alone, so that motion survives
    until there are channels to hold it.
    """

    def __init__(self, in_chans: int, num_classes: int, width: int = 16) -> None:
        super().__init__()
        channels = (in_chans, width, 2 * width, 4 * width)
        layers: list[nn.Module] = []
        for block in range(3):
            stride = (1, 2, 2) if block == 0 else 1
            layers += [
                nn.Conv3d(channels[block], channels[block + 1], 3, stride, padding=1, bias=False),
                nn.BatchNorm3d(channels[block + 1]),
                nn.ReLU(),
            ]
            if block < 2:
                layers.append(nn.MaxPool3d((1, 2, 2) if block == 0 else 2))
        self.body = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool3d(1)
        self.linear = nn.Linear(channels[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Clips [B,C,T,H,W] -> logits [B,K]."""
        logits: Tensor = self.linear(self.pool(self.body(x)).flatten(1))
        return logits


def r3d_18(in_chans: int, num_classes: int) -> nn.Module:
    """R3D-18 of torchvision (Tran et al., CVPR 2018) from random weights, with a stem for ``in_chans`` channels."""
    from torchvision.models.video import r3d_18 as make

    net: nn.Module = make(weights=None, num_classes=num_classes)
    if in_chans != 3:
        stem: Any = net.stem
        stem[0] = nn.Conv3d(in_chans, 64, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False)
    return net


class _Video(ModelBuilder):
    modalities = ("video",)


def _channels(modality: Modality) -> int:
    return expect_modality(modality, VideoModality).channels


@models.register
class BuildConvNet3D(_Video):
    """The default for videos."""

    name = "cnn3d_small"
    summary = "three 3-D conv-BN-ReLU blocks, 70 k parameters: default for videos"

    def build(self, modality: Modality, num_classes: int) -> nn.Module:
        """See :meth:`ModelBuilder.build`."""
        return ConvNet3D(_channels(modality), num_classes)


@models.register
class BuildR3D18(_Video):
    """The reference network of the literature."""

    name = "r3d_18"
    summary = "R3D-18 from random weights, 33 M parameters"

    def build(self, modality: Modality, num_classes: int) -> nn.Module:
        """See :meth:`ModelBuilder.build`."""
        return r3d_18(_channels(modality), num_classes)
