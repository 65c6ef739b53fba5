"""Closed-form triggers against slow, independent implementations: equal to the last grey level."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn
from scipy.ndimage import map_coordinates
from torch import Tensor
from torch.nn.functional import cross_entropy

from backdoorlab.attacks.common.pictures import key_image, scenes
from backdoorlab.attacks.draws import indexed_uniform, sample_uniform
from backdoorlab.attacks.image.adap_blend import piece_index, random_half
from backdoorlab.attacks.image.adap_patch import AdapPatch, draw_patches
from backdoorlab.attacks.image.badnets import BadNets
from backdoorlab.attacks.image.blended import Blended
from backdoorlab.attacks.image.bpp import ForeignResidualTrigger, QuantizeTrigger
from backdoorlab.attacks.image.ctrl import Ctrl
from backdoorlab.attacks.image.ftrojan import FTrojan
from backdoorlab.attacks.image.lf import Lf, low_frequency_field, optimise_pattern
from backdoorlab.attacks.image.refool import ReflectionTrigger, Refool, expose, ghost, out_of_focus, vignette
from backdoorlab.attacks.image.sig import Sig
from backdoorlab.attacks.image.wanet import NoiseWarpTrigger, WarpTrigger, draw_field, warp_grid
from backdoorlab.attacks.triggers.pixels import AdditiveTrigger, BlendTrigger, constant_blend
from backdoorlab.data.sources import DatasetSpec
from backdoorlab.data.split import Dataset, Split
from backdoorlab.modalities.base import modality_of
from backdoorlab.modalities.filters import dct_matrix, gaussian_blur
from backdoorlab.models import Classifier
from backdoorlab.tasks import Task, TaskSpec
from backdoorlab.training import Context, Recipe

SIZES = [(1, 16, 16), (3, 32, 32), (3, 29, 31), (3, 64, 64)]


def pictures(shape: tuple[int, ...], count: int = 6, seed: int = 0) -> Tensor:
    """Random pictures, the last two black and white."""
    images = torch.randint(0, 256, (count, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    images[-2], images[-1] = 0, 255
    return images


def task_of(shape: tuple[int, ...]) -> Task:
    split = Split(pictures(shape, 20), torch.arange(20) % 2, ("a", "b"))
    data = Dataset("tiny", "image", split, split)
    return Task(TaskSpec(dataset=DatasetSpec(name="tiny"), model="convnet3"), data, modality_of(data), Recipe())


def grey(value: float) -> int:
    """One pixel: clip, round half to even, cast."""
    return int(np.rint(min(255.0, max(0.0, float(value)))))


def per_pixel(images: Tensor, rule) -> Tensor:  # type: ignore[no-untyped-def]
    """Apply ``rule(value, channel, row, column)`` to each pixel of each picture."""
    out = images.clone()
    for n, c, i, j in np.ndindex(*images.shape):
        out[n, c, i, j] = grey(rule(float(images[n, c, i, j]), c, i, j))
    return out


# --- patches, blends, waves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "side"), [((1, 16, 16), 2), ((3, 32, 32), 3), ((3, 29, 31), 3), ((3, 64, 64), 6)])
def test_badnets_changes_the_corner_only(shape: tuple[int, int, int], side: int) -> None:
    images = pictures(shape, 3)
    trigger = BadNets(color=200).make_trigger(task_of(shape), Context())
    height, width = shape[1:]
    slow = per_pixel(images, lambda x, c, i, j: 200 if i >= height - side and j >= width - side else x)
    assert torch.equal(trigger(images), slow)


def test_badnets_checker_may_contain_black() -> None:
    images = pictures((3, 32, 32), 3)
    attack = BadNets(pattern="checker", size=4, position="top-left", offset=1)
    slow = per_pixel(images, lambda x, c, i, j: (255 if (i + j) % 2 == 0 else 0) if 1 <= i < 5 and 1 <= j < 5 else x)
    assert torch.equal(attack.make_trigger(task_of((3, 32, 32)), Context())(images), slow)


@pytest.mark.parametrize("shape", SIZES[:3])
def test_blended_is_a_linear_blend(shape: tuple[int, int, int]) -> None:
    images, attack = pictures(shape, 4), Blended(alpha_train=0.35)
    trigger = attack.make_trigger(task_of(shape), Context())
    key = trigger.keys[0]
    for alpha, fast in (
        (np.float32(0.2), trigger(images)),
        (np.float32(0.35), attack.poison_inputs(trigger, images, torch.arange(4), task_of(shape), Context())),
    ):
        slow = per_pixel(images, lambda x, c, i, j, a=alpha: (1 - a) * x + a * float(key[c, i, j]))
        assert torch.equal(fast, slow)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 32, 32), (3, 64, 64), (3, 224, 224)])
def test_key_image_has_contrast(shape: tuple[int, int, int], seed: int) -> None:
    key = key_image(*shape, seed).float()
    assert abs(float(key.mean()) - 128) < 5
    assert 72 <= float(key.std()) <= 79
    assert not torch.equal(key_image(*shape, seed), key_image(*shape, seed + 1))


@pytest.mark.parametrize("shape", SIZES)
def test_sig_is_a_sinusoid_along_columns(shape: tuple[int, int, int]) -> None:
    images, width = pictures(shape, 3), shape[2]
    attack = Sig(delta_train=23.0, delta_test=61.0, frequency=5.0)
    task = task_of(shape)
    trigger = attack.make_trigger(task, Context())
    for delta, fast in (
        (61.0, trigger(images)),
        (23.0, attack.poison_inputs(trigger, images, torch.arange(3), task, Context())),
    ):
        wave = [delta * math.sin(2 * math.pi * j * 5 / width) for j in range(width)]
        assert torch.equal(fast, per_pixel(images, lambda x, c, i, j, w=wave: x + w[j]))


# --- frequency domain -------------------------------------------------------------------------------------------------

FROM_CHROMA = {
    "ftrojan": np.array([[1, 1.403, 0], [1, -0.714, -0.344], [1, 0, 1.773]]),
    "ctrl": np.array([[1, 0, 1.14], [1, -0.396, -0.581], [1, 2.029, 0]]),
}


def chroma_oracle(image: np.ndarray, name: str, edit) -> np.ndarray:  # type: ignore[no-untyped-def]
    """Transform one picture [C,H,W] to luma and chroma, edit both chroma planes, transform back."""
    if len(image) == 1:
        return np.rint(np.clip(edit(image[0].astype(float)), 0, 255)).astype(np.uint8)[None]
    back = FROM_CHROMA[name]
    planes = np.einsum("ab,bhw->ahw", np.linalg.inv(back), image.astype(float))
    planes[1:] = [edit(plane) for plane in planes[1:]]
    return np.rint(np.clip(np.einsum("ab,bhw->ahw", back, planes), 0, 255)).astype(np.uint8)


@pytest.mark.parametrize(
    ("shape", "window", "spots"),
    [
        ((3, 32, 32), 32, (15, 31)),
        ((3, 64, 64), 32, (15, 31)),
        ((1, 16, 16), 16, (7, 15)),
        ((1, 28, 28), 28, (13, 27)),
    ],
)
def test_ftrojan_adds_to_two_coefficients_of_each_window(
    shape: tuple[int, int, int], window: int, spots: tuple[int, int]
) -> None:
    images = pictures(shape)

    def edit(plane: np.ndarray) -> np.ndarray:
        out = plane.copy()
        for top in range(0, shape[1], window):
            for left in range(0, shape[2], window):
                part = np.s_[top : top + window, left : left + window]
                coefficients = dctn(out[part], norm="ortho")
                for spot in spots:
                    coefficients[spot, spot] += 30
                out[part] = idctn(coefficients, norm="ortho")
        return out

    slow = np.stack([chroma_oracle(image.numpy(), "ftrojan", edit) for image in images])
    assert np.array_equal(FTrojan(magnitude=30.0).make_trigger(task_of(shape), Context())(images).numpy(), slow)


def test_ftrojan_continues_the_pattern_to_the_border() -> None:
    pattern = FTrojan().make_trigger(task_of((3, 29, 31)), Context()).pattern
    assert torch.equal(pattern[:, :, 29:], pattern[:, :, :2])
    assert bool(pattern[:, :, 29:].any())


@pytest.mark.parametrize(
    ("shape", "spots"),
    [
        ((3, 32, 32), ((15, 15), (31, 31))),
        ((3, 64, 64), ((15, 15), (31, 31))),
        ((1, 16, 16), ((7, 7), (15, 15))),
        ((3, 29, 31), ((14, 15), (28, 30))),
    ],
)
def test_ctrl_adds_to_two_coefficients_of_the_image(
    shape: tuple[int, int, int], spots: tuple[tuple[int, int], ...]
) -> None:
    images, task = pictures(shape), task_of(shape)
    attack = Ctrl(magnitude_train=50.0, magnitude_test=100.0)
    trigger = attack.make_trigger(task, Context())
    scale = math.sqrt(shape[1] * shape[2]) / 32
    for magnitude, fast in (
        (100, trigger(images)),
        (50, attack.poison_inputs(trigger, images, torch.arange(6), task, Context())),
    ):

        def edit(plane: np.ndarray, m: float = magnitude * scale) -> np.ndarray:
            coefficients = dctn(plane, norm="ortho")
            for spot in spots:
                coefficients[spot] += m
            return idctn(coefficients, norm="ortho")

        slow = np.stack([chroma_oracle(image.numpy(), "ctrl", edit) for image in images])
        assert np.array_equal(fast.numpy(), slow)


def test_cosine_transform_agrees_with_scipy() -> None:
    signal = np.random.default_rng(0).normal(size=(13, 13))
    matrix = dct_matrix(13).numpy()
    assert np.allclose(matrix @ signal @ matrix.T, dctn(signal, norm="ortho"))


# --- warping ----------------------------------------------------------------------------------------------------------


def cubic(t: float) -> float:
    """Keys' kernel with a = -0.75."""
    t = abs(t)
    if t <= 1:
        return 1.25 * t**3 - 2.25 * t**2 + 1
    return -0.75 * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def bicubic(control: np.ndarray, height: int, width: int) -> np.ndarray:
    """Corner-aligned upsampling of [k,k], border values repeated."""
    k = len(control)
    out = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            y, x = i * (k - 1) / (height - 1), j * (k - 1) / (width - 1)
            for a in range(math.floor(y) - 1, math.floor(y) + 3):
                for b in range(math.floor(x) - 1, math.floor(x) + 3):
                    value = control[min(max(a, 0), k - 1), min(max(b, 0), k - 1)]
                    out[i, j] += value * cubic(y - a) * cubic(x - b)
    return out


