"""What tests of attacks share: pictures, small tasks of them, quick settings, slow arithmetic."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from backdoorlab.attacks import Attack, Backdoor, Trigger, attacks
from backdoorlab.attacks.triggers.base import load_trigger
from backdoorlab.data.sources import DatasetSpec
from backdoorlab.data.split import Dataset, Split
from backdoorlab.modalities.base import modality_of
from backdoorlab.tasks import Task, TaskSpec
from backdoorlab.training import Context, Recipe
from backdoorlab.training.context import MemoryAssets
from quick import quick

RGB, GREY, ODD = (3, 32, 32), (1, 16, 16), (3, 29, 31)

# --- pictures ---------------------------------------------------------------------------------------------------------


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(shape: tuple[int, ...], count: int, seed: int = 0) -> Tensor:
    """Random pictures."""
    return torch.randint(0, 256, (count, *shape), generator=generator(seed), dtype=torch.uint8)


def pictures(shape: tuple[int, ...], count: int = 6, seed: int = 0) -> Tensor:
    """Random pictures, the last two black and white."""
    images = noise(shape, count, seed)
    images[-2], images[-1] = 0, 255
    return images


def textured(count: int, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """Smooth and noisy parts, so that some pixels are edges and some are not."""
    draw = generator(seed)
    coarse = torch.rand(count, shape[0], 4, 4, generator=draw)
    smooth = torch.nn.functional.interpolate(coarse, shape[1:], mode="bicubic", align_corners=False)
    rough = torch.rand(count, *shape, generator=draw) - 0.5
    return (255 * (0.7 * smooth + 0.3) + 60 * rough).clamp(0, 255).to(torch.uint8)


# --- tasks ------------------------------------------------------------------------------------------------------------


def task_of(
    images: Tensor, labels: Tensor, classes: int = 4, batch: int = 16, test: int | None = None, epochs: int = 1
) -> Task:
    """A task of given pictures, of which the first ``test`` (or all) are the test set too; a small network."""
    split = Split(images, labels, tuple("abcdefgh"[:classes]))
    data = Dataset("tiny", "image", split, split if test is None else split[torch.arange(test)])
    spec = TaskSpec(dataset=DatasetSpec(name="tiny"), model="convnet3", recipe="smoke")
    return Task(spec, data, modality_of(data), Recipe(epochs=epochs, batch_size=batch, lr=0.05))


@cache
def tiny_task(shape: tuple[int, int, int], samples: int = 48) -> Task:
    """Random pictures with balanced labels; one epoch of a small network."""
    return task_of(noise(shape, samples, 5), torch.arange(samples) % 4, test=min(24, samples))


def two_class_task(shape: tuple[int, ...]) -> Task:
    """Data for a trigger; not to be trained on."""
    return task_of(pictures(shape, 20), torch.arange(20) % 2, 2)


def noise_task(shape: tuple[int, int, int] = GREY, samples: int = 40) -> Task:
    return task_of(pictures(shape, samples), torch.arange(samples) % 4)


def textured_task(shape: tuple[int, int, int] = GREY, samples: int = 40) -> Task:
    return task_of(textured(samples, shape), torch.arange(samples) % 4, batch=8, test=16)


@cache
def bright_task(shape: tuple[int, int, int] = GREY, samples: int = 60) -> Task:
    """Random pictures whose brightness tells their class."""
    labels = torch.arange(samples) % 3
    dark = torch.randint(0, 100, (samples, *shape), generator=generator(5))
    images = (dark + 70 * labels[:, None, None, None]).to(torch.uint8)
    return task_of(images, labels, 3, test=30, epochs=3)


# --- attacks ----------------------------------------------------------------------------------------------------------


def make(cls: type[Attack] | str, **changes: object) -> Attack:
    """An image attack that poisons a quarter (of one class: half of it) and whose own preparations are short."""
    cls = attacks.get(cls, "image") if isinstance(cls, str) else cls
    rate = 0.125 if cls.label_mode == "clean" else 0.25
    return quick(cls, **{"poison_rate": rate, **changes})


@cache
def quick_backdoor(name: str, shape: tuple[int, int, int] = GREY) -> Backdoor:
    """Read only."""
    return make(name).run(tiny_task(shape), Context(seed=3))


def reload(trigger: Trigger) -> Trigger:
    """Through bytes and text, as a store would."""
    tensors, config = trigger.state()
    stored = save_tensors(tensors) if tensors else None
    return load_trigger(trigger.kind, load_tensors(stored) if stored else {}, json.loads(json.dumps(config)))


class Counting(MemoryAssets):
    """Assets that count what is built."""

    def __init__(self) -> None:
        super().__init__()
        self.built: list[str] = []

    def get(self, kind: str, spec: Mapping[str, Any], build: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        def counted() -> dict[str, Tensor]:
            self.built.append(kind)
            return build()

        return super().get(kind, spec, counted)


class Own:
    """Assets of which one kind is a user's file."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def get(self, kind: str, spec: Mapping[str, Any], build: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        return dict(self.tensors)


