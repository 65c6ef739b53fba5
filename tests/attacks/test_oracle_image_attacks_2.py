"""Pieces of the optimised attacks against slow, independent implementations and closed forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from backdoorlab.attacks import attacks
from backdoorlab.attacks.common.generators import Companion, generate, pack, seeded, straight_through, unpack
from backdoorlab.attacks.image.blind import Blind, BlindObjective, draw_pattern, mgda_weights, min_norm_weight
from backdoorlab.attacks.image.input_aware import (
    ForeignTrigger,
    InputAwareObjective,
    InputAwareTrigger,
    TwiceBoundedNet,
    diversity,
    mask_loss,
    sharpen,
    spread,
    train_mask,
)
from backdoorlab.attacks.image.lc import Lc, draw_corners, perturb
from backdoorlab.attacks.image.lira import LiraObjective, LiraTrigger
from backdoorlab.attacks.image.narcissus import foreign_split, optimise_noise
from backdoorlab.attacks.image.trojannn import WrapTrigger, draw_mask, excite, strongest_units
from backdoorlab.attacks.targets import TargetMap
from backdoorlab.core.errors import BackdoorLabError, InputError
from backdoorlab.data.sources import load_dataset
from backdoorlab.data.split import Dataset, Split
from backdoorlab.modalities.base import modality_of
from backdoorlab.modalities.image import ImageModality
from backdoorlab.models import Classifier
from backdoorlab.models.anatomy import features, head
from backdoorlab.models.networks.generators import DetailNet, StrideNet
from backdoorlab.tasks import Task
from backdoorlab.training import Context, Recipe

FACTS = {
    # name: (year, threat model, labels, visibility, sample specific, surrogate)
    "trojannn": (2018, "poisoning", "dirty", "visible", False, True),
    "blind": (2021, "training", "dirty", "visible", False, False),
    "input_aware": (2020, "training", "dirty", "visible", True, False),
    "lc": (2019, "poisoning", "clean", "visible", False, True),
    "narcissus": (2023, "poisoning", "clean", "subtle", False, True),
    "lira": (2021, "training", "dirty", "invisible", True, False),
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


# --- Blind ------------------------------------------------------------------------------------------------------------


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
        Blind(threshold=1e-9).run(short, Context())


def test_blind_mgda_trains(digits_task: Task, benign_digits: Classifier) -> None:
    backdoor = Blind(weighting="mgda").run(digits_task, Context())
    metrics = backdoor.measure(digits_task, Context())
    print(metrics["acc"], metrics["asr"])
    assert metrics["asr"] > backdoor.measure(digits_task, Context(), benign_digits)["asr"] + 0.5


# --- Input-aware ------------------------------------------------------------------------------------------------------


def test_diversity_pair_by_pair() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 3, 1, 4, 4, generator=generator)
    g, h = torch.rand(2, 3, 1, 4, 4, generator=generator)
    slow = [
        np.sqrt(np.mean((a.numpy() - b.numpy()) ** 2)) / np.sqrt(np.mean((c.numpy() - d.numpy()) ** 2))
        for a, b, c, d in zip(x, y, g, h, strict=True)
    ]
    assert float(diversity(x, y, g, h)) == pytest.approx(np.mean(slow), rel=1e-4)
    same = g.clone().requires_grad_()
    diversity(x, y, same, g).backward()
    assert same.grad is not None
    assert bool(same.grad.isfinite().all())


def test_sharpened_masks() -> None:
    values = torch.tensor([0.0, 0.4, 0.5, 0.6, 1.0])
    assert sharpen(values).tolist() == pytest.approx([0, 0.018, 0.5, 0.982, 1], abs=1e-3)


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 29, 31), (3, 33, 64)])
def test_generators_keep_the_size(shape: tuple[int, int, int]) -> None:
    images = pictures(shape, 3).float() / 255
    pattern = seeded(lambda: DetailNet(shape[0], shape[0], *shape[1:]), 0, "pattern")
    mask = seeded(lambda: DetailNet(shape[0], 1, *shape[1:]), 0, "mask")
    noise = seeded(lambda: StrideNet(shape[0]), 0, "noise")
    assert pattern(images).shape == noise(images).shape == (3, *shape)
    assert mask(images).shape == (3, 1, *shape[1:])
    with torch.no_grad():
        assert 0 < float(pattern(images).min()) < float(pattern(images).max()) < 1
        assert -1 < float(noise(images).min()) < 0 < float(noise(images).max()) < 1
    again = seeded(lambda: StrideNet(shape[0]), 0, "noise")
    assert all(torch.equal(a, b) for a, b in zip(noise.parameters(), again.parameters(), strict=True))
    restored = unpack(lambda: StrideNet(shape[0]), "network", pack(network=noise))
    assert torch.equal(generate(restored, images), generate(noise, images))
    assert noise.training, "generating leaves the mode alone"
    with pytest.raises(ValueError, match=r"Missing|size mismatch|Unexpected"):
        unpack(lambda: StrideNet(shape[0]), "other", pack(network=noise))


def test_rounding_passes_the_gradient() -> None:
    images = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rounded = straight_through(images)
    assert torch.allclose(rounded * 255, (images * 255).round(), atol=1e-4)
    rounded.sum().backward()
    assert torch.equal(images.grad, torch.ones(4, 5))


def test_companion_is_adam_with_the_recipes_schedule() -> None:
    """Against Adam with the rate set by hand; without gradients it does nothing, and gradients never pile up."""
    recipe = Recipe(epochs=2, batch_size=10, schedule="onecycle")
    ours, theirs = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    companion = Companion([ours], 0.1, (0.5, 0.9), recipe, 35)
    adam = torch.optim.Adam([theirs], 0.1, (0.5, 0.9))
    companion.step()
    assert companion.taken == 0
    for step in range(6):
        for p in (ours, theirs):
            p.grad = torch.tensor([1.0, -2.0, float(step)])
        adam.param_groups[0]["lr"] = 0.1 * recipe.factor(step, 3)
        adam.step()
        companion.step()
        assert ours.grad is None
        assert torch.equal(ours, theirs), step


class Recorder(torch.nn.Module):
    """A classifier that remembers what it was shown."""

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen = inputs.detach()
        return inputs.flatten(1)[:, :4]


@pytest.mark.parametrize(("rate", "attacked", "crossed"), [(0.25, 3, 3), (0.5, 6, 6), (0.75, 9, 3), (1.0, 12, 0)])
def test_input_aware_batches(rate: float, attacked: int, crossed: int) -> None:
    shape = (1, 16, 16)
    pattern, mask = (seeded(lambda: TwiceBoundedNet(1, 1, 16, 16), 0, name).eval() for name in ("pattern", "mask"))
    companion = Companion(pattern.parameters(), 0.01, (0.5, 0.9), Recipe(epochs=1, batch_size=12), 12)
    objective = InputAwareObjective(
        pattern,
        mask,
        TargetMap("all-to-one", 3, 4),
        rate,
        companion,
        torch.full((1, 1, 1), 0.25),
        torch.Generator().manual_seed(0),
    )
    inputs, labels, model = pictures(shape, 12).float() / 255, torch.zeros(12, dtype=torch.int64), Recorder()
    loss = objective(model, inputs, labels, labels)  # type: ignore[arg-type]
    trigger = InputAwareTrigger(pattern, mask, shape)
    raw = (inputs * 255).round().to(torch.uint8)
    drawn, where = trigger.draw(raw)
    seen = (model.seen * 255).round()
    near = {"atol": 1.0, "rtol": 0.0}  # a last bit of the generator may tip a rounding
    assert torch.allclose(seen[:attacked], trigger(raw)[:attacked].float(), **near)
    for n in range(attacked, attacked + crossed):
        donor = n - attacked + (attacked + crossed if attacked + crossed < 12 else 1)
        foreign = torch.lerp(raw[n].float(), drawn[donor], where[donor]).round()
        assert torch.allclose(seen[n], foreign, **near), n
    assert torch.equal(seen[attacked + crossed :], raw[attacked + crossed :].float())
    loss.backward()
    before = [p.detach().clone() for p in pattern.parameters()]
    assert all(p.grad is None for p in mask.parameters())
    companion.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, pattern.parameters(), strict=True))


def test_foreign_triggers_come_from_other_images() -> None:
    shape = (1, 16, 16)
    pattern, mask = (seeded(lambda: TwiceBoundedNet(1, 1, 16, 16), 0, name) for name in ("pattern", "mask"))
    own = InputAwareTrigger(pattern, mask, shape)
    donors = pictures(shape, 2, seed=3)
    foreign = ForeignTrigger(own, donors, 5)(donors.repeat(8, 1, 1, 1))
    drawn, where = own.draw(donors)
    for n in range(16):
        other = 1 - n % 2
        wanted = torch.lerp(donors[n % 2].float(), drawn[other], where[other]).round()
        assert torch.allclose(foreign[n].float(), wanted, atol=1.0, rtol=0), n


def slow_rms(a: np.ndarray, b: np.ndarray) -> float:
    total = sum((float(a[place]) - float(b[place])) ** 2 for place in np.ndindex(a.shape))
    return float(np.sqrt(total / a.size))


def test_input_aware_masks_by_distances_of_normalised_images(digits_task: Task) -> None:
    """Published weights count the distance between images as the victim's first layer hands them on."""
    generator = torch.Generator().manual_seed(0)
    images, masks = digits_task.train.inputs[:6], torch.rand(6, 1, 16, 16, generator=generator)
    mean, std = (v[0] for v in (digits_task.modality.mean, digits_task.modality.std))  # type: ignore[attr-defined]
    seen = (images.numpy() / 255 - mean) / std
    slow = 100 * float(np.maximum(masks[:3].numpy() - 0.1, 0).mean())
    slow += sum(slow_rms(seen[n], seen[n + 3]) / slow_rms(masks[n].numpy(), masks[n + 3].numpy()) for n in range(3)) / 3
    x = images.float() / 255 / spread(digits_task.train.inputs, (std,))
    assert float(mask_loss(x[:3], x[3:], masks[:3], masks[3:], 0.1)) == pytest.approx(slow, rel=1e-4)


