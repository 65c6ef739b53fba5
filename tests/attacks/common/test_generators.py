"""Networks that draw triggers: their sizes, gradients, training, and what they must not spend."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attack_tools import pictures
from backdoorlab.attacks.common.generators import (
    CHUNK,
    AlternatingStep,
    JointStep,
    generate,
    pack,
    seeded,
    straight_through,
    unpack,
)
from backdoorlab.modalities.image import random_crop
from backdoorlab.models import Classifier
from backdoorlab.models.networks.generators import DetailNet, StrideNet
from backdoorlab.tasks import Task
from backdoorlab.training import Batch, Context, Recipe, context, cross_entropy


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


class Shift(nn.Module):
    """A generator that adds a number to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(0.5))


@pytest.mark.parametrize("joint", [True, False])
def test_generators_are_trained_by_adam_with_the_recipes_schedule(joint: bool, digits_task: Task) -> None:
    """Against Adam with the rate set by hand, over three epochs; neither network's gradients reach the other one."""
    split = digits_task.train[torch.arange(32)]
    recipe = Recipe(epochs=3, batch_size=16, lr=0.05, schedule="onecycle", augment=False, precision="fp32", clip=0.5)
    generator, plain = Shift(), Shift()

    def pull(network: Shift) -> Tensor:
        return (network.by - 3).square() * 0.01

    def objective(model: Classifier, inputs: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        loss = F.cross_entropy(model(inputs), labels)
        return loss + pull(generator) if joint else loss

    def beside(model: Classifier, batch: Batch) -> Tensor:
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
        return pull(generator) + 0 * model(batch.inputs).sum()

    settings = {"network": generator, "lr": 0.1, "betas": (0.5, 0.9)}
    step = partial(JointStep, **settings) if joint else partial(AlternatingStep, loss=beside, **settings)
    alone, _ = digits_task.fit(split, Context(), recipe=recipe)
    model, log = digits_task.fit(split, Context(), recipe=recipe, objective=objective, step=step)
    adam = torch.optim.Adam(plain.parameters(), 0.1, (0.5, 0.9))
    for number in range(6):
        adam.param_groups[0]["lr"] = 0.1 * recipe.factor(number, 2)
        adam.zero_grad()
        pull(plain).backward()
        adam.step()
    assert log.steps == 6
    assert float(generator.by) == pytest.approx(float(plain.by), rel=1e-5)
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_generator_that_had_no_part_in_the_loss_stays(digits_task: Task) -> None:
    model, generator = digits_task.build_model(Context()), Shift()
    step = JointStep(model, Recipe(precision="fp32"), cross_entropy, network=generator, lr=0.1)
    images = digits_task.train.inputs[:4].float() / 255
    step(Batch((images,), digits_task.train.labels[:4], torch.arange(4)))
    assert float(generator.by) == 0.5


class Spy(nn.Module):
    """A convolution that remembers what came in and in which precision it worked."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.seen: list[tuple[int, bool]] = []
        self.dtypes: set[torch.dtype] = set()

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.conv(x)
        self.seen.append((len(x), x.is_contiguous(memory_format=torch.channels_last)))
        self.dtypes.add(made.dtype)
        return made


@pytest.mark.parametrize("fast", [True, False])
def test_stamping_runs_in_the_precision_of_evaluation_and_once(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "fast_bf16", lambda device: fast)
    spy = seeded(Spy, 0, "spy")
    assert isinstance(spy, Spy)
    found = generate(spy, torch.rand(CHUNK + 5, 3, 8, 8, generator=torch.Generator().manual_seed(2)))
    assert spy.seen == [(CHUNK, True)] * 2
    assert spy.dtypes == {torch.bfloat16 if fast else torch.float32}
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    assert found.shape == (CHUNK + 5, 3, 8, 8)


def test_generated_pictures_are_those_of_the_network() -> None:
    network = seeded(lambda: DetailNet(3, 3, 32, 32), 0, "network").eval()
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = network(images)
    assert float((generate(network, images) - plain).abs().max()) < 4 / 255
    narrow = seeded(lambda: DetailNet(3, 1, 32, 32), 0, "narrow")
    assert generate(narrow, images[:0]).shape == (0, 1, 32, 32), "no pictures, but of the form that the network draws"


def test_gradients_pass_a_random_crop_without_a_sum_over_all_windows() -> None:
    """A crop moves pixels; the adjoint of its windows would make a tensor of all (2 pad + 1)^2 of them."""

    def drawn() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    images = torch.rand(6, 2, 9, 7, dtype=torch.float64, generator=drawn(), requires_grad=True)
    cropped = random_crop(images, 2, drawn())
    assert torch.equal(cropped.detach(), random_crop(images.detach(), 2, drawn()))
    waiting, names = [cropped.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None:
            names.add(type(node).__name__)
            waiting += [before for before, _ in node.next_functions]
    assert not any("Unfold" in name for name in names), names
    weights = torch.rand(images.shape, dtype=torch.float64, generator=drawn())
    (gradient,) = torch.autograd.grad(cropped, images, weights)
    rows = torch.arange(images.numel(), dtype=torch.float64).reshape(images.shape) + 1  # where each pixel went
    went = random_crop(rows, 2, drawn()).flatten().long()
    expected = torch.zeros(images.numel() + 1, dtype=torch.float64).index_add(0, went, weights.flatten())[1:]
    assert torch.equal(gradient.flatten(), expected)
