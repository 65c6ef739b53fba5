"""Encoders that hide a message in an image, and decoders that find it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def convolution(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution with padding, then ReLU."""
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, stride, 1), nn.ReLU())


def keep_scale(network: nn.Module) -> nn.Module:
    """He initialisation of all convolutions and linear layers.

    A message has to pass twenty layers before its first gradient is of any use; torch's own initialisation shrinks it
    in each of them, and training stays at chance for a long time.
    """
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return network


class UNet(nn.Module):
    """Strided convolutions down, nearest-neighbour upsampling with skips back up, to any size: out in (-1, 1).

    Widths are b, b, 2b, 4b, 8b; below 32 px there is one stage less. There is no normalisation layer, so a picture's
    residual is the same in training and in use.
    """

    def __init__(self, in_channels: int, out_channels: int, height: int, width: int, base: int) -> None:
        """For ``in_channels`` input and ``out_channels`` output channels; ``base`` is b."""
        super().__init__()
        stages = max(1, min(4, int(math.log2(min(height, width))) - 1))
        widths = [base, *(base * 2**i for i in range(stages))]
        self.enter = convolution(in_channels, base)
        self.down = nn.ModuleList(convolution(widths[i], widths[i + 1], 2) for i in range(stages))
        self.up = nn.ModuleList(convolution(widths[i + 1], widths[i]) for i in reversed(range(stages)))
        self.join = nn.ModuleList(
            convolution(2 * widths[i] + (0 if i else in_channels), widths[i]) for i in reversed(range(stages))
        )
        self.leave = nn.Conv2d(base, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N,in_channels,H,W] in [0, 1] -> [N,out_channels,H,W] in (-1, 1)."""
        x = 2 * x - 1
        skips, current = [x], self.enter(x)
        for stage in self.down:
            skips.append(current)
            current = stage(current)
        while len(skips) > 1:
            place, skip = len(self.down) + 1 - len(skips), skips.pop()
            current = self.up[place](F.interpolate(current, skip.shape[2:], mode="nearest"))
            parts = [current, skip] if len(skips) > 1 else [current, skip, x]
            current = self.join[place](torch.cat(parts, 1))
        return torch.tanh(self.leave(current))


class Residual(nn.Module):
    """Two dilated 3x3 convolutions beside the identity."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, 1, dilation, dilation)
        self.second = nn.Conv2d(width, width, 3, 1, dilation, dilation)

    def forward(self, x: Tensor) -> Tensor:
        """Any [N,width,H,W]."""
        return F.relu(x + self.second(F.relu(self.first(x))) / 2)


class Reveal(nn.Module):
    """Reads a drawing from a picture: full and half resolution inside, out in (0, 1).

    Without normalisation: instance statistics would take away the strength of a residual, which carries the message.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.fine = nn.Sequential(convolution(channels, width), convolution(width, width))
        self.coarse = nn.Sequential(convolution(width, 2 * width, 2), Residual(2 * width, 1), Residual(2 * width, 2))
        self.draw = nn.Sequential(convolution(3 * width, width), nn.Conv2d(width, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,H,W] in [0, 1] -> the same shape."""
        fine = self.fine(2 * x - 1)
        coarse = F.interpolate(self.coarse(fine), fine.shape[2:], mode="nearest")
        return torch.sigmoid(self.draw(torch.cat([coarse, fine], 1)))
