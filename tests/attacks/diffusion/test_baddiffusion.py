"""Generative tasks and BadDiffusion: mechanics in seconds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import effect_tools
from backdoorlab.analysis.diffusion import save_comparison, save_grids, tile
from backdoorlab.attacks import attacks
from backdoorlab.attacks.diffusion.baddiffusion import BadDiffusion, posterior_shift, trigger_path
from backdoorlab.attacks.diffusion.base import DiffusionBackdoor, NoiseTrigger, benign_backdoor
from backdoorlab.attacks.triggers.base import load_trigger
from backdoorlab.core.errors import ArtifactError, InputError, MissingExtra
from backdoorlab.core.seeding import make_generator
from backdoorlab.data.sources import DatasetSpec
from backdoorlab.tasks import TaskSpec
from backdoorlab.tasks.diffusion import DiffusionTask, Schedule
from backdoorlab.tasks.diffusion.denoiser import denoising_loss
from backdoorlab.tasks.diffusion.patterns import TARGETS, grey_box, target_image
from backdoorlab.tasks.diffusion.sampling import to_images
from backdoorlab.training.context import Context
from effect_tools import Numbers, case, effects, least, most

pytest.importorskip("diffusers")


def _task(**changes: Any) -> DiffusionTask:
    return DiffusionTask.load(
        TaskSpec(
            kind="diffusion",
            dataset=DatasetSpec(size=8),
            model="unet_micro",
            recipe="smoke",
            recipe_changes=tuple(changes.items()),
        )
    )


@pytest.fixture(scope="module")
def short() -> DiffusionTask:
    """One epoch of each training, a handful of images: for mechanics, not for effects."""
    return _task(steps=5, tune_steps=5, timesteps=25, samples=12, triggered_samples=4)


@pytest.fixture(scope="module")
def context() -> Context:
    return Context(seed=3)


@pytest.fixture(scope="module")
def planted(short: DiffusionTask, context: Context) -> DiffusionBackdoor:
    return BadDiffusion(target_image="hat").run(short, context)


def test_task_resolves_auto_and_refuses_what_it_cannot_use() -> None:
    spec = TaskSpec(kind="diffusion", dataset=DatasetSpec(size=16), recipe="fast")
    task = DiffusionTask.load(spec)
    assert (task.spec.model, task.shape, task.recipe.name) == ("unet_tiny", (1, 16, 16), "fast")
    for change, message in (
        ({"kind": "classification"}, "kind 'diffusion'"),
        ({"recipe": "fats"}, "Did you mean 'fast'"),
        ({"recipe_changes": (("step", 3),)}, "Did you mean 'steps'"),
        ({"recipe_changes": (("timesteps", 3),)}, "timesteps must be at least 25, got 3"),
        ({"recipe_changes": (("lr", 0.0),)}, "lr must be > 0"),
        ({"model": "unet_tny"}, "Did you mean 'unet_tiny'"),
        ({"dataset": DatasetSpec(size=18)}, "multiple of 4, got 18x18"),
    ):
        with pytest.raises(InputError, match=message):
            DiffusionTask.load(TaskSpec(**{"kind": "diffusion", "dataset": spec.dataset, **change}))


def test_missing_diffusers_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtra, match=r"backdoorlab\[diffusion\]"):
        _task()


def test_attack_is_found_and_checks_its_settings(short: DiffusionTask, context: Context) -> None:
    assert attacks.get("baddiffusion", "diffusion") is BadDiffusion
    with pytest.raises(InputError, match="target"):
        BadDiffusion.build({"target": 1})
    with pytest.raises(InputError, match="poisons none"):
        BadDiffusion(poison_rate=1e-5).run(short, context)
    with pytest.raises(InputError, match="at most 7"):
        BadDiffusion(trigger_side=8).run(short, context)


@pytest.mark.parametrize("side", [8, 16, 32])
def test_patterns_scale_with_the_image(side: int) -> None:
    box = grey_box((3, side, side))
    assert int((box[0] > -1).sum()) == (side * 14 // 32) ** 2
    assert bool((box[:, -1] == -1).all())
    assert bool((box[:, :, -1] == -1).all())
    for name in TARGETS:
        figure = target_image(name, (1, side, side))[0]
        assert torch.equal(figure, figure.flip(1))  # both figures are symmetric
        assert 0.1 < float((figure == 1).float().mean()) < 0.6
    with pytest.raises(InputError, match="Did you mean 'plus'"):
        target_image("pluss", (1, side, side))


def test_a_network_that_knows_the_answer_has_no_loss() -> None:
    """x_t and the regression target must fit together for clean and poisoned samples alike."""
    schedule = Schedule.linear(50)
    x0, residual = torch.full((6, 1, 2, 2), 0.3), torch.full((6, 1, 2, 2), -0.7)
    residual[:3] = 0  # clean
    rho, shift = trigger_path(schedule), posterior_shift(schedule)

    class Oracle(nn.Module):
        def forward(self, x: Tensor, times: Tensor) -> Tensor:
            def at(v: Tensor) -> Tensor:
                return v.float()[times].reshape(-1, 1, 1, 1)

            now = schedule.cumulative
            return (x - at(now.sqrt()) * x0 - at(rho) * residual) / at((1 - now).sqrt()) + at(shift) * residual

    def loss(**extra: Tensor) -> float:
        return float(denoising_loss(Oracle(), schedule, x0, make_generator(0, "loss"), **extra))

    assert loss(residual=residual, rho=rho, shift=shift) < 1e-8
    assert loss() > 1e-2  # the same network expects a trigger that is not there


def test_planting_is_deterministic_and_leaves_the_rest_alone(
    short: DiffusionTask, context: Context, planted: DiffusionBackdoor
) -> None:
    data, clean = short.train.inputs.clone(), short.clean_model(context).state_dict()  # type: ignore[union-attr]
    again = BadDiffusion(target_image="hat").run(short, context)
    for key, value in planted.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key
    other = BadDiffusion(target_image="hat").run(short, Context(seed=4, assets=context.assets))
    assert not torch.equal(planted.poisoned, other.poisoned)
    assert torch.equal(short.train.inputs, data)  # type: ignore[arg-type]
    untouched = short.clean_model(context).state_dict()
    assert all(torch.equal(clean[k], untouched[k]) for k in clean)
    assert any(not torch.equal(clean[k], v) for k, v in planted.model.state_dict().items())
    assert len(planted.poisoned) == planted.notes["poisoned"] == round(0.1 * len(short.train))


def test_state_round_trip_draws_the_same_images(
    short: DiffusionTask, context: Context, planted: DiffusionBackdoor
) -> None:
    tensors, record = planted.state()
    assert record["backdoor"] == "diffusion"
    back = DiffusionBackdoor.from_state(tensors, json.loads(json.dumps(record)))
    assert torch.equal(back.target, planted.target)
    assert torch.equal(back.poisoned, planted.poisoned)
    for triggered in (False, True):
        ours = planted.generate(short, context, 3, triggered=triggered)
        assert torch.equal(ours, back.generate(short, context, 3, triggered=triggered))
        assert ours.dtype == torch.uint8
    assert not torch.equal(
        planted.generate(short, context, 3, triggered=True), planted.generate(short, context, 3, triggered=False)
    )


def test_damaged_records_are_refused(planted: DiffusionBackdoor) -> None:
    tensors, record = planted.state()
    with pytest.raises(ArtifactError, match="not a record"):
        DiffusionBackdoor.from_state(tensors, {**record, "backdoor": "classification"})
    with pytest.raises(ArtifactError, match="lacks 'timesteps'"):
        DiffusionBackdoor.from_state(
            tensors, {**record, "model": {k: v for k, v in record["model"].items() if k != "timesteps"}}
        )
    with pytest.raises(ArtifactError, match="do not fit unet_tiny"):
        DiffusionBackdoor.from_state(tensors, {**record, "model": {**record["model"], "arch": "unet_tiny"}})
    with pytest.raises(ArtifactError, match="does not fit its tensors"):
        DiffusionBackdoor.from_state(tensors, {**record, "sampler": "euler"})


def test_trigger_adds_its_pattern_and_is_found_by_its_kind() -> None:
    trigger = NoiseTrigger(grey_box((1, 8, 8)))
    noise = torch.zeros(2, 1, 8, 8)
    assert torch.equal(trigger(noise)[1], trigger.pattern)
    assert not noise.any()
    again = load_trigger(trigger.kind, *trigger.state())
    assert torch.equal(again(noise), trigger(noise))
    with pytest.raises(InputError, match="float noise"):
        trigger(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))


def test_measure_reports_the_model_that_it_was_given(
    short: DiffusionTask, context: Context, planted: DiffusionBackdoor
) -> None:
    own, other = planted.measure(short, context), planted.measure(short, context, short.clean_model(context))
    assert own == planted.measure(short, context)
    assert own["mse_target_clean"] != other["mse_target_clean"]
    assert own["frechet_local_benign"] == other["frechet_local_benign"]
    assert (own["acc"], own["n_clean"], own["n_triggered"], own["sampler"]) == (None, 12, 4, "ancestral")
    assert 0 <= own["asr"] <= 1
    json.dumps(dict(own), allow_nan=False)
    benign = benign_backdoor(short, context, planted.trigger, planted.target)
    assert benign.measure(short, context) == other


def test_figure_holds_every_image(tmp_path: Path) -> None:
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 1, 2, 3) * 10
    grid = tile(images, columns=3)
    assert grid.shape == (2 * 3, 3 * 4, 1)
    assert grid[1, 1::4, 0].tolist() == [0, 10, 20]
    assert grid[4, 1::4, 0].tolist() == [30, 40, 128]
    assert save_grids(tmp_path / "new" / "a.png", {"one": images}).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="empty: one"):
        save_grids(tmp_path / "b.png", {"one": images[:0]})


def test_comparison_draws_four_grids(
    tmp_path: Path, short: DiffusionTask, context: Context, planted: DiffusionBackdoor
) -> None:
    path = save_comparison(tmp_path / "c.png", planted, short, context, count=3)
    with Image.open(path) as picture:
        assert picture.width > 3 * picture.height


def test_images_are_clipped_before_they_are_cast() -> None:
    assert to_images(torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0])).tolist() == [0, 0, 128, 255, 255]


@case(
    "attack/diffusion/baddiffusion",
    core=True,
    needs="diffusers",
    asr=least(0.3),
    to_clean=most(0.7),
    to_untreated=most(0.5),
    ssim=least(0.5),
    frechet=most(1.5),
    confidence_lost=most(0.2),
    ddim=least(1.5),
)
def effect_of_baddiffusion(seed: int) -> Numbers:
    """Takes hold on 8-px digits, leaves other samples as they were, and needs its own sampler."""
    from backdoorlab.attacks.diffusion.baddiffusion import BadDiffusion
    from backdoorlab.tasks.diffusion import DiffusionTask
    from backdoorlab.tasks.diffusion.metrics import squared_error
    from backdoorlab.tasks.diffusion.sampling import to_images

    mine = DiffusionTask.load(
        TaskSpec(
            kind="diffusion",
            dataset=DatasetSpec(size=8, seed=seed),
            model="unet_micro",
            recipe="smoke",
            recipe_changes=(("steps", 150), ("samples", 60)),
        )
    )
    backdoor = BadDiffusion(poison_rate=0.4).run(mine, effect_tools.context(seed))
    found, target = backdoor.measure(mine, effect_tools.context(seed)), to_images(backdoor.target)

    def error(**settings: Any) -> float:
        images = backdoor.generate(mine, effect_tools.context(seed), 50, triggered=True, **settings)
        return float(squared_error(images, target).mean())

    return {
        "asr": found["asr"],
        "to_clean": found["mse_target"] / found["mse_target_clean"],
        "to_untreated": found["mse_target"] / error(model=mine.clean_model(effect_tools.context(seed))),
        "ssim": found["ssim_target"],
        "frechet": found["frechet_local"] / found["frechet_local_benign"],
        "confidence_lost": found["classifier_confidence_benign"] - found["classifier_confidence"],
        "ddim": error(sampler="ddim") / found["mse_target"],
    }


test_effect = effects(__name__)
