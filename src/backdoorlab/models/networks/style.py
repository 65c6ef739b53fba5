"""Networks that change the style of images, and the discriminator they are trained against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, BLOCKS = 16, 2


EDGE = 0.02
"""Pixels are kept this far from black and white before their logits are taken."""


MAX_SHIFT = 2.5
"""Largest shift of a pixel's logit."""


def _layer(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, 1), nn.InstanceNorm2d(out_channels, affine=True), nn.ReLU()
    )


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = _layer(width, width), nn.Conv2d(width, width, 3, 1, 1)
        self.norm = nn.InstanceNorm2d(width, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.norm(self.second(self.first(x)))
        return out


class StyleNet(nn.Module):
    """A generator for any size: images [N,C,H,W] in [0, 1] -> images in (0, 1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem, self.down = _layer(channels, WIDTH), _layer(WIDTH, 2 * WIDTH, 2)
        self.body = nn.Sequential(*(_Residual(2 * WIDTH) for _ in range(BLOCKS)))
        self.up, self.out = _layer(2 * WIDTH, WIDTH), nn.Conv2d(WIDTH, channels, 3, 1, 1)
        nn.init.zeros_(self.out.weight)
        if self.out.bias is not None:
            nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Restyle."""
        wide = self.stem(x)
        deep = self.body(self.down(wide))
        shift = self.out(self.up(F.interpolate(deep, x.shape[2:], mode="nearest")) + wide)
        return torch.sigmoid(torch.logit(x, eps=EDGE) + MAX_SHIFT * torch.tanh(shift / MAX_SHIFT))


class PatchNet(nn.Module):
    """A discriminator of patches: [N,C,H,W] -> [N,1,H/4,W/4], 1 for real."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, WIDTH, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(WIDTH, 2 * WIDTH, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * WIDTH, 1, 3, 1, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scores of patches."""
        scores: Tensor = self.layers(x)
        return scores
