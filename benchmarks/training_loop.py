"""How close is the training loop to the hardware's limit, and how far ahead of a loop as people write it?

    python benchmarks/training_loop.py [--model preact_resnet8 preact_resnet18] [--device cpu] [--steps 40]

Three things are timed in turn, round after round, on 32x32 images with 10 classes (random pixels; content does not
matter for speed), and ratios are taken per round, so that a noisy machine disturbs both sides alike:

(a) the limit: forward, backward and optimiser step on one resident, already prepared batch, in the same precision;
(b) ``backdoorlab.training.fit``: gathering, augmentation, normalisation, clipping of gradients, schedule, indices,
    logging and the states kept against a collapse included;
(c) a plain PyTorch loop: a torchvision-style data set with PIL transforms, DataLoader workers, fp32, NCHW, ``.item()``
    in every step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from backdoorlab.data import Split
from backdoorlab.modalities.image import ImageModality
from backdoorlab.models import Classifier, build_model
from backdoorlab.training import Context, Recipe, fit
from backdoorlab.training.context import autocast
from backdoorlab.training.loop import make_optimizer

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)


class PlainImages(Dataset):
    """What torchvision's CIFAR-10 does for each item: numpy row -> PIL -> transforms."""

    def __init__(self, images: np.ndarray, labels: list[int]) -> None:
        self.images, self.labels = images, labels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def time_limit(model: Classifier, split: Split, recipe: Recipe, steps: int, device: torch.device) -> float:
    """(a): seconds per step on one prepared batch."""
    inputs = model.modality.prepare(split.inputs[: recipe.batch_size].to(device))
    labels = split.labels[: recipe.batch_size].to(device)
    optimizer = make_optimizer(model.train(), recipe)
    synchronise(device)
    started = time.perf_counter()
    for _ in range(steps):
        with autocast(device):
            loss = F.cross_entropy(model(inputs), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    synchronise(device)
    return (time.perf_counter() - started) / steps


def time_fit(model: Classifier, split: Split, recipe: Recipe, steps: int, device: torch.device) -> float:
    """(b): seconds per step of ``fit``, its set-up included."""
    part = split[torch.arange(steps * recipe.batch_size) % len(split)]
    synchronise(device)
    started = time.perf_counter()
    log = fit(model, part, recipe, context=Context(device=device))
    synchronise(device)
    return (time.perf_counter() - started) / log.steps


def time_plain(name: str, split: Split, batch_size: int, steps: int, device: torch.device) -> float:
    """(c): seconds per step of the plain loop, after its workers have started."""
    model = build_model(name, ImageModality(), 10).net.to(device, memory_format=torch.contiguous_format).train()
    data = PlainImages(split.inputs.permute(0, 2, 3, 1).contiguous().numpy(), split.labels.tolist())
    workers = min(4, os.cpu_count() or 1)
    loader = iter(DataLoader(data, batch_size, shuffle=True, num_workers=workers, drop_last=True))
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    next(loader)
    started, total = time.perf_counter(), 0.0
    for _ in range(steps):
        inputs, labels = next(loader)
        inputs, labels = inputs.to(device), labels.to(device)
        loss = F.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    return (time.perf_counter() - started) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["preact_resnet8", "preact_resnet18"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=40, help="optimiser steps per measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--no-plain", action="store_true", help="skip (c)")
    args = parser.parse_args()
    device = torch.device(args.device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (10_000, 3, 32, 32), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.randint(0, 10, (10_000,), generator=generator), tuple("0123456789"))
    modality = ImageModality(mean=MEAN, std=STD, flip=True)
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.processor()} x{os.cpu_count()}"
    print(json.dumps({"hardware": hardware, "torch": torch.__version__, "threads": torch.get_num_threads()}))
    for name in args.model:
        recipe = Recipe(epochs=1, batch_size=args.batch_size, lr=0.01, clip=1.0)
        model = build_model(name, modality, 10).to(device)
        time_limit(model, split, recipe, 5, device), time_fit(model, split, recipe, 5, device)  # warm up
        rows = []
        for _ in range(args.rounds):
            before = time_limit(model, split, recipe, args.steps, device)
            ours = time_fit(model, split, recipe, args.steps, device)
            after = time_limit(model, split, recipe, args.steps, device)
            plain = 0.0 if args.no_plain else time_plain(name, split, args.batch_size, max(5, args.steps // 4), device)
            limit = (before + after) / 2
            rows.append((limit, ours, plain, limit / ours, plain / ours))
        limit, ours, plain, share, gain = (statistics.median(column) for column in zip(*rows, strict=True))
        print(
            json.dumps(
                {
                    "model": name,
                    "batch": args.batch_size,
                    "limit_ms": round(1e3 * limit, 2),
                    "fit_ms": round(1e3 * ours, 2),
                    "plain_ms": round(1e3 * plain, 2),
                    "fit_share_of_limit": round(share, 3),
                    "share_range": [round(min(r[3] for r in rows), 3), round(max(r[3] for r in rows), 3)],
                    "times_faster_than_plain": round(gain, 2),
                    "seconds_per_50k_epoch": round(ours * 50_000 / args.batch_size, 1),
                }
            )
        )


if __name__ == "__main__":
    main()
