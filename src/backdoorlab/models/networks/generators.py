"""Generators of sample-specific triggers and masks."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _block(in_channels: int, out_channels: int, relu: bool = True) -> list[nn.Module]:
    layers = [nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels, momentum=0.05)]
    return [*layers, nn.ReLU()] if relu else layers


class DetailNet(nn.Module):
    """Encoder and decoder with max pooling and bilinear upsampling, back to any size: out in (0, 1).

    Two 3x3 blocks per stage; widths double from 32 over three stages, or from 16 over two below 32 px.
    """

    def __init__(self, channels: int, out_channels: int, height: int, width: int) -> None:
        super().__init__()
        widths = (32, 64, 128) if min(height, width) >= 32 else (16, 32)
        down, up, current = [], [], channels
        for wide in widths:
            down.append(nn.Sequential(*_block(current, wide), *_block(wide, wide)))
            current = wide
        self.middle = nn.Sequential(*_block(current, current))
        for wide in (*reversed(widths[:-1]), out_channels):
            up.append(nn.Sequential(*_block(current, current), *_block(current, wide, relu=wide != out_channels)))
            current = wide
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,H,W] in [0, 1] -> [N,out_channels,H,W] in (0, 1)."""
        sizes = []
        for stage in self.down:
            x = stage(x)
            sizes.append(x.shape[2:])
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for stage, size in zip(self.up, reversed(sizes), strict=True):
            x = stage(F.interpolate(x, size, mode="bilinear", align_corners=False))
        return torch.tanh(x) / 2 + 0.5


class StrideNet(nn.Module):
    """Auto-encoder of strided 4x4 convolutions (16, 32, 64, 128 channels) and their transposes: out in (-1, 1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = (channels, 16, 32, 64, 128)
        pairs = list(pairwise(widths))
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(narrow, wide, 4, 2, 1), nn.BatchNorm2d(wide), nn.ReLU()) for narrow, wide in pairs
        )
        self.up = nn.ModuleList(nn.ConvTranspose2d(wide, narrow, 4, 2, 1) for narrow, wide in reversed(pairs))
        self.norms = nn.ModuleList(nn.BatchNorm2d(narrow) for narrow, _ in reversed(pairs[1:]))

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,H,W] in [0, 1] -> [N,C,H,W] in (-1, 1); sides of at least 16, odd ones too."""
        sizes = []
        for stage in self.down:
            sizes.append(list(x.shape[2:]))
            x = stage(x)
        for place, up in enumerate(self.up):
            x = up(x, output_size=sizes.pop())
            if place < len(self.norms):
                x = F.relu(self.norms[place](x))
        return torch.tanh(x)