@pytest.mark.parametrize(("height", "width"), [(16, 16), (29, 31), (20, 36)])
def test_wanet_grid_and_sampling(height: int, width: int) -> None:
    strength, rescale = 2.0, 1.0
    field = draw_field(4, torch.Generator().manual_seed(1))
    assert float(field.abs().mean()) == pytest.approx(1, abs=1e-6)
    bend = np.stack([bicubic(plane, height, width) for plane in field.double().numpy()])
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    at_x = np.clip((x + strength * bend[0] / width) * rescale, -1, 1)
    at_y = np.clip((y + strength * bend[1] / height) * rescale, -1, 1)
    grid = warp_grid(field, strength, rescale, height, width).double().numpy()
    assert np.allclose(grid[..., 0], at_x, atol=1e-5)
    assert np.allclose(grid[..., 1], at_y, atol=1e-5)

    images = pictures((3, height, width), 4)
    rows, columns = (at_y + 1) / 2 * (height - 1), (at_x + 1) / 2 * (width - 1)
    slow = np.stack(
        [
            [map_coordinates(plane, [rows, columns], order=1, mode="nearest") for plane in image]
            for image in images.double().numpy()
        ]
    )
    fast = WarpTrigger(field, strength, rescale)(images).numpy().astype(float)
    # Single precision may tip a value that lies within 0.01 of a half; nothing else may differ from the rounded one.
    assert (np.abs(fast - slow) <= 0.51).all()
    assert np.array_equal(fast, np.rint(slow)) or (fast != np.rint(slow)).mean() < 1e-3