class Told:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def track(self, items: Any, label: str, total: int | None = None) -> Any:
        return iter(items)

    def note(self, text: str) -> None:
        self.notes.append(text)


# --- arithmetic -------------------------------------------------------------------------------------------------------


def grey(value: float) -> int:
    """One pixel: clip, round half to even, cast."""
    return int(np.rint(min(255.0, max(0.0, float(value)))))


def per_pixel(images: Tensor, rule: Callable[[float, int, int, int], float]) -> Tensor:
    """Apply ``rule(value, channel, row, column)`` to each pixel of each picture."""
    out = images.clone()
    for n, c, i, j in np.ndindex(*images.shape):
        out[n, c, i, j] = grey(rule(float(images[n, c, i, j]), c, i, j))
    return out


def same_grey(fast: object, slow: np.ndarray) -> None:
    """Whole triggers in double precision: equal grey levels, except where the exact value lies on a half.

    A fast trigger works in single precision, so a value within 1e-3 of a half may be rounded to its other neighbour.
    """
    assert isinstance(fast, Tensor)
    value = np.clip(slow, 0, 255)
    got = fast.numpy().astype(float)
    wrong = got != np.rint(value)
    near_half = np.abs(value - np.floor(value) - 0.5) < 1e-3
    assert not (wrong & ~near_half).any()
    assert np.abs(got - value).max() < 0.502


def splitmix(value: int) -> int:
    mask = 2**64 - 1
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = ((value ^ (value >> shift)) * factor) & mask
    return value ^ (value >> 31)


def exact_uniform(seed: int, index: int, column: int) -> float:
    """The number that belongs to (seed, sample, column), in integers."""
    mask, gold = 2**64 - 1, 0x9E3779B97F4A7C15
    key = splitmix((seed * gold + 1) & mask)
    return (splitmix((splitmix((index + key) & mask) + (column + 1) * gold) & mask) >> 40) / 2**24


FROM_CHROMA = {
    "ftrojan": np.array([[1, 1.403, 0], [1, -0.714, -0.344], [1, 0, 1.773]]),
    "ctrl": np.array([[1, 0, 1.14], [1, -0.396, -0.581], [1, 2.029, 0]]),
}


def chroma_oracle(image: np.ndarray, name: str, edit: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Transform one picture [C,H,W] to luma and chroma, edit both chroma planes, transform back."""
    if len(image) == 1:
        return np.rint(np.clip(edit(image[0].astype(float)), 0, 255)).astype(np.uint8)[None]
    back = FROM_CHROMA[name]
    planes = np.einsum("ab,bhw->ahw", np.linalg.inv(back), image.astype(float))
    planes[1:] = [edit(plane) for plane in planes[1:]]
    return np.rint(np.clip(np.einsum("ab,bhw->ahw", back, planes), 0, 255)).astype(np.uint8)
