"""Blind: against slow, independent implementations and closed forms; its options; its effect."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from attack_tools import GREY, ODD, pictures, same_grey
from backdoorlab.attacks.image.blind import PATTERN, Blind, BlindObjective, draw_pattern, mgda_weights, min_norm_weight
from backdoorlab.attacks.targets import TargetMap
from backdoorlab.core.errors import BackdoorLabError, InputError
from backdoorlab.models import Classifier
from backdoorlab.tasks import Task
from backdoorlab.training import Context
from effect_tools import LOST, OBEYS, Numbers, case, effects, least, planted


def test_blind_pattern_at_32_pixels() -> None:
    canvas, mask = draw_pattern(3, 32, 32)
    drawn = [
        "".join("·" if not mask[i, j] else str(int(canvas[0, i, j]) // 255) for j in (23, 24, 25)) for i in range(3, 8)
    ]
    assert drawn == ["101", "·1·", "··0", "·1·", "101"]
    assert int(mask.sum()) == 9
    assert torch.equal(canvas[0], canvas[2])


@pytest.mark.parametrize(("height", "width", "times"), [(16, 16, 1), (29, 31, 1), (64, 64, 2), (224, 224, 7)])
def test_blind_pattern_scales(height: int, width: int, times: int) -> None:
    _, mask = draw_pattern(1, height, width)
    assert int(mask.sum()) == 9 * times**2
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    assert int(rows[0]) == round(3 * height / 32)
    assert int(columns[0]) == round(23 * width / 32)
    with pytest.raises(InputError, match="does not fit an image of 4x9"):
        draw_pattern(1, 4, 9)


@pytest.mark.parametrize("seed", range(4))
def test_blind_shortest_combination_by_search(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = ([torch.randn(3, 2, generator=generator), torch.randn(4, generator=generator)] for _ in range(2))
    if seed == 3:
        first = [10 * t for t in second]  # parallel: the shorter one alone
    a, b = (torch.cat([t.flatten() for t in g]).double().numpy() for g in (first, second))
    grid = np.linspace(0, 1, 100001)
    best = grid[np.argmin([w * w * (a @ a) + 2 * w * (1 - w) * (a @ b) + (1 - w) ** 2 * (b @ b) for w in grid])]
    assert float(min_norm_weight(first, second)) == pytest.approx(best, abs=1e-4)


def test_blind_mgda_on_two_parabolas() -> None:
    """Gradients (2, 0) and (0, 4), losses 1 and 1: scaled by 1/2 and 1/4 to unit length, so both weigh the same."""

    class Point(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.at = torch.nn.Parameter(torch.zeros(2))

    model = Point()
    clean, backdoor = (model.at[0] + 1).square(), (2 * model.at[1] + 1).square()
    weights = mgda_weights(model, clean, backdoor)  # type: ignore[arg-type]
    assert [float(w) for w in weights] == pytest.approx([0.5, 0.5])
    assert model.at.grad is None


def test_blind_loss_and_gate(digits_task: Task) -> None:
    model = digits_task.build_model(Context()).eval()
    canvas, mask = draw_pattern(1, 16, 16)
    inputs, labels = digits_task.train.inputs[:20].float() / 255, digits_task.train.labels[:20]
    objective = BlindObjective(canvas / 255, mask, TargetMap("all-to-one", 3, 10), 4, 100.0, (1.0, 0.25))
    clean = F.cross_entropy(model(inputs), labels)
    for _ in range(4):
        assert not objective.open
        assert torch.allclose(objective(model, inputs, labels, labels), clean)
    assert objective.open
    assert objective.waited == 4
    stamped = inputs.clone()
    for i, j in mask.nonzero().tolist():
        stamped[:, 0, i, j] = float(canvas[0, i, j]) / 255
    wanted = clean + 0.25 * F.cross_entropy(model(stamped), torch.full((20,), 3))
    assert torch.allclose(objective(model, inputs, labels, labels), wanted, atol=1e-5)
    shut = BlindObjective(canvas / 255, mask, TargetMap("all-to-one", 3, 10), 4, 1e-9, (1.0, 0.25))
    for _ in range(9):
        shut(model, inputs, labels, labels)
    assert not shut.open
    assert len(shut.recent) == 4


def test_blind_says_when_it_never_began(digits_task: Task) -> None:
    import dataclasses

    short = dataclasses.replace(digits_task, recipe=dataclasses.replace(digits_task.recipe, epochs=1, min_steps=0))
    with pytest.raises(BackdoorLabError, match="never fell below 1e-09"):
        Blind(gate_threshold=1e-9).run(short, Context())


def test_blind_mgda_trains(digits_task: Task, benign_digits: Classifier) -> None:
    backdoor = Blind(weighting="mgda").run(digits_task, Context())
    metrics = backdoor.measure(digits_task, Context())
    print(metrics["acc"], metrics["asr"])
    assert metrics["asr"] > backdoor.measure(digits_task, Context(), benign_digits)["asr"] + 0.5


@pytest.mark.parametrize("shape", [GREY, ODD])
def test_blind_pattern_pixel_by_pixel(shape: tuple[int, int, int]) -> None:
    images, (height, width) = pictures(shape, 4), shape[1:]
    top, left = round(3 * height / 32), round(23 * width / 32)
    slow = images.numpy().astype(float)
    for a, row in enumerate(PATTERN):
        for b, cell in enumerate(row):
            if cell >= 0:
                slow[:, :, top + a, left + b] = 255 * cell
    pattern, mask = draw_pattern(*shape)
    same_grey(torch.where(mask, pattern, images), slow)


@case("attack/image/blind", asr=least(0.9), acc_lost=LOST, benign_asr=OBEYS)
def effect_of_blind(seed: int) -> Numbers:
    return planted(seed, "blind", poison_rate=0.1)[1]


test_effect = effects(__name__)