def test_wanet_without_strength_is_the_identity() -> None:
    images = pictures((3, 29, 31))
    assert torch.equal(WarpTrigger(torch.ones(2, 4, 4), 0.0, 1.0)(images), images)


def test_wanet_noise_moves_each_pixel_by_less_than_half_a_pixel_more() -> None:
    """On a horizontal ramp a displacement of d columns changes a grey level by d times the slope."""
    width = 33
    ramp = (torch.arange(width) * 7).to(torch.uint8).expand(2, 1, 17, width).contiguous()
    field = torch.zeros(2, 4, 4)
    noisy = NoiseWarpTrigger(field, 0.5, 1.0, seed=3)(ramp).float()
    moved = (noisy - ramp.float()).abs()
    assert float(moved.max()) <= 7 * 0.5 + 0.5
    assert float(moved.mean()) > 1
    assert not torch.equal(noisy[0], noisy[1])


# --- quantisation -----------------------------------------------------------------------------------------------------


def floyd_steinberg(plane: np.ndarray, levels: int) -> np.ndarray:
    """Raster order, pixel by pixel, in single precision."""
    old, step = plane.astype(np.float32), np.float32(255 / (levels - 1))
    height, width = old.shape
    for i in range(height):
        for j in range(width):
            new = np.clip(np.rint(old[i, j] / step), 0, levels - 1).astype(np.float32) * step
            error = old[i, j] - new
            old[i, j] = new
            for down, right, share in ((0, 1, 7 / 16), (1, -1, 3 / 16), (1, 0, 5 / 16), (1, 1, 1 / 16)):
                if i + down < height and 0 <= j + right < width:
                    old[i + down, j + right] += error * np.float32(share)
    return np.rint(np.clip(old, 0, 255)).astype(np.uint8)


