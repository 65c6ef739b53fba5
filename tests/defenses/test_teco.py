"""TeCo: its deviation by hand, and the corruptions that it compares."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from backdoorlab.attacks import Backdoor
from backdoorlab.core.errors import InputError
from backdoorlab.defenses import DefenderView
from backdoorlab.defenses.common.corruptions import SEVERITIES, STRENGTHS, Corruptions
from backdoorlab.defenses.input.teco import TeCo, deviation, first_change, robustness
from backdoorlab.modalities.image import ImageModality
from backdoorlab.models import Classifier
from backdoorlab.tasks import Task
from backdoorlab.training import Context
from effect_tools import Numbers, case, detected, detected_shapes, effects, least, most, planted

SHAPES = [(1, 16, 16), (3, 32, 32), (3, 29, 31), (1, 9, 14), (3, 64, 48)]


def corruptions(shape: tuple[int, int, int], strengths: str = "small") -> Corruptions:
    return Corruptions(shape, strengths, torch.Generator().manual_seed(0), torch.device("cpu"))


def smooth(shape: tuple[int, int, int], count: int = 3) -> Tensor:
    _, height, width = shape
    rows, columns = torch.linspace(0, 3, height)[:, None], torch.linspace(0, 4, width)
    phases = torch.linspace(0, 1, count * shape[0]).reshape(count, shape[0], 1, 1)
    return (torch.sin(rows + columns + 3 * phases) + 1) / 2.5


def test_severity_of_the_first_change_and_its_deviation() -> None:
    changed = torch.zeros(3, 5, 2, dtype=torch.bool)
    changed[0, 2:, 0] = True  # from severity 3 on
    changed[1, 0, 0] = True  # at once, and back
    changed[:, 4, 1] = True  # always at 5
    first = first_change(changed)
    assert first.tolist() == [[3, 5], [1, 5], [6, 5]]
    mean = (3 + 1 + 6) / 3
    wanted = math.sqrt(sum((v - mean) ** 2 for v in (3, 1, 6)) / 3)
    assert deviation(first).tolist() == pytest.approx([wanted, 0.0])


@pytest.mark.parametrize("strengths", list(STRENGTHS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_corruptions_of_any_picture(shape: tuple[int, int, int], strengths: str) -> None:
    """A valid picture, made from the one given, which stays as it is; severity 5 hurts more than severity 1."""
    x, made = smooth(shape), corruptions(shape, strengths)
    before = x.clone()
    assert len(made.names) == 15
    for name in made.names:
        found = [made(x, name, s) for s in range(1, SEVERITIES + 1)]
        assert torch.equal(x, before), name
        for y in found:
            assert y.shape == x.shape and float(y.min()) >= 0 and float(y.max()) <= 1 and bool(y.isfinite().all())
            assert torch.allclose(y * 255, (y * 255).round(), atol=1e-3), name
        hurt = [float((y - x).square().mean()) for y in (found[0], found[-1])]
        assert hurt[1] >= hurt[0] and hurt[1] > 1e-6, (name, hurt)
        alone = made(x[1:2], name, 3)
        assert torch.allclose(alone, found[2][1:2], atol=1e-2), f"{name}: depends on the others in the batch"


def test_corruptions_that_have_a_closed_form() -> None:
    shape = (1, 16, 16)
    x, made = smooth(shape, 1), corruptions(shape, "large")

    def stored(y: Tensor) -> Tensor:
        return (y.clamp(0, 1) * 255).round() / 255

    assert torch.allclose(made(x, "brightness", 2), stored(x + 0.2), atol=1e-6)
    assert torch.allclose(made(x, "contrast", 1), stored((x - x.mean()) * 0.4 + x.mean()), atol=4e-3)
    pixelated = made(x, "pixelate", 2)
    assert torch.equal(pixelated[..., ::2, ::2], pixelated[..., 1::2, 1::2])
    assert float(made(torch.full((1, *shape), 0.5), "jpeg_compression", 5).std()) == 0
    assert torch.allclose(made(torch.full((1, *shape), 0.4), "zoom_blur", 3), stored(torch.full((1, *shape), 0.4)))
    impulses = made(torch.full((1, 1, 16, 16), 0.5), "impulse_noise", 5)
    assert float(((impulses == 0) | (impulses == 1)).float().mean()) == pytest.approx(0.27, abs=0.06)


def test_jpeg_agrees_with_pillow() -> None:
    """Grey pictures: the same quantised cosine blocks, up to rounding."""
    import io

    import numpy as np
    from PIL import Image

    x = smooth((1, 24, 40), 1)
    stored = (x[0, 0] * 255).round().to(torch.uint8)
    for severity, quality in enumerate(STRENGTHS["large"].jpeg, 1):
        buffer = io.BytesIO()
        Image.fromarray(stored.numpy()).save(buffer, "JPEG", quality=quality)
        wanted = torch.from_numpy(np.array(Image.open(buffer))).float()
        found = corruptions((1, 24, 40), "large")(stored[None, None].float() / 255, "jpeg_compression", severity)
        # A coefficient halfway between two steps may be rounded the other way; that is one step in one block.
        assert float((found[0, 0] * 255 - wanted).abs().mean()) <= 1


class Bright(nn.Module):
    """Class 1 if the mean exceeds a half."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(1) - self.middle
        return torch.stack([-mean, mean], 1)


def test_robustness_starts_from_the_image_as_given() -> None:
    """A dark picture of mean 0.35 turns bright at severity 2 of brightness (+0.2) and never under blur."""
    model = Classifier(Bright(), ImageModality(1, 16, 16), "bright", 2)
    images = torch.full((2, 1, 16, 16), round(0.35 * 255), dtype=torch.uint8)
    made = corruptions((1, 16, 16), "large")
    first = dict(zip(made.names, robustness(model, images, made).tolist(), strict=True))
    assert first["brightness"] == [2, 2]
    assert first["contrast"] == first["defocus_blur"] == first["jpeg_compression"] == [6, 6]


def test_needs_clean_samples(badnets_digits: Backdoor, digits_task: Task) -> None:
    with pytest.raises(InputError, match="clean samples"):
        TeCo().run(DefenderView(model=badnets_digits.model, clean=digits_task.train[torch.arange(0)]), Context())


@case("defense/input/teco_wanet", auroc=least(0.8), fpr=most(0.15))
def wanet(seed: int) -> Numbers:
    """Warped digits survive blur but no noise."""
    return detected(seed, TeCo(), planted(seed, "wanet", poison_rate=0.1, s=2.0)[0])


@case("defense/input/teco", asr=least(0.9), auroc=least(0.8), tpr=least(0.3), fpr=most(0.2))
def badnets(seed: int) -> Numbers:
    """Shapes: light on black, clean digits withstand blur and nothing else, which is what the method takes for a
    trigger."""
    return detected_shapes(seed, TeCo())


test_effect = effects(__name__)
