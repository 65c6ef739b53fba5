"""Pieces of the optimised attacks against slow, independent implementations and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from backdoorlab.attacks.image.blind import BlindObjective, Blind, draw_pattern, mgda_weights, min_norm_weight
from backdoorlab.attacks.image.trojannn import WrapTrigger, draw_mask, excite, strongest_units
from backdoorlab.attacks import Attack, attacks
from backdoorlab.attacks.base import TargetMap
from backdoorlab.core.errors import BackdoorLabError, InputError
from backdoorlab.models import Classifier
from backdoorlab.models.anatomy import features, head
from backdoorlab.training import Context, Task

FACTS = {
    # name: (year, threat model, labels, visibility, sample specific, surrogate)
    "trojannn": (2018, "poisoning", "dirty", "visible", False, True),
    "blind": (2021, "training", "dirty", "visible", False, False),
}


@pytest.mark.parametrize("name", FACTS)
def test_facts_of_optimised_attacks(name: str) -> None:
    facts = attacks.get(name, "image").facts()
    keys = ("year", "threat_model", "label_mode", "trigger_visibility", "sample_specific", "needs_surrogate")
    assert tuple(facts[key] for key in keys) == FACTS[name]


def pictures(shape: tuple[int, ...], count: int = 6, seed: int = 0) -> Tensor:
    """Random pictures, the last two black and white."""
    images = torch.randint(0, 256, (count, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    images[-2], images[-1] = 0, 255
    return images


# --- TrojanNN ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 32), (29, 31), (224, 224)])
@pytest.mark.parametrize("shape", ["apple", "square"])
def test_trojannn_mask_lies_in_its_box(shape: str, height: int, width: int) -> None:
    mask = draw_mask(shape, height, width)
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    assert float(rows.min()) >= 0.54 * height - 0.5
    assert float(rows.max() + 1) <= 0.91 * height + 0.5
    assert float(columns.min()) >= 0.57 * width - 0.5
    assert float(columns.max() + 1) <= 0.87 * width + 0.5
    assert 0.05 < float(mask.float().mean()) < 0.13
    if shape == "apple":
        assert mask.sum() < draw_mask("square", height, width).sum()
        assert mask[rows[0]].sum() < mask[rows[len(rows) // 2]].sum(), "the stalk is thinner than the apple"


def test_trojannn_picks_the_heaviest_units() -> None:
    weight = torch.tensor([[1.0, -5.0, 0.0, 2.0], [1.0, 4.0, 0.5, -8.0]])
    sums = [sum(abs(float(row[u])) for row in weight) for u in range(4)]
    assert strongest_units(weight, 2).tolist() == sorted(range(4), key=lambda u: -sums[u])[:2]


def test_trojannn_excites_the_neurons(benign_digits: Classifier) -> None:
    mask = draw_mask("apple", 16, 16)
    units = strongest_units(head(benign_digits).weight, 2)
    start = 0.2 + 0.7 * torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in benign_digits.state_dict().items()}
    found = excite(benign_digits, start, mask, units, 100.0, 60, Context())

    def cost(picture: Tensor) -> float:
        with torch.no_grad():
            return float((features(benign_digits, (picture * mask)[None])[0, units] - 100).square().sum())

    assert cost(found) < cost(start)
    assert float((found - start * mask).abs().max()) <= 0.3 + 1e-6
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    assert not found[:, ~mask].any()
    # The best of all pictures seen: longer searches are never worse.
    assert cost(found) <= cost(excite(benign_digits, start, mask, units, 100.0, 5, Context()))
    for name, value in benign_digits.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.requires_grad and p.grad is None for p in benign_digits.parameters())


def test_trojannn_stops_when_the_activation_is_reached(benign_digits: Classifier) -> None:
    """An activation that the start already has leaves the start as it is."""
    mask, units = draw_mask("square", 16, 16), torch.tensor([3])
    start = 0.2 + 0.7 * torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        reached = float(features(benign_digits, (start * mask)[None])[0, 3])
    assert torch.equal(excite(benign_digits, start, mask, units, reached, 10, Context()), start * mask)


def test_trojannn_reference_mode_wraps_around() -> None:
    images, picture = pictures((3, 9, 7)), pictures((3, 9, 7), seed=1)[0]
    slow = (images.numpy().astype(int) + picture.numpy().astype(int)) % 256
    assert np.array_equal(WrapTrigger(picture)(images).numpy(), slow)


def test_trojannn_replaces_pixels_under_the_mask(digits_task: Task) -> None:
    attack = attacks.get("trojannn", "image").build({"steps": 2})
    context = Context()
    trigger = attack.make_trigger(digits_task, context)  # type: ignore[attr-defined]
    images, mask = digits_task.test.inputs[:9], draw_mask("apple", 16, 16)
    stamped = trigger(images)
    assert torch.equal(stamped[..., ~mask], images[..., ~mask])
    assert torch.equal(stamped[..., mask], trigger.pattern[:, mask].expand(9, 1, -1))
    with pytest.raises(InputError, match="has 64 penultimate units"):
        attacks.get("trojannn", "image").build({"neurons": 65}).make_trigger(digits_task, context)


# --- Blind ------------------------------------------------------------------------------------------------------------


def test_blind_pattern_at_32_pixels() -> None:
    canvas, mask = draw_pattern(3, 32, 32)
    drawn = ["".join("·" if not mask[i, j] else str(int(canvas[0, i, j]) // 255) for j in (23, 24, 25))
             for i in range(3, 8)]  # fmt: skip
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
        Blind(threshold=1e-9).plant(short, Context())


def test_blind_mgda_trains(digits_task: Task, benign_digits: Classifier) -> None:
    backdoor = Blind(weighting="mgda").plant(digits_task, Context())
    metrics = backdoor.measure(digits_task, Context())
    print(metrics["acc"], metrics["asr"])
    assert metrics["asr"] > backdoor.measure(digits_task, Context(), benign_digits)["asr"] + 0.5