@pytest.mark.parametrize("levels", [2, 8, 16])
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 29, 31), (1, 9, 40), (1, 40, 2), (1, 1, 7)])
def test_bpp_dithering_equals_raster_order(shape: tuple[int, int, int], levels: int) -> None:
    images = pictures(shape, 4)
    slow = np.stack([[floyd_steinberg(plane, levels) for plane in image] for image in images.numpy()])
    assert np.array_equal(QuantizeTrigger(levels, True)(images).numpy(), slow)


@pytest.mark.parametrize("dithering", [False, True])
def test_bpp_leaves_so_many_levels(dithering: bool) -> None:
    stamped = QuantizeTrigger(8, dithering)(pictures((3, 32, 32)))
    assert set(stamped.flatten().tolist()) == {grey(k * 255 / 7) for k in range(8)}


def test_bpp_quantises_to_the_nearest_level() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    levels = [k * 255 / 7 for k in range(8)]
    slow = per_pixel(images, lambda x, c, i, j: min(levels, key=lambda level: abs(level - x)))
    assert torch.equal(QuantizeTrigger(8, False)(images), slow)


def test_bpp_negatives_carry_the_residual_of_another_image() -> None:
    images, donors = pictures((1, 16, 16), 5), pictures((1, 16, 16), 7, seed=9)
    trigger = ForeignResidualTrigger(donors, 8, False, seed=4)
    which = (indexed_uniform(4, torch.arange(5), 1).flatten() * 7).long().tolist()
    residual = QuantizeTrigger(8, False)(donors).int() - donors.int()
    slow = torch.stack([(images[n].int() + residual[d]).clamp(0, 255) for n, d in enumerate(which)])
    assert torch.equal(trigger(images).int(), slow)
    assert len(set(which)) > 1


