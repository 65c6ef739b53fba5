"""Input-aware: against slow, independent implementations and closed forms; its options; its effect."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from attack_tools import GREY, make, pictures, quick_backdoor, tiny_task
from backdoorlab.attacks import attacks
from backdoorlab.attacks.common.generators import seeded
from backdoorlab.attacks.image.input_aware import (
    ForeignTrigger,
    InputAware,
    InputAwareObjective,
    InputAwareTrigger,
    TwiceBoundedNet,
    diversity,
    mask_loss,
    sharpen,
    spread,
    train_mask,
)
from backdoorlab.attacks.targets import TargetMap
from backdoorlab.models.networks.generators import DetailNet
from backdoorlab.tasks import Task
from backdoorlab.testing import check_poison
from backdoorlab.training import Context, Recipe
from effect_tools import LOST, OBEYS, Numbers, case, effects, least, most, planted


def test_input_aware_spares_the_target_class() -> None:
    cls = attacks.get("input_aware", "image")
    assert cls is InputAware
    spared = make(cls, exclude_target=True).run(tiny_task(GREY), Context(seed=3))
    check_poison(make(cls, exclude_target=True), tiny_task(GREY), spared.poison)
    assert bool((tiny_task(GREY).train.labels[spared.poison.indices[spared.poison.roles == 1]] != 0).all())
    weights = zip(
        spared.model.state_dict().values(), quick_backdoor("input_aware").model.state_dict().values(), strict=True
    )
    assert any(not torch.equal(a, b) for a, b in weights), "the option reaches the training loop"


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


class Recorder(torch.nn.Module):
    """A classifier that remembers what it was shown."""

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen = inputs.detach()
        return inputs.flatten(1)[:, :4]


@pytest.mark.parametrize(("rate", "attacked", "crossed"), [(0.25, 3, 3), (0.5, 6, 6), (0.75, 9, 3), (1.0, 12, 0)])
def test_input_aware_batches(rate: float, attacked: int, crossed: int) -> None:
    shape = (1, 16, 16)
    pattern, mask = (seeded(lambda: TwiceBoundedNet(1, 1, 16, 16), 0, name).eval() for name in ("pattern", "mask"))
    objective = InputAwareObjective(
        pattern,
        mask,
        TargetMap("all-to-one", 3, 4),
        rate,
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
    assert all(p.grad is None for p in mask.parameters())
    assert all(p.grad is not None for p in pattern.parameters())


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
    objective = InputAwareObjective(
        pattern, mask, TargetMap("all-to-one", 3, 4), 0.5, scale, torch.Generator().manual_seed(0)
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


@case("attack/image/input_aware", asr=least(0.8), acc_lost=LOST, benign_asr=OBEYS, cross_lost=most(0.45))
def effect_of_input_aware(seed: int) -> Numbers:
    return planted(seed, "input_aware", poison_rate=0.33, density=0.2, generator_lr=0.002)[1]


test_effect = effects(__name__)
