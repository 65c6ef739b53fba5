"""Beatrix: Gram matrices against a slow loop, bounds by hand, and which layer is read."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from backdoorlab.attacks import attacks
from backdoorlab.core.errors import InputError
from backdoorlab.defenses import DefenderView
from backdoorlab.defenses.common.gram import (
    Bounds,
    discrepancy,
    gram_vectors,
    held_out_deviations,
    map_layer,
    maps_and_features,
)
from backdoorlab.defenses.dataset.beatrix import Beatrix
from backdoorlab.defenses.model.beatrix import BeatrixModel
from backdoorlab.models.anatomy import features
from backdoorlab.testing import tiny_task
from backdoorlab.training import Context
from effect_tools import PATCH, Numbers, benign, case, clean, effects, least, most, screened, task, victim


def slow_gram(maps: Tensor, orders: int) -> np.ndarray:
    found = np.zeros((len(maps), orders, maps.shape[1] * (maps.shape[1] + 1) // 2))
    for n, one in enumerate(maps.double().numpy()):
        for p in range(1, orders + 1):
            entry = 0
            for a in range(one.shape[0]):
                for b in range(a, one.shape[0]):
                    total = sum(x**p * y**p for x, y in zip(one[a], one[b], strict=True))
                    found[n, p - 1, entry] = np.sign(total) * abs(total) ** (1 / p)
                    entry += 1
    return found


def test_gram_vectors_equal_a_slow_loop() -> None:
    maps = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert np.allclose(gram_vectors(maps, 8).numpy(), slow_gram(maps, 8), rtol=1e-4, atol=1e-5)


def test_features_are_raised_to_the_power_of_the_order() -> None:
    """(2^2 2^2 M)^(1/2) = 4 sqrt(M); without the power it were 2 sqrt(M)."""
    assert gram_vectors(torch.full((1, 1, 9), 2.0), 2)[0, :, 0].tolist() == pytest.approx([36, 12])


def test_scaling_the_features_scales_every_order_by_its_square() -> None:
    maps = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(gram_vectors(3 * maps, 8), 9 * gram_vectors(maps, 8), rtol=1e-4)


def test_bounds_and_deviation_by_hand() -> None:
    """Median 2, deviations 1 0 1: bounds 2 -+ 10; 24 lies 12 above 12, -16 lies 8 below -8."""
    bounds = Bounds.of(torch.tensor([[[1.0, 5.0]], [[2.0, 5.0]], [[3.0, 5.0]]]), 10.0)
    assert bounds.low.tolist() == [[-8, 5]]
    assert bounds.high.tolist() == [[12, 5]]
    grams = torch.tensor([[[24.0, 5.0]], [[-16.0, 5.0]], [[0.0, 6.0]]])
    assert bounds.deviation(grams).tolist() == pytest.approx([0.5, 0.5, 0.1], rel=1e-5)


def test_held_out_samples_do_not_bound_themselves() -> None:
    grams = torch.randn(9, 2, 6, generator=torch.Generator().manual_seed(2)).abs()
    found = held_out_deviations(grams, 1.0, 3)
    for i in range(9):
        rest = torch.stack([grams[j] for j in range(9) if j % 3 != i % 3])
        assert float(found[i]) == pytest.approx(float(Bounds.of(rest, 1.0).deviation(grams[i : i + 1])), rel=1e-5)


def test_discrepancy_equals_a_slow_loop() -> None:
    a, b = (torch.randn(n, 3, generator=torch.Generator().manual_seed(n), dtype=torch.float64) + n for n in (4, 6))
    joint = torch.cat([a, b])
    pairs = [float((x - y).square().sum()) for i, x in enumerate(joint) for j, y in enumerate(joint) if i != j]
    width = float(torch.tensor(pairs, dtype=torch.float64).median()) / 2

    def mean(p: Tensor, q: Tensor) -> float:
        values = [
            np.exp(-float((x - y).square().sum()) / (width * 2**i)) for x, y in itertools.product(p, q) for i in (0, 1)
        ]
        return float(np.sum(values) / (len(p) * len(q)))

    assert discrepancy(a, b) == pytest.approx(mean(a, a) + mean(b, b) - 2 * mean(a, b))
    assert discrepancy(a, a) == pytest.approx(0, abs=1e-12)


def test_the_map_is_what_the_last_stage_receives() -> None:
    """In the ConvNet of digits: 32 channels of 4x4 after the second pool."""
    model, inputs = benign(0), task(0).test.inputs[:3]
    layer = map_layer(model, "")
    assert layer is not None
    maps, vectors = maps_and_features(model, inputs, layer, batch_size=2)
    assert maps.shape == (3, 32, 16)
    x = model.modality.prepare(model.modality.encode(inputs))
    assert torch.allclose(vectors, features(model, x).detach(), atol=1e-5)
    assert torch.allclose(maps.unflatten(2, (4, 4)), model.net.body[:8]((x - model.mean) / model.std), atol=1e-5)


def test_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match=r"has no layer 'net.body.77' with positions\. Did you mean"):
        map_layer(benign(0), "net.body.77")


def test_texts_are_read_by_the_maps_of_their_convolutions() -> None:
    mine = tiny_task("text")
    model, _ = mine.fit(mine.train, Context(1))
    layer = map_layer(model, "")
    assert layer is not None
    maps, _ = maps_and_features(model, mine.train.inputs[:2], layer)
    assert maps.shape[0] == 2 and maps.shape[2] > 1


def test_the_scale_of_the_features_changes_nothing() -> None:
    """A model whose maps are a million times larger would overflow in the eighth order."""
    backdoor, mine = victim(0, **PATCH), task(0)
    seen = backdoor.poison.apply(mine.train).as_seen()
    large = copy.deepcopy(backdoor.model)
    with torch.no_grad():
        norm = large.net.body[5]
        norm.weight *= 1e6
        norm.bias *= 1e6
        large.net.body[8].weight *= 1e-6
    one, other = (Beatrix().analyse(model, seen, clean(0), Context(0)) for model in (backdoor.model, large))
    assert one.targets == other.targets == (0,)
    assert torch.allclose(one.ratios, other.ratios, rtol=0.05, atol=0.05)


def test_classes_with_fewer_than_three_clean_samples_are_not_judged() -> None:
    backdoor, mine = victim(0, **PATCH), task(0)
    seen, owned = backdoor.poison.apply(mine.train).as_seen(), clean(0)
    few = owned[torch.cat([(owned.labels == 0).nonzero().flatten()[:2], (owned.labels != 0).nonzero().flatten()])]
    found = Beatrix().analyse(backdoor.model, seen, few, Context(0))
    assert bool(found.evidence.values[0].isnan())
    assert not found.ratios[seen.labels == 0].any()
    assert found.targets == ()


@case("defense/dataset/beatrix", auroc=least(0.95), tpr=least(0.9), fpr=most(0.02))
def effect_of_beatrix(seed: int) -> Numbers:
    return screened(seed, Beatrix())


@case("defense/dataset/beatrix_blended", auroc=least(0.95), tpr=least(0.6), fpr=most(0.02))
def effect_of_beatrix_on_blended(seed: int) -> Numbers:
    return screened(seed, Beatrix(), attacks.get("blended", "image")(poison_rate=0.1).run(task(seed), Context(seed)))


@case("defense/model/beatrix_model", accused=least(1), benign_accused=most(0))
def effect_of_beatrix_model(seed: int) -> Numbers:
    backdoor, mine, ctx = victim(seed, **PATCH), task(seed), Context(seed)
    report, innocent = (
        BeatrixModel().apply(DefenderView(model=model, clean=clean(seed), suspicious=data), ctx)
        for model, data in (
            (backdoor.model, backdoor.poison.apply(mine.train).as_seen()),
            (benign(seed), mine.train),
        )
    )
    return {
        "score": report.score,
        "accused": float(report.targets == (0,)),
        "benign_score": innocent.score,
        "benign_accused": float(innocent.backdoored),
    }


test_effect = effects(__name__)
