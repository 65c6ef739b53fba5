"""SSBA and PoisonInk: edges, ink, interference and gates against slow or foreign counterparts; shared assets."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from backdoorlab.attacks import attacks
from backdoorlab.attacks.common.stego import Ramp, fidelity, interfere, judge
from backdoorlab.attacks.image.poisonink import EdgeInkTrigger, PairedObjective, draw_ink, find_edges
from backdoorlab.attacks.image.ssba import Decoder, Encoder, default_bits
from backdoorlab.core.errors import BackdoorLabError, InputError
from backdoorlab.core.seeding import isolated_rng
from backdoorlab.data.sources import DatasetSpec
from backdoorlab.data.split import Dataset, Split
from backdoorlab.modalities.base import modality_of
from backdoorlab.models.networks.stego import UNet, keep_scale
from backdoorlab.tasks import Task, TaskSpec
from backdoorlab.training import Context, Recipe
from backdoorlab.training.context import MemoryAssets

SHAPES = [(1, 16, 16), (3, 32, 32), (3, 29, 31)]
QUICK = {"steps": 2, "batch_size": 4, "width": 4}


def pictures(count: int, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """Smooth and noisy parts, so that some pixels are edges and some are not."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, shape[0], 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, shape[1:], mode="bicubic", align_corners=False)
    noise = torch.rand(count, *shape, generator=generator) - 0.5
    return (255 * (0.7 * smooth + 0.3) + 60 * noise).clamp(0, 255).to(torch.uint8)


def small_task(shape: tuple[int, int, int] = (1, 16, 16), samples: int = 40) -> Task:
    labels = torch.arange(samples) % 4
    split = Split(pictures(samples, shape), labels, ("a", "b", "c", "d"))
    data = Dataset("small", "image", split, split[torch.arange(16)])
    spec = TaskSpec(dataset=DatasetSpec(name="small"), model="convnet3", recipe="smoke")
    return Task(spec, data, modality_of(data), Recipe(epochs=1, batch_size=8, lr=0.05))


class Told:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def track(self, items: Any, label: str, total: int | None = None) -> Any:
        return iter(items)

    def note(self, text: str) -> None:
        self.notes.append(text)


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


# --- edges and ink ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("threshold", [5.0, 28.0, 35.0])
def test_edges_agree_with_scikit_image(shape: tuple[int, int, int], threshold: float) -> None:
    filters = pytest.importorskip("skimage.filters")
    images = pictures(6, shape)
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


def slow_edge_ink(image: np.ndarray, colour: list[float], opacity: float, threshold: float) -> np.ndarray:
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
                out[c, row, column] = round(x + opacity * (colour[c] - x))
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_edge_ink_is_exact_to_the_grey_level(shape: tuple[int, int, int]) -> None:
    images, colour = pictures(3, shape), [80.0, 160.0, 80.0] if shape[0] == 3 else [127.0]
    # 0.11 and a threshold off the lattice: no value lies so near a tie that float32 and float64 could differ
    trigger = EdgeInkTrigger(torch.tensor(colour)[:, None, None], 0.1103, 20.0003)
    stamped = trigger(images)
    for image, found in zip(images.numpy(), stamped.numpy(), strict=True):
        assert np.array_equal(found, slow_edge_ink(image, colour, 0.1103, 20.0003))
    changed = (stamped != images).any(1, keepdim=True)
    assert not bool((changed & (find_edges(images, 20.0003) == 0)).any())
    assert bool(changed.any())


def test_ink_is_colour_on_edges_and_white_elsewhere() -> None:
    edges = torch.tensor([[[[0.0, 1.0]]]])
    drawing = draw_ink(edges, torch.tensor([0.2, 0.4, 0.6])[:, None, None])
    assert drawing[0, :, 0, 0].tolist() == [1, 1, 1]
    assert torch.allclose(drawing[0, :, 0, 1], torch.tensor([0.2, 0.4, 0.6]))


def test_grey_pictures_get_the_ink_s_grey_and_wrong_channels_are_refused() -> None:
    attack = attacks.get("poisonink", "image")(variant="edge", colour=(10, 200, 60))
    trigger = attack.make_trigger(small_task(), Context())
    assert float(trigger.colour) == pytest.approx(0.299 * 10 + 0.587 * 200 + 0.114 * 60)
    with pytest.raises(InputError, match="made for images of shape"):
        trigger(pictures(2, (3, 16, 16)))
    for colour in ((1, 2), (0, 0, 256)):
        with pytest.raises(InputError, match="colour must be three grey levels"):
            attacks.get("poisonink", "image")(colour=colour)