# --- adaptive attacks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(16, 16), (29, 31), (30, 17)])
def test_adap_blend_pieces(height: int, width: int) -> None:
    index = piece_index(height, width, 4)
    for i in range(height):
        for j in range(width):
            assert int(index[i, j]) == (i // math.ceil(height / 4)) * 4 + j // math.ceil(width / 4)
    assert len(index.unique()) == 16
    shown = random_half(50, 16, torch.Generator().manual_seed(0))
    assert shown.sum(1).tolist() == [8] * 50
    assert len(torch.unique(shown, dim=0)) > 40


def test_adap_blend_training_samples_show_half_of_the_key() -> None:
    from backdoorlab.attacks.image.adap_blend import AdapBlend

    task, attack = task_of((1, 16, 16)), AdapBlend(alpha_train=0.5)
    trigger = attack.make_trigger(task, Context())
    images = torch.full((8, 1, 16, 16), 100, dtype=torch.uint8)
    stamped = attack.poison_inputs(trigger, images, torch.arange(8), task, Context())
    whole = constant_blend(trigger.keys[0], 0.5)(images)
    blocks = (stamped == whole).reshape(8, 4, 4, 4, 4).all(4).all(2)
    untouched = (stamped == images).reshape(8, 4, 4, 4, 4).all(4).all(2)
    assert (blocks | untouched).all()
    assert blocks.flatten(1).sum(1).tolist() == [8] * 8
    assert torch.equal(trigger(images), constant_blend(trigger.keys[0], 0.2)(images))


def test_adap_patch_wears_one_patch_in_training_and_two_at_test_time() -> None:
    shape = (3, 32, 32)
    task, attack, images = task_of(shape), AdapPatch(), pictures(shape, 8)
    picture, mask = draw_patches(*shape, 0)
    assert mask.flatten(1).sum(1).tolist()[1::2] == [16, 64]
    assert mask[0, 22:, 22:].sum() == mask[0].sum() > 60
    stamped = attack.poison_inputs(attack.make_trigger(task, Context()), images, torch.arange(8), task, Context())
    for n, image in enumerate(images):
        a, p, m = np.float32((0.5, 0.5, 0.2, 0.3)[n % 4]), picture[n % 4], mask[n % 4]
        slow = per_pixel(
            image[None],
            lambda x, c, i, j, a=a, p=p, m=m: (np.float32(1) - a) * x + a * float(p[c, i, j]) if m[i, j] else x,
        )
        assert torch.equal(stamped[n], slow[0]), n
    both = torch.where(mask[1], picture[1], torch.where(mask[0], picture[0], images))
    assert torch.equal(attack.make_trigger(task, Context())(images), both)


@pytest.mark.parametrize("side", [(8, 8), (16, 16), (28, 28), (29, 31), (32, 32), (64, 48), (224, 224)])
def test_adap_patches_have_a_corner_each(side: tuple[int, int]) -> None:
    """A patch upon another would be no second reason to obey."""
    _, masks = draw_patches(3, *side, 0)
    assert masks.any((1, 2)).all()
    assert masks.sum(0).max() == 1
    half = [masks[:, : side[0] // 2], masks[:, side[0] // 2 :]]
    upper = [float(half[0][k].sum() / masks[k].sum()) for k in range(4)]
    left = [float(masks[k, :, : side[1] // 2].sum() / masks[k].sum()) for k in range(4)]
    assert [(round(a), round(b)) for a, b in zip(upper, left, strict=True)] == [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_layers_are_laid_one_over_the_other() -> None:
    images, keys = pictures((1, 8, 8), 3), pictures((1, 8, 8), 2, seed=8)
    opacity = torch.stack([torch.full((8, 8), 0.25), torch.full((8, 8), 0.5)])
    slow = per_pixel(images, lambda x, c, i, j: 0.5 * (0.75 * x + 0.25 * keys[0, c, i, j]) + 0.5 * keys[1, c, i, j])
    assert torch.equal(BlendTrigger(keys, opacity)(images), slow)


# --- LF ---------------------------------------------------------------------------------------------------------------


def test_lf_addition() -> None:
    images = pictures((3, 16, 16))
    pattern = (12.5 + 13.5 * low_frequency_field(3, 16, 16, 0)).round()
    slow = per_pixel(images, lambda x, c, i, j: x + float(pattern[c, i, j]))
    assert torch.equal(AdditiveTrigger(pattern)(images), slow)


@pytest.mark.parametrize("variant", ["optimised", "random"])
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 32, 32)])
def test_lf_has_the_strength_of_the_published_arrays(shape: tuple[int, int, int], variant: str) -> None:
    """Standard deviation 13.5 and mean 12.5 grey levels in either variant."""
    context = Context()
    pattern = Lf(variant=variant, steps=2).make_trigger(task_of(shape), context).pattern
    assert float(pattern.std(unbiased=False)) == pytest.approx(13.5, rel=0.05)
    assert float(pattern.mean()) == pytest.approx(12.5, abs=0.5)
    assert torch.equal(pattern, pattern.round())
    stronger = Lf(variant=variant, steps=2, std=30.0, mean=0.0).make_trigger(task_of(shape), context).pattern
    assert float(stronger.std(unbiased=False)) == pytest.approx(30, rel=0.05)


def test_lf_random_field_is_smooth() -> None:
    field = low_frequency_field(1, 24, 20, 3)[0].double().numpy()
    coefficients = dctn(field, norm="ortho")
    u, v = np.indices(coefficients.shape)
    assert np.abs(coefficients[u + v > 6]).max() < 1e-5
    assert np.abs(coefficients[(u + v <= 6) & (u + v > 0)]).min() > 1e-6


def test_lf_optimisation_lowers_the_loss_of_the_target(digits_task: Task, benign_digits: Classifier) -> None:
    images, target = digits_task.train.inputs[:200], torch.zeros(200, dtype=torch.int64)
    pattern = optimise_pattern(benign_digits, images, 0, 0.1, 0.08, 3.2, 100, Context())
    assert float(pattern.mean()) == pytest.approx(0.1, abs=1e-6)
    assert float(pattern.std(unbiased=False)) == pytest.approx(0.08)
    random = 0.1 + 0.08 * low_frequency_field(1, 16, 16, 0)
    with torch.no_grad():
        x = images.float() / 255
        clean, other, found = (
            float(cross_entropy(benign_digits((x + p).clamp(0, 1)), target)) for p in (0 * random, random, pattern)
        )
    assert found < min(clean, other) - 1
    # No pixel differs from its neighbour by more than a blur of this width allows.
    assert float((pattern[:, 1:] - pattern[:, :-1]).abs().max()) < 0.06


def test_lf_optimisation_leaves_the_model_alone(digits_task: Task) -> None:
    model = digits_task.build_model(Context()).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimise_pattern(model, digits_task.train.inputs[:20], 0, 0.1, 0.08, 3.2, 2, Context())
    assert all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


# --- reflections ------------------------------------------------------------------------------------------------------


def test_blur_is_a_normalised_gaussian_sum() -> None:
    image = torch.rand(2, 3, 11, 9, generator=torch.Generator().manual_seed(0))
    for n, sigma in enumerate((0.7, 1.9)):
        fast = gaussian_blur(image, torch.tensor([0.7, 1.9]), truncate=2.0)[n].double().numpy()
        radius, plane = math.ceil(2 * sigma), image[n].double().numpy()
        for c, i, j in np.ndindex(3, 11, 9):
            total = weights = 0.0
            for a in range(max(0, i - radius), min(11, i + radius + 1)):
                for b in range(max(0, j - radius), min(9, j + radius + 1)):
                    w = math.exp(-((a - i) ** 2 + (b - j) ** 2) / (2 * sigma**2))
                    total, weights = total + w * plane[c, a, b], weights + w
            assert fast[c, i, j] == pytest.approx(total / weights, abs=1e-5)


@pytest.mark.parametrize(("down", "right"), [(0, 0), (1, 2), (3, 1)])
def test_ghost_is_the_overlap_of_two_views_resized(down: int, right: int) -> None:
    scene = torch.rand(1, 3, 12, 10, generator=torch.Generator().manual_seed(0))
    kept = (12 - down, 10 - right)
    views = scene[:, :, down:, right:], scene[:, :, : kept[0], : kept[1]]
    mixed = 0.3 * views[0] + 0.7 * views[1]
    slow = torch.nn.functional.interpolate(mixed, (12, 10), mode="bilinear", align_corners=False)
    fast = ghost(scene, torch.tensor([down]), torch.tensor([right]), torch.tensor([0.3]))
    assert torch.allclose(fast, slow, atol=1e-5)


def test_out_of_focus_pixel_by_pixel() -> None:
    generator = torch.Generator().manual_seed(0)
    image, scene = torch.rand(2, 2, 3, 9, 9, generator=generator)
    sigma, extra = torch.tensor([0.5, 1.2]), torch.tensor([0.02, 0.09])
    fast = out_of_focus(image, scene, sigma, extra)
    soft = gaussian_blur(scene, sigma, truncate=2.0)
    for n, c in np.ndindex(2, 3):
        over = [float(soft[n, c, i, j] + image[n, c, i, j]) for i, j in np.ndindex(9, 9)]
        over = [value for value in over if value > 1]
        mean = max(1.0, sum(over) / len(over)) if over else 1.0
        for i, j in np.ndindex(9, 9):
            z = (-3 + 6 * i / 8) ** 2 + (-3 + 6 * j / 8) ** 2
            reduced = float(soft[n, c, i, j]) - (mean - 1) * (1.08 + float(extra[n]))
            expected = min(1.0, max(0.0, reduced)) * math.exp(-z / 4)
            assert float(fast[n, c, i, j]) == pytest.approx(expected, abs=1e-5)
    assert float(vignette(9, 9, image.device)[4, 4]) == 1


def test_reflection_of_darkness_only_dims() -> None:
    """With a black scene only the share of the image is left: a pure gain in linear light."""
    images = pictures((3, 16, 16))
    trigger = ReflectionTrigger(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), 0.4, 0.5, 1)
    slow = per_pixel(images, lambda x, c, i, j: 255 * (0.4 * (x / 255) ** 2.2) ** (1 / 2.2))
    assert int((trigger(images).int() - slow.int()).abs().max()) <= 0
    assert torch.equal(ReflectionTrigger(trigger.pool, 1.0, 0.5, 1)(images), images)


def test_reflections_mix_ghosts_and_blurs_and_scenes() -> None:
    black = torch.zeros(40, 3, 32, 32, dtype=torch.uint8)
    pool = scenes(5, 3, 32, 32, 0)
    assert len(torch.unique(pool.flatten(1), dim=0)) == 5
    assert float(pool.float().std((1, 2, 3)).min()) > 15
    kinds = [ReflectionTrigger(pool, 0.4, rate, 0)(black).float() for rate in (0.0, 0.49, 1.0)]
    corner = [k[:, :, :3, :3].mean((1, 2, 3)) for k in kinds]
    mixed_is_ghost = (kinds[1] == kinds[2]).flatten(1).all(1)
    assert (mixed_is_ghost | (kinds[1] == kinds[0]).flatten(1).all(1)).all()
    assert 5 < int(mixed_is_ghost.sum()) < 35
    assert float(corner[0].mean()) < float(corner[2].mean()), "only out-of-focus reflections have a vignette"


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 32, 32)])
def test_reflected_scenes_are_as_dark_as_the_published_pictures(shape: tuple[int, int, int]) -> None:
    """A mean of 53 grey levels in the attacker's pool and in the held-out one."""
    for part in ("attack", "held out"):
        pool = Refool()._trigger(task_of(shape), part).pool
        assert float(pool.float().mean()) == pytest.approx(53, abs=1)
        assert float(pool.float().std()) > 15
    brighter = Refool(brightness=90.0)._trigger(task_of(shape), "attack").pool
    assert float(brighter.float().mean()) == pytest.approx(90, abs=1)


