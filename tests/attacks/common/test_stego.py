"""What hiding networks share: interference, gates, assets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from attack_tools import Counting, Own, Told, textured, textured_task
from backdoorlab.attacks import attacks
from backdoorlab.attacks.common.stego import Ramp, check_quality, fidelity, random_grids
from backdoorlab.attacks.image.ssba import Decoder, Encoder
from backdoorlab.core.errors import InputError
from backdoorlab.core.seeding import isolated_rng
from backdoorlab.models.networks.stego import UNet, keep_scale
from backdoorlab.training import Context
from backdoorlab.training.context import MemoryAssets

QUICK = {"steps": 2, "batch_size": 4, "width": 4}


def test_interference_is_a_similarity_that_stays_near_the_picture() -> None:
    shape = (64, 1, 20, 40)
    grid = random_grids(torch.zeros(shape), torch.Generator().manual_seed(0))
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


def test_ramp_waits_for_the_message() -> None:
    ramp = Ramp(100, full=0.5)
    assert [ramp(step, False) for step in range(10)] == [0.0] * 10
    assert ramp(10, True) == pytest.approx(1 / 40)
    assert ramp(29, False) == pytest.approx(0.5)
    assert ramp(49, False) == ramp(99, False) == 1.0


def test_fidelity_against_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    clean = textured(5, (3, 20, 24))
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
    quality = check_quality(measured, {"psnr": 30.0, "bit_accuracy": 0.99}, {"mean_residual": 6.0}, "ssba", ctx)
    assert quality["gates_missed"] == ["psnr 29 is below 30", "mean_residual nan is above 6"]
    assert len(told.notes) == 1
    assert "falls short (psnr 29 is below 30" in told.notes[0]
    assert check_quality({"psnr": 31.0}, {"psnr": 30.0}, {}, "ssba", ctx)["gates_missed"] == []
    assert len(told.notes) == 1


@pytest.mark.parametrize("name", ["ssba", "poisonink"])
def test_an_untrained_pair_is_told_and_noted(name: str) -> None:
    told, task = Told(), textured_task()
    backdoor = attacks.get(name, "image").build({**QUICK, "poison_rate": 0.25}).run(task, Context(reporter=told))
    assert backdoor.notes["gates_missed"]
    assert any(note.startswith(f"{name}: the hiding network falls short") for note in told.notes)
    measured = backdoor.trigger.measure(task.test.inputs)  # type: ignore[attr-defined]
    assert {k: backdoor.notes[k] for k in measured} == pytest.approx(measured)


@pytest.mark.parametrize(("name", "kind"), [("ssba", "ssba-encoder"), ("poisonink", "poisonink-hider")])
def test_networks_are_trained_once_for_all_rates_and_seeds(name: str, kind: str) -> None:
    task, assets = textured_task(), Counting()
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


def test_another_secret_or_color_needs_no_other_networks() -> None:
    task, assets = textured_task(), Counting()
    ctx, images = Context(assets=assets), task.test.inputs
    ssba, ink = attacks.get("ssba", "image"), attacks.get("poisonink", "image")
    secrets = [ssba.build({**QUICK, "bits": 6, "secret_seed": s}).make_trigger(task, ctx) for s in (0, 1)]  # type: ignore[attr-defined]
    colors = [
        ink.build({**QUICK, "palette": "random", "rgb": c}).make_trigger(task, ctx)
        for c in ((80, 160, 80), (200, 0, 0))
    ]  # type: ignore[attr-defined]
    assert assets.built == ["ssba-encoder", "poisonink-hider"]
    for a, b in (secrets, colors):
        assert not torch.equal(a(images), b(images))


@pytest.mark.parametrize("name", ["ssba", "poisonink"])
def test_a_user_s_file_that_does_not_fit_is_an_input_error(name: str) -> None:
    task, assets = textured_task(), MemoryAssets()
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