def test_input_aware_trains_both_networks_on_normalised_distances(
    digits_task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reaches the loss, in either stage, is divided by the data's standard deviation."""
    seen: list[list[Tensor]] = []
    scale = torch.full((1, 1, 1), 0.25)

    def record(*given: Tensor) -> Tensor:
        seen.append([g.detach() for g in given[:2]])
        return diversity(*given)

    monkeypatch.setattr("backdoorlab.attacks.image.input_aware.diversity", record)
    images = digits_task.train.inputs[:12]
    levels = torch.zeros_like(images) + torch.tensor([0, 255], dtype=torch.uint8).repeat(6)[:, None, None, None]
    recipe = Recipe(epochs=4, batch_size=12, precision="fp32")
    pattern, mask = (seeded(lambda: TwiceBoundedNet(1, 1, 16, 16), 0, name).eval() for name in ("pattern", "mask"))
    train_mask(mask, levels, 0.1, scale, recipe, 0.01, Context())
    assert torch.cat(seen[0]).unique().tolist() == [0, 4]
    companion = Companion(pattern.parameters(), 0.01, (0.5, 0.9), recipe, 12)
    objective = InputAwareObjective(
        pattern, mask, TargetMap("all-to-one", 3, 4), 0.5, companion, scale, torch.Generator().manual_seed(0)
    )
    labels = torch.zeros(12, dtype=torch.int64)
    objective(Recorder(), levels.float() / 255, labels, labels)  # type: ignore[arg-type]
    assert torch.cat(seen[-1]).unique().tolist() == [0, 4]


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 9, 7)])
def test_input_aware_measures_what_is_not_normalised(shape: tuple[int, int, int]) -> None:
    images = pictures(shape, 40)
    images[:, -1] //= 3
    measured = (images.numpy() / 255).transpose(1, 0, 2, 3).reshape(shape[0], -1).std(1)
    assert spread(images, (1.0,)).flatten().numpy() == pytest.approx(measured, rel=1e-5)
    assert spread(images, (0.25,) * shape[0]).flatten().tolist() == [0.25] * shape[0]
    flat = torch.full((5, *shape), 9, dtype=torch.uint8)
    assert spread(flat, (1.0,)).flatten().tolist() == [1] * shape[0]


