"""Strong views of images: ranges, draws from the generator alone, identity cases, and turns by hand."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import ndimage
from torch import Tensor

from backdoorlab.modalities.image import ImageModality
from backdoorlab.modalities.views import (
    gaussian_blur,
    jitter,
    moved,
    resized_crop,
    strong_view,
    turned_and_shifted,
    turned_hue,
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(channels: int = 3, height: int = 12, width: int = 10, count: int = 6) -> Tensor:
    """Uint8."""
    return torch.randint(0, 256, (count, channels, height, width), generator=rng(1), dtype=torch.uint8)


@pytest.mark.parametrize("shape", [(3, 12, 10), (1, 12, 10), (1, 1, 1), (3, 2, 5), (3, 64, 64)], ids=str)
@pytest.mark.parametrize("blur", [True, False])
def test_a_view_is_a_picture_of_the_same_size(shape: tuple[int, int, int], blur: bool) -> None:
    images, modality = pictures(*shape), ImageModality(*shape)
    before = images.clone()
    view = strong_view(images, modality, rng(), blur=blur)
    assert (view.dtype, view.shape) == (torch.float32, images.shape)
    assert float(view.min()) >= 0
    assert float(view.max()) <= 1
    assert torch.equal(images, before)
    assert torch.equal(view, strong_view(images, modality, rng(), blur=blur))
    if min(shape[1:]) > 2:
        assert not torch.equal(view, strong_view(images, modality, rng(1), blur=blur))


def test_pictures_of_a_batch_are_changed_independently() -> None:
    images = pictures(count=1).expand(8, -1, -1, -1).contiguous()
    views = strong_view(images, ImageModality(3, 12, 10), rng())
    assert all(not torch.allclose(views[0], other) for other in views[1:])


def test_the_whole_picture_is_the_identity() -> None:
    images = pictures().float() / 255
    torch.testing.assert_close(resized_crop(images, rng(), smallest=1, flip=False), images, atol=1e-5, rtol=0)


def test_pictures_are_mirrored_only_on_demand() -> None:
    images = pictures(count=40).float() / 255
    seen = resized_crop(images, rng(), smallest=1, flip=True)
    mirrored = (seen - images.flip(-1)).abs().amax((1, 2, 3)) < 1e-5
    same = (seen - images).abs().amax((1, 2, 3)) < 1e-5
    assert bool((mirrored ^ same).all())
    assert 8 < int(mirrored.sum()) < 32


def test_the_modality_says_whether_a_view_is_mirrored() -> None:
    """A ramp from left to right keeps its direction in every crop, unless it is mirrored."""
    ramp = torch.linspace(0, 255, 16).to(torch.uint8).expand(60, 1, 16, 16).contiguous()
    for flip in (False, True):
        view = strong_view(ramp, ImageModality(1, 16, 16, flip=flip), rng(), blur=False)
        rising = view[..., -1].mean((1, 2)) > view[..., 0].mean((1, 2))
        assert bool(rising.all()) != flip


def test_crops_have_at_least_the_smallest_area() -> None:
    """Of a picture that holds its own coordinates, the views show how far they reach."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 33), torch.linspace(0, 1, 33), indexing="ij")
    images = torch.stack([y, x]).expand(200, 2, 33, 33).contiguous()
    seen = resized_crop(images, rng(), smallest=0.3, flip=False)
    tall = seen[:, 0, -1, 16] - seen[:, 0, 0, 16]
    wide = seen[:, 1, 16, -1] - seen[:, 1, 16, 0]
    area, ratio = tall * wide, wide / tall
    assert 0.28 < float(area.min()) < 0.36
    assert 0.9 < float(area.max()) <= 1.001
    assert 0.73 < float(ratio.min()) < 0.8
    assert 1.25 < float(ratio.max()) < 1.36


def test_colors_change_in_most_pictures_and_some_turn_grey() -> None:
    images = pictures(count=400).float() / 255
    seen = jitter(images, rng())
    same = (seen == images).flatten(1).all(1)
    grey = ((seen - seen.mean(1, keepdim=True)).abs() < 1e-5).flatten(1).all(1)
    assert 0.1 < float(same.float().mean()) < 0.22  # 20 % are left alone, of which a fifth turns grey
    assert 0.14 < float(grey.float().mean()) < 0.26
    single = pictures(1, count=50).float() / 255
    assert jitter(single, rng()).shape == single.shape