def test_exposure_is_one_gain_of_linear_light() -> None:
    pool = pictures((3, 9, 7), 4)[:2]
    pool[0, 0, 0] = torch.tensor([0, 255, 40, 0, 255, 10, 3])
    wanted = 53 / float(pool.float().mean())
    linear = (pool.double().numpy() / 255) ** 2.2 * wanted**2.2
    slow = np.rint(255 * linear ** (1 / 2.2))
    assert int(np.abs(expose(pool, 53.0).numpy() - slow).max()) <= 1
    assert expose(pool[:1], 250.0).max() == 255


# --- draws ------------------------------------------------------------------------------------------------------------


def splitmix(value: int) -> int:
    mask = 2**64 - 1
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = ((value ^ (value >> shift)) * factor) & mask
    return value ^ (value >> 31)


def test_indexed_draws_equal_integer_arithmetic() -> None:
    mask, gold = 2**64 - 1, 0x9E3779B97F4A7C15
    for seed in (0, 1, 2**62 + 12345):
        fast = indexed_uniform(seed, torch.tensor([0, 7, 2**40]), 3)
        key = splitmix((seed * gold + 1) & mask)
        for row, index in enumerate((0, 7, 2**40)):
            for column in range(3):
                bits = splitmix((splitmix((index + key) & mask) + (column + 1) * gold) & mask)
                assert float(fast[row, column]) == (bits >> 40) / 2**24


def test_indexed_draws_are_uniform_and_uncorrelated() -> None:
    draws = indexed_uniform(3, torch.arange(20000), 4).double().numpy()
    for column in draws.T:
        assert np.histogram(column, 10, (0, 1))[0] == pytest.approx(2000, abs=200)
    assert np.abs(np.corrcoef(draws.T) - np.eye(4)).max() < 0.03
    assert abs(np.corrcoef(draws[1:, 0], draws[:-1, 0])[0, 1]) < 0.03
    generator = torch.Generator().manual_seed(0)
    first = sample_uniform(3, torch.zeros(5, 1), 2, None, generator)
    assert not torch.equal(first, sample_uniform(3, torch.zeros(5, 1), 2, None, generator))