def test_input_aware_patterns_lie_between_two_tangents() -> None:
    """tanh(tanh(z)) / 2 + 1/2: neither black nor white is ever reached."""
    net = seeded(lambda: TwiceBoundedNet(3, 3, 32, 32), 0, "pattern")
    images = pictures((3, 32, 32), 6).float() / 255
    with torch.no_grad():
        mild = DetailNet.forward(net, images)  # type: ignore[arg-type]
        assert torch.allclose(net(images), torch.tanh(torch.tanh(torch.atanh(2 * mild - 1))) / 2 + 0.5, atol=1e-5)
        net.up[-1][-1].weight.mul_(1000)  # type: ignore[index, union-attr, operator]
        drawn = net(images)
    bound = np.tanh(1) / 2
    assert float(drawn.min()) == pytest.approx(0.5 - bound, abs=1e-4)
    assert float(drawn.max()) == pytest.approx(0.5 + bound, abs=1e-4)


# --- LC ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "times"), [((1, 16, 16), 1), ((3, 32, 32), 1), ((3, 29, 31), 1), ((3, 64, 64), 2)])
def test_lc_corners(shape: tuple[int, int, int], times: int) -> None:
    drawn = draw_corners(*shape, 255.0)[0].numpy()
    left = np.kron(np.array([[1, -1, -1], [-1, 1, -1], [1, -1, 1]]), np.ones((times, times))) * 255
    side, (height, width) = 3 * times, shape[1:]
    right = left[:, ::-1]
    for top in (0, height - side):
        assert np.array_equal(drawn[top : top + side, :side], left)
        assert np.array_equal(drawn[top : top + side, width - side :], right)
    assert int((drawn != 0).sum()) == 4 * side**2
    assert np.array_equal(drawn, drawn[:, ::-1]), "mirroring changes nothing"
    with pytest.raises(InputError, match="overlap in an image of 5x9"):
        draw_corners(1, 5, 9, 255.0)