def test_without_strength_only_grey_is_left() -> None:
    images = pictures(1).float() / 255
    torch.testing.assert_close(jitter(images, rng(), strength=0, hue=0), images)


def test_hues_turn_about_the_grey_axis() -> None:
    red = torch.tensor([1.0, 0.0, 0.0]).reshape(1, 3, 1, 1)
    third = torch.full((1, 1, 1, 1), 2 * math.pi / 3)
    turned = turned_hue(red, third).flatten()
    torch.testing.assert_close(turned, torch.tensor([0.0, 1.0, 0.0]), atol=1e-6, rtol=0)
    grey = torch.full((1, 3, 2, 2), 0.3)
    torch.testing.assert_close(turned_hue(grey, third), grey)


def test_half_of_the_pictures_are_blurred_and_none_gets_brighter() -> None:
    images = torch.zeros(200, 1, 9, 9)
    images[:, :, 4, 4] = 1
    seen = gaussian_blur(images, rng())
    same = (seen == images).flatten(1).all(1)
    assert 0.35 < float(same.float().mean()) < 0.7  # half, and those whose blur is far narrower than a pixel
    torch.testing.assert_close(seen.sum((1, 2, 3)), torch.ones(200))
    row = seen[~same][0, 0]
    torch.testing.assert_close(row, row.T)
    torch.testing.assert_close(row, row.flip(0))


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_quarter_turns_are_exact(quarters: int) -> None:
    images = torch.rand(2, 3, 7, 7, generator=rng())
    zero = torch.zeros(2)
    turned = moved(images, torch.full((2,), quarters * math.pi / 2), zero, zero)
    torch.testing.assert_close(turned, torch.rot90(images, quarters, (2, 3)), atol=1e-5, rtol=0)


def test_shifts_by_whole_pixels_are_exact_and_black_comes_in() -> None:
    images = torch.rand(1, 1, 10, 5, generator=rng())
    seen = moved(images, torch.zeros(1), torch.tensor([0.2]), torch.tensor([-0.4]))
    expected = torch.zeros_like(images)
    expected[..., 2:, :3] = images[..., :-2, 2:]
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=0)


def test_pictures_are_turned_before_they_are_moved() -> None:
    images = torch.rand(1, 1, 8, 8, generator=rng())
    seen = moved(images, torch.tensor([math.pi / 2]), torch.tensor([0.0]), torch.tensor([0.25]))
    expected = torch.zeros_like(images)
    expected[..., 2:] = torch.rot90(images, 1, (2, 3))[..., :-2]
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=0)


def test_turns_by_any_angle_are_those_of_scipy() -> None:
    y, x = torch.meshgrid(torch.arange(21.0), torch.arange(21.0), indexing="ij")
    smooth = torch.exp(-((y - 7) ** 2 + (x - 12) ** 2) / 18)
    zero = torch.zeros(1)
    seen = moved(smooth[None, None], torch.tensor([math.radians(33)]), zero, zero)[0, 0]
    expected = torch.from_numpy(ndimage.rotate(smooth.numpy(), 33, reshape=False, order=1))
    inner = (slice(4, -4), slice(4, -4))  # what comes from outside of the picture is another matter
    torch.testing.assert_close(seen[inner], expected[inner], atol=1e-5, rtol=0)


def test_a_wide_picture_is_turned_in_pixels_not_in_shares_of_its_sides() -> None:
    images = torch.zeros(1, 1, 5, 9)
    images[..., 2, 6] = 1  # two to the right of the centre
    zero = torch.zeros(1)
    seen = moved(images, torch.tensor([math.pi / 2]), zero, zero)[0, 0]
    assert float(seen[0, 4]) == pytest.approx(1, abs=1e-5)  # counterclockwise: two above it


def test_turns_and_shifts_come_from_the_generator() -> None:
    images = torch.rand(4, 1, 8, 8, generator=rng())
    seen = turned_and_shifted(images, rng(), 180, 0.2)
    assert torch.equal(seen, turned_and_shifted(images, rng(), 180, 0.2))
    assert not torch.equal(seen, turned_and_shifted(images, rng(1), 180, 0.2))
    torch.testing.assert_close(turned_and_shifted(images, rng(), 0, 0), images, atol=1e-5, rtol=0)