# --- networks ---------------------------------------------------------------------------------------------------------


def test_interference_is_a_similarity_that_stays_near_the_picture() -> None:
    shape = (64, 1, 20, 40)
    grid = interfere(torch.zeros(shape), torch.Generator().manual_seed(0))
    assert grid.shape == (64, 20, 40, 2)
    # In pixels, neighbours along a row and along a column are equally far apart and at right angles.
    pixels = grid * torch.tensor([20.0, 10.0])
    across, down = pixels[:, 5, 6] - pixels[:, 5, 5], pixels[:, 6, 5] - pixels[:, 5, 5]
    assert torch.allclose(across.norm(dim=1), down.norm(dim=1), atol=1e-4)
    assert torch.allclose((across * down).sum(1), torch.zeros(64), atol=1e-4)
    scale = across.norm(dim=1)
    assert set((scale * 1000).round().int().tolist()) == {875, 1000}
    angle = torch.atan2(across[:, 1].abs(), across[:, 0].abs()) * 180 / math.pi
    assert float(angle.max()) <= 15.01
    assert float(angle.max()) > 10
    mirrored = float((across[:, 0] < 0).float().mean())
    assert 0.25 < mirrored < 0.75
    inner = grid[scale < 0.9].abs()
    assert float(inner[:, 9:11, 19:21].max()) < 0.25, "a crop stays inside the picture"


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 29, 31), (3, 33, 70)], ids=str)
def test_networks_fit_any_size(shape: tuple[int, int, int]) -> None:
    with isolated_rng(0):
        net = keep_scale(UNet(2 * shape[0], *shape, 4))
        encoder, decoder = Encoder(shape, 5, 4), Decoder(shape, 5, 4)
        out = net(torch.rand(2, 2 * shape[0], *shape[1:]))
        messages = torch.randint(0, 2, (2, 5)).float()
        drawn = encoder(torch.rand(2, *shape), messages)
        logits = decoder(torch.rand(2, *shape))
    assert out.shape == (2, *shape) == drawn.shape
    assert float(out.detach().abs().max()) <= 1
    assert logits.shape == (2, 5)


def test_initialisation_keeps_the_scale_of_a_message() -> None:
    with isolated_rng(0):
        plain, kept = Decoder((3, 32, 32), 8, 16), keep_scale(Decoder((3, 32, 32), 8, 16))
        images = torch.rand(32, 3, 32, 32)
        spread = [float(net(images).detach().std(0).mean()) for net in (plain, kept)]
    assert spread[1] > 20 * spread[0], "torch's own initialisation answers nearly the same to every picture"


def test_default_bits_grow_with_the_picture() -> None:
    assert [default_bits(side, side) for side in (4, 16, 28, 32, 64, 128, 224)] == [1, 2, 6, 8, 32, 100, 100]


def test_ramp_waits_for_the_message() -> None:
    ramp = Ramp(100, full=0.5)
    assert [ramp(step, False) for step in range(10)] == [0.0] * 10
    assert ramp(10, True) == pytest.approx(1 / 40)
    assert ramp(29, False) == pytest.approx(0.5)
    assert ramp(49, False) == ramp(99, False) == 1.0


# --- gates ------------------------------------------------------------------------------------------------------------


def test_fidelity_against_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    clean = pictures(5, (3, 20, 24))
    stamped = (clean.int() + torch.randint(-9, 10, clean.shape, generator=torch.Generator().manual_seed(1))).clamp(
        0, 255
    )
    found = fidelity(clean, stamped.to(torch.uint8))
    wanted = metrics.peak_signal_noise_ratio(clean.numpy(), stamped.to(torch.uint8).numpy(), data_range=255)
    assert found["psnr"] == pytest.approx(wanted, abs=1e-9)
    assert found["mean_residual"] == pytest.approx(np.abs(clean.numpy().astype(int) - stamped.numpy()).mean())


def test_gates_name_what_is_missed() -> None:
    told = Told()
    ctx = Context(reporter=told)
    measured = {"psnr": 29.0, "bit_accuracy": 1.0, "mean_residual": float("nan")}
    judged = judge(measured, {"psnr": 30.0, "bit_accuracy": 0.99}, {"mean_residual": 6.0}, "ssba", ctx)
    assert judged["gates_missed"] == ["psnr 29 is below 30", "mean_residual nan is above 6"]
    assert len(told.notes) == 1
    assert "falls short (psnr 29 is below 30" in told.notes[0]
    assert judge({"psnr": 31.0}, {"psnr": 30.0}, {}, "ssba", ctx)["gates_missed"] == []
    assert len(told.notes) == 1


