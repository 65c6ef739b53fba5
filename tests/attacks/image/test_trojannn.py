"""TrojanNN: against slow, independent implementations and closed forms; its options; its effect."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from attack_tools import GREY, make, pictures, tiny_task
from backdoorlab.attacks import attacks
from backdoorlab.attacks.image.trojannn import WrapTrigger, draw_mask, excite, strongest_units
from backdoorlab.core.errors import InputError
from backdoorlab.models import Classifier
from backdoorlab.models.anatomy import features, head
from backdoorlab.tasks import Task
from backdoorlab.training import Context
from effect_tools import LOST, OBEYS, Numbers, case, effects, least, planted


def save(path: Path, pixels: np.ndarray) -> str:
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return str(path)


def test_trojannn_takes_a_mask(tmp_path: Path) -> None:
    mask = np.zeros((16, 16))
    mask[2:5, 3:9] = 255
    attack = make(attacks.get("trojannn", "image"), mask=save(tmp_path / "mask.png", mask))
    context, task = Context(), tiny_task(GREY)
    trigger = attack.make_trigger(task, context)  # type: ignore[attr-defined]
    assert np.array_equal(trigger.mask.numpy(), mask == 255)
    # The optimised picture of another outline, cached in the same place, must not be taken for this one's.
    apple = make(attacks.get("trojannn", "image")).make_trigger(task, context)  # type: ignore[attr-defined]
    assert torch.equal(apple.mask, draw_mask("apple", 16, 16))
    assert bool(apple.pattern[:, apple.mask].any())
    black = make(attacks.get("trojannn", "image"), mask=save(tmp_path / "black.png", np.zeros((16, 16))))
    with pytest.raises(InputError, match="has no white pixel at 16x16"):
        black.make_trigger(task, context)  # type: ignore[attr-defined]


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


@pytest.mark.parametrize("side", [32, 64, 224])
def test_trojannn_apple_is_as_large_as_the_published_one(side: int) -> None:
    """About 7 % of the image, at any size; with the rim that bilinear shrinking adds it would be 11 % at 32 px."""
    mask = draw_mask("apple", side, side)
    assert 0.065 <= float(mask.float().mean()) <= 0.08
    if side == 32:
        large = Image.fromarray(200 * draw_mask("apple", 224, 224).numpy().astype(np.uint8))
        rimmed = np.asarray(large.resize((32, 32), Image.Resampling.BILINEAR)) > 0
        assert int(mask.sum()) == 78
        assert 0.10 < rimmed.mean() < 0.125


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
    assert all(p.requires_grad for p in benign_digits.parameters())


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


@case("attack/image/trojannn", asr=least(0.9), acc_lost=LOST, benign_asr=OBEYS)
def effect_of_trojannn(seed: int) -> Numbers:
    return planted(seed, "trojannn")[1]


test_effect = effects(__name__)