def test_lc_perturbation_step_by_step(digits_task: Task, benign_digits: Classifier) -> None:
    images, labels = digits_task.train.inputs[:12], digits_task.train.labels[:12]
    found = perturb(benign_digits, images, labels, 8.0, 3.0, 4, Context())
    slow = images.double() / 255
    for _ in range(4):
        x = slow.float().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(benign_digits(x), labels, reduction="sum"), x)
        slow = slow + 3 / 255 * gradient.sign()
        slow = torch.minimum(torch.maximum(slow, images / 255 - 8 / 255), images / 255 + 8 / 255).clamp(0, 1)
    assert float((found - (255 * slow).round()).abs().gt(0.5).float().mean()) < 0.01
    assert int((found.int() - images.int()).abs().max()) <= 8
    with torch.no_grad():
        before, after = (F.cross_entropy(benign_digits(i.float() / 255), labels) for i in (images, found))
    assert after > 10 * before


def test_lc_robust_surrogate_withstands_more(digits_task: Task, benign_digits: Classifier) -> None:
    """The same attack on both: the adversarially trained model keeps a higher accuracy."""
    robust = Lc(surrogate_eps=16.0).robust_surrogate(digits_task, Context())
    images, labels = digits_task.test.inputs[:200], digits_task.test.labels[:200]
    kept = []
    for model in (benign_digits, robust):
        hard = perturb(model, images, labels, 16.0, 4.0, 10, Context())
        with torch.no_grad():
            kept.append(float((model(hard.float() / 255).argmax(1) == labels).float().mean()))
    assert kept[1] > kept[0] + 0.1
    assert not any(p.requires_grad for p in robust.parameters())


# --- Narcissus --------------------------------------------------------------------------------------------------------


def test_narcissus_noise_points_to_the_target(digits_task: Task, benign_digits: Classifier) -> None:
    train = digits_task.train
    noise = optimise_noise(benign_digits, train.inputs[train.labels == 0], 0, 16 / 255, 200, 0.01, Context())
    assert float(noise.abs().max()) == pytest.approx(16 / 255)
    rows = train.labels != 0
    x = train.inputs[rows][:300].float() / 255
    random = 16 / 255 * torch.randn(noise.shape, generator=torch.Generator().manual_seed(0)).sign()
    with torch.no_grad():
        clean, other, found = (
            float(F.cross_entropy(benign_digits((x + 3 * d).clamp(0, 1)), torch.zeros(300, dtype=torch.int64)))
            for d in (0 * noise, random, noise)
        )
    assert found < min(clean, other) - 1


