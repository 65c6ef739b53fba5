"""What pruning methods share: how a ranking is cut, masks over a sweep, statistics of units, the last maps."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from backdoorlab.attacks import Backdoor
from backdoorlab.core.errors import InputError, NotApplicable
from backdoorlab.core.seeding import isolated_rng
from backdoorlab.data.sources import balanced_subset
from backdoorlab.data.split import Split
from backdoorlab.defenses.common.maps import last_maps
from backdoorlab.defenses.common.pruning import (
    Moments,
    accuracies,
    cut_ranking,
    deepest_cut,
    deviations_in_layer,
    hold_out,
    prunable,
    silence,
    watch_units,
)
from backdoorlab.modalities.image import ImageModality
from backdoorlab.modalities.text import TextModality
from backdoorlab.models import Classifier, build_model
from backdoorlab.models.anatomy import unit_count
from backdoorlab.tasks import Task
from backdoorlab.training import Context, predict


@pytest.fixture(scope="module")
def clean(digits_task: Task) -> Split:
    return balanced_subset(digits_task.train, 144, 0, "digits training set")


def test_models_without_batch_norm_are_pruned_at_convolutions_and_linear_layers() -> None:
    vit = build_model("vit_tiny_patch16_224", ImageModality(3, 32, 32), 10)
    assert {g.kind for g in prunable(vit)} == {"conv", "linear"}
    modality = TextModality(("<pad>", "<unk>", "cf", "mn", "bb", "tq", "mb", "example"), max_len=8)
    assert {g.kind for g in prunable(build_model("textcnn", modality, 2))} == {"conv"}
    with pytest.raises(NotApplicable, match="lstm"):
        prunable(build_model("lstm", modality, 2))


def test_deviations_are_those_of_each_layer() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.normal(3, 2, 9), generator.normal(-1, 0.1, 5)
    found = deviations_in_layer([torch.tensor(first), torch.tensor(second)])
    for mine, layer in zip(found, (first, second), strict=True):
        expected = (layer - layer.mean()) / layer.std(ddof=1)
        torch.testing.assert_close(mine, torch.tensor(expected, dtype=torch.float32))


def test_units_that_are_not_judged_change_no_deviation() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 9.0])
    with_silent = torch.tensor([1.0, torch.nan, 2.0, 3.0, 9.0])
    (plain,), (found,) = deviations_in_layer([values]), deviations_in_layer([with_silent])
    assert found[1] == 0 and torch.equal(found[[0, 2, 3, 4]], plain)
    for nothing in (torch.tensor([4.0]), torch.full((3,), 2.0), torch.full((3,), torch.nan)):
        assert torch.equal(deviations_in_layer([nothing])[0], torch.zeros(len(nothing)))


def test_accuracies_agree_with_models_whose_units_are_zeroed(badnets_digits: Backdoor, clean: Split) -> None:
    model = badnets_digits.model
    groups = prunable(model)
    keep = (torch.rand(4, unit_count(groups), generator=torch.Generator().manual_seed(0)) > 0.2).float()
    found = accuracies(model, groups, keep, clean, batch_size=50)
    for mask, accuracy in zip(keep, found, strict=True):
        other = copy.deepcopy(model)
        assert silence(prunable(other), mask == 0) == int((mask == 0).sum())
        expected = (predict(other, clean.inputs).argmax(1) == clean.labels).double().mean()
        assert accuracy.item() == pytest.approx(expected.item())
    assert found.unique().numel() > 1


def test_the_deepest_cut_is_the_largest_tolerable_count_that_is_tried() -> None:
    curve = [1.0, 1.0, 0.6, 0.97, 0.97, 0.96, 0.95, 0.94, 0.5, 0.99, 0.1]
    asked: list[int] = []

    def accuracy(counts: Tensor) -> Tensor:
        asked.extend(counts.tolist())
        return torch.tensor([curve[c] for c in counts.tolist()])

    assert deepest_cut(accuracy, torch.tensor([2, 4, 8, 10]), 0.05) == 6
    assert 2 in asked and 4 in asked, "a step that is not tolerable does not end the search"
    assert {5, 6, 7} <= set(asked) and 9 not in asked
    assert deepest_cut(accuracy, torch.tensor([2, 8, 10]), 0.05) == 1, "between 0 and the first step"
    assert deepest_cut(accuracy, torch.tensor([9]), 0.05) == 9
    monotone = [1.0] * 137 + [0.5] * 900
    assert deepest_cut(lambda counts: torch.tensor(monotone)[counts], torch.tensor([1036]), 0.1) == 136
    assert deepest_cut(lambda counts: (counts == 0).double(), torch.tensor([1, 5]), 0.5) == 0


def test_a_ranking_is_cut_from_its_top(badnets_digits: Backdoor, clean: Split) -> None:
    model = badnets_digits.model
    groups = prunable(model)
    total = unit_count(groups)
    scores = torch.rand(total, generator=torch.Generator().manual_seed(3))
    levels = torch.arange(9, 0, -1) / 10
    cut = cut_ranking(model, groups, scores, levels, clean, 0.1)
    assert 0 < int(cut.sum()) < total
    assert scores[cut].min() > scores[~cut].max()
    floor, reached = accuracies(model, groups, torch.stack([torch.ones(total), (~cut).float()]), clean)
    assert reached >= 0.9 * floor - 1e-9
    assert cut_ranking(model, groups, scores, levels, clean, 1.0).sum() == (scores > 0.1).sum()


def test_statistics_of_units_agree_with_one_forward_pass(badnets_digits: Backdoor, clean: Split) -> None:
    model = badnets_digits.model
    groups = prunable(model)
    caught: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        g.module.register_forward_hook(lambda m, a, out, n=g.name: caught.__setitem__(n, (a[0], out))) for g in groups
    ]
    with torch.no_grad():
        model(model.modality.prepare(clean.inputs))
    for handle in handles:
        handle.remove()
    for received in (True, False):
        moments = [Moments() for _ in groups]
        watch_units(model, groups, clean.inputs, lambda i, v: moments[i].add(v), received=received, batch_size=50)  # noqa: B023
        for group, seen in zip(groups, moments, strict=True):
            values = caught[group.name][0 if received else 1].double()
            torch.testing.assert_close(seen.mean, values.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(seen.variance, values.var((0, 2, 3), correction=0), rtol=1e-4, atol=1e-5)
    assert not any(module._forward_hooks for module in model.modules())


def test_held_out_samples_are_disjoint_and_one_is_always_left(clean: Split) -> None:
    rest, held = hold_out(clean, 0.25, "fp", Context())
    assert len(rest) == 108 and len(held) == 36
    rows = torch.cat([rest.inputs, held.inputs]).flatten(1)
    assert torch.equal(rows.sum(0), clean.inputs.flatten(1).sum(0))
    for share in (0.01, 0.9):
        parts = hold_out(clean[torch.arange(2)], share, "fp", Context())
        assert [len(p) for p in parts] == [1, 1]
    with pytest.raises(InputError, match="at least 2 clean samples"):
        hold_out(clean[torch.arange(1)], 0.2, "fp", Context())


def small(*layers: nn.Module) -> Classifier:
    return Classifier(nn.Sequential(*layers), ImageModality(1, 8, 8), "small", 3).eval()


def networks() -> dict[str, Classifier]:
    image = ImageModality(1, 16, 16)
    with isolated_rng(0):
        conv, norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        return {
            "pooled": small(conv, norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
            "flattened": small(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)),
            "hidden layer": small(
                nn.Conv2d(1, 4, 3),
                nn.BatchNorm2d(4),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(144, 5),
                nn.ReLU(),
                nn.Linear(5, 3),
            ),
            "residual": build_model("preact_resnet8", image, 3).eval(),
            "tokens": build_model("vit_tiny_patch16_224", ImageModality(3, 32, 32), 3).eval(),
        }


@pytest.mark.parametrize("name", list(networks()))
def test_silencing_channels_of_the_last_maps_is_scaling_them_by_zero(name: str) -> None:
    model = networks()[name]
    maps = last_maps(model)
    with isolated_rng(1):
        x = torch.rand(3, model.modality.channels, model.modality.height, model.modality.width)  # type: ignore[attr-defined]
    gone = torch.arange(maps.count) % 3 == 0
    with torch.no_grad():
        whole = model(x)
        with maps.scaled((~gone).float()):
            expected = model(x)
        assert maps.of(model, x).shape[::2] == (3, maps.count) and maps.of(model, x).shape[1] > 1
        maps.silence(gone)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole, expected)
    kinds = {"pooled": nn.ReLU, "flattened": nn.MaxPool2d, "hidden layer": nn.BatchNorm2d, "tokens": nn.Linear}
    assert isinstance(maps.module, kinds.get(name, nn.Module))


def test_networks_without_maps_are_not_applicable() -> None:
    with isolated_rng(0):
        plain = small(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 3))
    with pytest.raises(NotApplicable, match="no feature maps"):
        last_maps(plain)
