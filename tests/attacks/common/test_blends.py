"""Blends: layers, sizes."""

from __future__ import annotations

import numpy as np
import torch

from attack_tools import per_pixel, pictures, same_grey
from backdoorlab.attacks.triggers.pixels import BlendTrigger, constant_blend


def test_layers_are_laid_one_over_the_other() -> None:
    images, keys = pictures((1, 8, 8), 3), pictures((1, 8, 8), 2, seed=8)
    opacity = torch.stack([torch.full((8, 8), 0.25), torch.full((8, 8), 0.5)])
    slow = per_pixel(images, lambda x, c, i, j: 0.5 * (0.75 * x + 0.25 * keys[0, c, i, j]) + 0.5 * keys[1, c, i, j])
    assert torch.equal(BlendTrigger(keys, opacity)(images), slow)


def test_a_blend_of_another_size_pixel_by_pixel() -> None:
    """Twice the size: each pixel is a mean of the nearest four of the key with weights 9, 3, 3 and 1 of 16."""
    key = pictures((1, 8, 8), 3, seed=5)[0].numpy().astype(float)
    images = pictures((1, 16, 16), 4)
    resized = np.zeros((1, 16, 16))
    for i in range(16):
        for j in range(16):
            for a, wa in ((i // 2, 0.75), (i // 2 + (1 if i % 2 else -1), 0.25)):
                for b, wb in ((j // 2, 0.75), (j // 2 + (1 if j % 2 else -1), 0.25)):
                    resized[0, i, j] += wa * wb * key[0, min(max(a, 0), 7), min(max(b, 0), 7)]
    trigger = constant_blend(torch.from_numpy(key).to(torch.uint8), 0.25, resizable=True)
    same_grey(trigger(images), 0.75 * images.numpy() + 0.25 * np.rint(resized))