@pytest.mark.parametrize("name", ["ssba", "poisonink"])
def test_an_untrained_pair_is_told_and_noted(name: str) -> None:
    told, task = Told(), small_task()
    backdoor = attacks.get(name, "image").build({**QUICK, "poison_rate": 0.25}).run(task, Context(reporter=told))
    assert backdoor.notes["gates_missed"]
    assert any(note.startswith(f"{name}: the hiding network falls short") for note in told.notes)
    measured = backdoor.trigger.measure(task.test.inputs)  # type: ignore[attr-defined]
    assert {k: backdoor.notes[k] for k in measured} == pytest.approx(measured)


def test_divergence_is_an_error() -> None:
    attack = attacks.get("ssba", "image").build({**QUICK, "steps": 12, "lr": 1e30})
    with pytest.raises(BackdoorLabError, match="training encoder and decoder diverged"):
        attack.make_trigger(small_task(), Context())  # type: ignore[attr-defined]


# --- assets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [("ssba", "ssba-encoder"), ("poisonink", "poisonink-hider")])
def test_networks_are_trained_once_for_all_rates_and_seeds(name: str, kind: str) -> None:
    task, assets = small_task(), Counting()
    made = [
        attacks.get(name, "image")
        .build({**QUICK, "poison_rate": rate})
        .make_trigger(task, Context(seed=seed, assets=assets))  # type: ignore[attr-defined]
        for rate, seed in ((0.1, 0), (0.3, 0), (0.1, 7))
    ]
    assert assets.built == [kind]
    images = task.test.inputs
    assert torch.equal(made[0](images), made[1](images))
    assert torch.equal(made[0](images), made[2](images))
    longer = attacks.get(name, "image").build({**QUICK, "steps": 3})
    longer.make_trigger(task, Context(assets=assets))  # type: ignore[attr-defined]
    assert assets.built == [kind, kind], "other settings need other networks"
    assert attacks.get(name, "image").asset_kinds == (kind,)


def test_another_secret_or_colour_needs_no_other_networks() -> None:
    task, assets = small_task(), Counting()
    ctx, images = Context(assets=assets), task.test.inputs
    ssba, ink = attacks.get("ssba", "image"), attacks.get("poisonink", "image")
    secrets = [ssba.build({**QUICK, "bits": 6, "secret_seed": s}).make_trigger(task, ctx) for s in (0, 1)]  # type: ignore[attr-defined]
    colours = [
        ink.build({**QUICK, "palette": "random", "colour": c}).make_trigger(task, ctx)
        for c in ((80, 160, 80), (200, 0, 0))
    ]  # type: ignore[attr-defined]
    assert assets.built == ["ssba-encoder", "poisonink-hider"]
    for a, b in (secrets, colours):
        assert not torch.equal(a(images), b(images))


@pytest.mark.parametrize("name", ["ssba", "poisonink"])
def test_a_user_s_file_that_does_not_fit_is_an_input_error(name: str) -> None:
    task, assets = small_task(), MemoryAssets()
    attack = attacks.get(name, "image").build(QUICK)
    trigger = attack.make_trigger(task, Context(assets=assets))  # type: ignore[attr-defined]
    good = {k: v for k, v in trigger.state()[0].items() if k.startswith(("encoder.", "decoder."))}
    again = attack.make_trigger(task, Context(assets=Own(good)))  # type: ignore[attr-defined]
    assert torch.equal(again(task.test.inputs), trigger(task.test.inputs))
    with pytest.raises(InputError, match="lacks the tensor"):
        attack.make_trigger(task, Context(assets=Own({"v": torch.zeros(3)})))  # type: ignore[attr-defined]
    wider = attacks.get(name, "image").build({**QUICK, "width": 8})
    with pytest.raises(InputError, match="must have shape"):
        wider.make_trigger(task, Context(assets=Own(good)))  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="has no tensor 'more'"):
        attack.make_trigger(task, Context(assets=Own(good | {"more": torch.zeros(1)})))  # type: ignore[attr-defined]


def test_stored_secret_is_read_from_any_batch() -> None:
    task = small_task()
    trigger = attacks.get("ssba", "image").build({**QUICK, "bits": 5}).make_trigger(task, Context())  # type: ignore[attr-defined]
    stamped = trigger(task.test.inputs)
    assert torch.equal(torch.cat([trigger.read(part) for part in stamped.split(3)]), trigger.read(stamped))
    assert set(trigger.secret.tolist()) <= {0, 1}


# --- the paired mode --------------------------------------------------------------------------------------------------


def test_paired_batches_are_half_clean_and_half_from_the_poisoned_set() -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    task = small_task()
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
    task = small_task()
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
