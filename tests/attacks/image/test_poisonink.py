"""Poison Ink: against slow, independent implementations and closed forms; its options; its effect."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from attack_tools import GREY, ODD, RGB, textured, textured_task
from backdoorlab.attacks import attacks
from backdoorlab.attacks.image.poisonink import EdgeInkTrigger, PairedObjective, draw_ink, find_edges
from backdoorlab.core.errors import InputError
from backdoorlab.training import Context
from effect_tools import LOST, Numbers, case, effects, hidden, least, most


@pytest.mark.parametrize("shape", [GREY, RGB, ODD], ids=str)
@pytest.mark.parametrize("threshold", [5.0, 28.0, 35.0])
def test_edges_agree_with_scikit_image(shape: tuple[int, int, int], threshold: float) -> None:
    filters = pytest.importorskip("skimage.filters")
    images = textured(6, shape)
    found = find_edges(images, threshold)
    assert found.shape == (6, 1, *shape[1:])
    for image, edges in zip(images.numpy().astype(np.float64), found[:, 0].bool().numpy(), strict=True):
        grey = image[0] if shape[0] == 1 else 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
        magnitude = filters.sobel(grey)
        unsure = np.abs(magnitude - threshold) < 1e-6  # floating point against whole numbers
        assert np.array_equal(edges[~unsure], (magnitude > threshold)[~unsure])
        assert unsure.mean() < 0.05
    assert 0 < float(found.mean()) < 1, "pictures without edges, or with nothing else, test nothing"


def test_flat_and_stepped_pictures_have_the_edges_that_one_sees() -> None:
    flat = torch.full((1, 3, 8, 8), 200, dtype=torch.uint8)
    assert int(find_edges(flat, 28).sum()) == 0
    step = torch.zeros(1, 1, 6, 8, dtype=torch.uint8)
    step[..., 4:] = 40  # magnitude 40 / sqrt(2) = 28.28 beside the step
    assert find_edges(step, 28)[0, 0, 0].tolist() == [0, 0, 0, 1, 1, 0, 0, 0]
    assert int(find_edges(step, 28.3).sum()) == 0


def slow_edge_ink(image: np.ndarray, color: list[float], opacity: float, threshold: float) -> np.ndarray:
    """Pixel by pixel, after the definition."""
    channels, height, width = image.shape
    weights = [0.299, 0.587, 0.114] if channels == 3 else [1.0]

    def grey(row: int, column: int) -> float:
        row, column = min(max(row, 0), height - 1), min(max(column, 0), width - 1)
        return sum(w * float(image[c, row, column]) for c, w in enumerate(weights))

    out = image.copy()
    for row in range(height):
        for column in range(width):
            vertical = horizontal = 0.0
            for shift, weight in ((-1, 1), (0, 2), (1, 1)):
                vertical += weight * (grey(row + 1, column + shift) - grey(row - 1, column + shift)) / 4
                horizontal += weight * (grey(row + shift, column + 1) - grey(row + shift, column - 1)) / 4
            if math.sqrt((vertical**2 + horizontal**2) / 2) <= threshold:
                continue
            for c in range(channels):
                x = float(image[c, row, column])
                out[c, row, column] = round(x + opacity * (color[c] - x))
    return out


@pytest.mark.parametrize("shape", [GREY, RGB, ODD], ids=str)
def test_edge_ink_is_exact_to_the_grey_level(shape: tuple[int, int, int]) -> None:
    images, color = textured(3, shape), [80.0, 160.0, 80.0] if shape[0] == 3 else [127.0]
    # 0.11 and a threshold off the lattice: no value lies so near a tie that float32 and float64 could differ
    trigger = EdgeInkTrigger(torch.tensor(color)[:, None, None], 0.1103, 20.0003)
    stamped = trigger(images)
    for image, found in zip(images.numpy(), stamped.numpy(), strict=True):
        assert np.array_equal(found, slow_edge_ink(image, color, 0.1103, 20.0003))
    changed = (stamped != images).any(1, keepdim=True)
    assert not bool((changed & (find_edges(images, 20.0003) == 0)).any())
    assert bool(changed.any())


def test_ink_is_color_on_edges_and_white_elsewhere() -> None:
    edges = torch.tensor([[[[0.0, 1.0]]]])
    drawing = draw_ink(edges, torch.tensor([0.2, 0.4, 0.6])[:, None, None])
    assert drawing[0, :, 0, 0].tolist() == [1, 1, 1]
    assert torch.allclose(drawing[0, :, 0, 1], torch.tensor([0.2, 0.4, 0.6]))


def test_grey_pictures_get_the_ink_s_grey_and_wrong_channels_are_refused() -> None:
    attack = attacks.get("poisonink", "image")(variant="edge", rgb=(10, 200, 60))
    trigger = attack.make_trigger(textured_task(), Context())
    assert float(trigger.color) == pytest.approx(0.299 * 10 + 0.587 * 200 + 0.114 * 60)
    with pytest.raises(InputError, match="made for images of shape"):
        trigger(textured(2, (3, 16, 16)))
    for rgb in ((1, 2), (0, 0, 256)):
        with pytest.raises(InputError, match="rgb must be three numbers"):
            attacks.get("poisonink", "image")(rgb=rgb)


def test_paired_batches_are_half_clean_and_half_from_the_poisoned_set() -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    task = textured_task()
    mixed, labels = 255 - task.train.inputs, (task.train.labels + 1) % 4
    model = task.build_model(Context())
    real = model.forward

    def watch(x: Tensor) -> Tensor:
        seen.append((x.detach().clone(), x))
        return real(x)

    model.forward = watch  # type: ignore[method-assign]
    rows = torch.tensor([3, 1, 8, 20, 5])
    inputs = torch.rand(5, 1, 16, 16, generator=torch.Generator().manual_seed(2))
    loss = PairedObjective(mixed, labels)(model, inputs, task.train.labels[rows], rows)
    given = seen[0][0]
    assert torch.equal(given[:2], inputs[:2])
    assert torch.allclose(given[2:], mixed[rows[2:]].float() / 255)
    wanted = torch.cat([task.train.labels[rows[:2]], labels[rows[2:]]])
    assert torch.allclose(loss, torch.nn.functional.cross_entropy(real(given), wanted))


def test_paired_mode_trains_another_model_on_the_same_poison() -> None:
    task = textured_task()
    ordinary, paired = (
        attacks.get("poisonink", "image")
        .build({"variant": "edge", "mode": mode, "poison_rate": 0.25})
        .run(task, Context())
        for mode in ("poison", "paired")
    )
    assert torch.equal(ordinary.poison.inputs, paired.poison.inputs)
    assert torch.equal(ordinary.poison.indices, paired.poison.indices)
    assert (ordinary.poison.replay, paired.poison.replay) == (False, True)
    assert paired.notes["share_of_each_batch"] == 0.125
    weights = zip(ordinary.model.state_dict().values(), paired.model.state_dict().values(), strict=True)
    assert any(not torch.equal(a, b) for a, b in weights)


@case("attack/image/poisonink", asr=least(0.85), acc_lost=LOST, benign_asr=most(0.1), gates_missed=least(1))
def effect_of_poisonink(seed: int) -> Numbers:
    """In so few steps the ink is visible (28 dB) and its color only half revealed, which the victim does not need;
    the card must say so."""
    return hidden(seed, "poisonink", poison_rate=0.1, steps=400)


@case("attack/image/poisonink_edge", asr=least(0.9), acc_lost=LOST, benign_asr=most(0.1))
def effect_of_poisonink_edge(seed: int) -> Numbers:
    return hidden(seed, "poisonink", poison_rate=0.1, variant="edge", opacity=0.3)


@case("attack/image/poisonink_paired", asr=least(0.9), acc_lost=LOST, benign_asr=most(0.1))
def effect_of_poisonink_paired(seed: int) -> Numbers:
    return hidden(seed, "poisonink", variant="edge", opacity=0.3, mode="paired", poison_rate=0.2)


test_effect = effects(__name__)
