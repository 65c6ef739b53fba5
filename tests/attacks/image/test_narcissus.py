"""Narcissus: against slow, independent implementations and closed forms; its options; its effect."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from backdoorlab.attacks import attacks
from backdoorlab.attacks.image.narcissus import foreign_split, optimise_noise
from backdoorlab.core.errors import InputError
from backdoorlab.data.sources import load_dataset
from backdoorlab.modalities.image import ImageModality
from backdoorlab.models import Classifier
from backdoorlab.tasks import Task
from backdoorlab.training import Context
from effect_tools import LOST, Numbers, case, effects, least, most, planted


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


@case("attack/image/narcissus", asr=least(0.8), acc_lost=LOST, benign_asr=most(0.4))
def effect_of_narcissus(seed: int) -> Numbers:
    return planted(seed, "narcissus", target=1, poison_rate=0.09, eps=32.0, factor_test=3.0)[1]


test_effect = effects(__name__)