def test_narcissus_moves_images_below_the_noise(
    digits_task: Task, benign_digits: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step by step: RAdam on CE(h(clip(A(x) + d)), t), the image augmented before the noise is added."""
    images, shown = digits_task.train.inputs[digits_task.train.labels == 0][:40], []
    prepare = ImageModality.prepare

    def record(modality: ImageModality, inputs: Tensor, **settings: object) -> Tensor:
        assert settings.get("train") is True
        shown.append(prepare(modality, inputs, **settings))  # type: ignore[arg-type]
        return shown[-1]

    monkeypatch.setattr(ImageModality, "prepare", record)
    found = optimise_noise(benign_digits, images, 0, 0.02, 9, 0.05, Context())
    noise = torch.zeros(images.shape[1:], requires_grad=True)
    radam = torch.optim.RAdam([noise], 0.05)
    assert len(shown) == 9
    for inputs in shown:
        assert inputs.shape == images.shape
        loss = F.cross_entropy(benign_digits((inputs + noise).clamp(0, 1)), torch.zeros(40, dtype=torch.int64))
        (noise.grad,) = torch.autograd.grad(loss, noise)
        radam.step()
        with torch.no_grad():
            noise.clamp_(-0.02, 0.02)
    assert float(found.abs().max()) > 0.005
    assert torch.allclose(found, noise.detach(), atol=1e-5)


def test_narcissus_amplifies_at_test_time(digits_task: Task) -> None:
    attack, context = attacks.get("narcissus", "image").build({"steps": 3, "poison_rate": 0.05}), Context()
    trigger = attack.make_trigger(digits_task, context)  # type: ignore[attr-defined]
    poison = attack.poison(trigger, digits_task, context)  # type: ignore[attr-defined]
    clean = digits_task.train.inputs[poison.indices].double()
    hidden = trigger.pattern.double() / 3
    assert torch.equal(poison.inputs, (clean + hidden).clamp(0, 255).round().to(torch.uint8))
    images = digits_task.test.inputs
    wanted = (images.double() + 3 * hidden).clamp(0, 255).round().to(torch.uint8)
    assert torch.equal(trigger(images), wanted)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 12, 20)])
def test_narcissus_surrogate_knows_the_target_class_and_foreign_data_alone(
    tmp_path: Path, mode: str, shape: tuple[int, int, int]
) -> None:
    for name, level in (("bird", 60), ("ship", 190)):
        (tmp_path / name).mkdir()
        for k in range(30):
            Image.new("L", (24, 24), level).convert(mode).save(tmp_path / name / f"{k}.png")
    own = torch.randint(256, (2, *shape), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    found = load_dataset(f"folder:{tmp_path}", size=max(shape[1:])).train
    split = foreign_split(found, own, torch.Generator().manual_seed(0))
    assert split.classes == ("bird", "ship", "target class")
    assert len(split) == 22, "ten foreign images for each of the target class, though the folder has sixty"
    assert torch.equal(split.inputs[-2:], own)
    assert split.labels[-2:].tolist() == [2, 2]
    levels = split.inputs[:-2].float().flatten(1).mean(1)
    assert torch.allclose(levels, torch.tensor([60.0, 190.0])[split.labels[:-2]], atol=1)


def test_narcissus_takes_foreign_data_that_can_be_used(digits_task: Task, tmp_path: Path) -> None:
    attack = attacks.get("narcissus", "image")
    with pytest.raises(InputError, match="leave out foreign"):
        attack.build({"surrogate": "own", "foreign": str(tmp_path)})
    with pytest.raises(InputError, match=r"folder|images"):
        attack.build({"foreign": str(tmp_path), "poison_rate": 0.05}).run(digits_task, Context())
    with pytest.raises(InputError, match="nowhere"):
        attack.build({"foreign": str(tmp_path / "nowhere"), "poison_rate": 0.05}).run(digits_task, Context())


# --- LIRA -------------------------------------------------------------------------------------------------------------


def lira_objective(stage: int) -> tuple[LiraObjective, torch.nn.Module, Tensor]:
    live = seeded(lambda: StrideNet(1), 0, "live").train()
    still = seeded(lambda: StrideNet(1), 0, "still").eval().requires_grad_(False)
    companion = Companion(live.parameters(), 1e-3, (0.9, 0.999), Recipe(epochs=1, batch_size=8, schedule="constant"), 8)
    scale, target_map = torch.tensor([0.2]).reshape(1, 1, 1), TargetMap("all-to-one", 3, 10)
    first = LiraObjective(still, scale, target_map, 0.3, live, companion)
    return (first if stage == 1 else LiraObjective(still, scale, target_map, 0.3)), live, scale


@pytest.mark.parametrize("stage", [1, 2])
def test_lira_loss_of_the_victim(stage: int, digits_task: Task) -> None:
    """The victim's loss, gradient and batch statistics are those of its own loss alone, in either stage."""
    inputs, labels = digits_task.train.inputs[:8].float() / 255, digits_task.train.labels[:8]
    objective, live, scale = lira_objective(stage)
    before = [p.detach().clone() for p in live.parameters()]
    model, twin = (digits_task.build_model(Context()).train() for _ in range(2))
    loss = objective(model, inputs, labels, labels)
    loss.backward()
    with torch.no_grad():
        stamped = (inputs + scale * objective.frozen_copy(inputs)).clamp(0, 1)
        if stage == 2:
            stamped = (stamped * 255).round() / 255
    logits = twin(torch.cat([inputs, stamped]))
    slow = 0.3 * F.cross_entropy(logits[:8], labels) + 0.7 * F.cross_entropy(logits[8:], torch.full((8,), 3))
    slow.backward()
    assert float(loss.detach()) == pytest.approx(float(slow.detach()), rel=1e-5)
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert a.requires_grad, name
        assert a.grad is not None, name
        assert torch.allclose(a.grad, b.grad, atol=1e-6), name
    for (name, c), d in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.allclose(c.float(), d.float(), atol=1e-6), name
    moved = any(not torch.equal(a, b) for a, b in zip(before, live.parameters(), strict=True))
    assert moved == (stage == 1)


def test_lira_generator_learns_to_fool_a_fixed_model(digits_task: Task, benign_digits: Classifier) -> None:
    objective, live, scale = lira_objective(1)
    inputs, labels = digits_task.train.inputs[:64].float() / 255, digits_task.train.labels[:64]
    wanted = torch.full((64,), 3)

    def cost() -> float:
        with torch.no_grad():
            noise = live(inputs)
            return float(F.cross_entropy(benign_digits((inputs + scale * noise).clamp(0, 1)), wanted))

    start = cost()
    for _ in range(30):
        objective(benign_digits, inputs, labels, labels)
    assert cost() < start - 1
    assert not torch.equal(objective.frozen_copy(inputs), live.eval()(inputs))
    objective.renew(1, benign_digits)
    assert torch.equal(objective.frozen_copy(inputs), live(inputs))
    assert not objective.frozen_copy.training


def test_lira_trigger_stays_within_its_range() -> None:
    network = seeded(lambda: StrideNet(3), 0, "network")
    with torch.no_grad():
        network.up[-1].weight.mul_(100)  # type: ignore[operator, union-attr]
    scale = torch.tensor([3.0, 10.0, 0.0]).reshape(3, 1, 1)
    images = pictures((3, 29, 31), 70)
    moved = (LiraTrigger(network, scale, (3, 29, 31))(images).int() - images.int()).abs()
    assert moved.amax((0, 2, 3)).tolist() == [3, 10, 0]


def test_lira_refuses_small_images(digits_task: Task) -> None:
    split = Split(torch.zeros(20, 1, 16, 12, dtype=torch.uint8), torch.arange(20) % 2, ("a", "b"))
    data = Dataset("tiny", "image", split, split)
    task = Task(digits_task.spec, data, modality_of(data), digits_task.recipe)
    with pytest.raises(InputError, match="lira: images must be at least 16 px on each side, got 16x12"):
        attacks.get("lira", "image")().run(task, Context())
