"""Beatrix as a detector of inputs: bounds per predicted class, classes without clean samples, and its effect."""

from __future__ import annotations

import pytest
import torch

from backdoorlab.attacks import Backdoor
from backdoorlab.core.errors import InputError
from backdoorlab.data.sources import balanced_subset
from backdoorlab.defenses import DefenderView
from backdoorlab.defenses.common.gram import Bounds, gram_vectors, map_layer, maps_and_features
from backdoorlab.defenses.input.beatrix import BeatrixInput, Known, deviations
from backdoorlab.tasks import Task
from backdoorlab.training import Context, predict
from effect_tools import Numbers, case, detected, effects, least, most, planted


def test_deviation_equals_one_map_at_a_time() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, maps = torch.rand(20, 4, 9, generator=generator), 3 * torch.rand(5, 4, 9, generator=generator)
    scale = float(clean.abs().max())
    known = Known(scale, Bounds.of(gram_vectors(clean / scale, 3), 10.0), 1.0)
    found = deviations(maps, known, 3)
    for row, single in zip(found, maps, strict=True):
        total, count = 0.0, 0
        for order in (1, 2, 3):
            powered = (single / scale) ** order
            product = (powered @ powered.T) ** (1 / order)
            entry = 0
            for i in range(4):
                for j in range(i, 4):
                    low, high = float(known.bounds.low[order - 1, entry]), float(known.bounds.high[order - 1, entry])
                    value = float(product[i, j])
                    total += max(low - value, 0) / (abs(low) + 1e-6) + max(value - high, 0) / (abs(high) + 1e-6)
                    entry, count = entry + 1, count + 1
        assert row.item() == pytest.approx(total / count, rel=1e-3, abs=1e-6)


def test_inputs_are_judged_by_their_predicted_class(badnets_digits: Backdoor, digits_task: Task) -> None:
    model = badnets_digits.model
    clean = balanced_subset(digits_task.train, 100, 0, "digits training set")
    method = BeatrixInput()
    detector = method.run(DefenderView(model=model, clean=clean), Context())
    inputs = digits_task.test.inputs[:20]
    maps, _ = maps_and_features(model, inputs, map_layer(model, ""))
    classes = predict(model, inputs).argmax(1)
    found = detector.score(inputs)
    for row, k in enumerate(classes.tolist()):
        known = detector.known[k]
        wanted = float(deviations(maps[row : row + 1], known, method.orders)[0]) / known.usual
        assert float(found[row]) == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    assert len(detector.score(inputs[:0])) == 0


def test_a_class_without_clean_samples_is_compared_with_all(badnets_digits: Backdoor, digits_task: Task) -> None:
    model, train = badnets_digits.model, digits_task.train
    given = predict(model, train.inputs).argmax(1)
    rows = torch.cat([(given == k).nonzero().flatten()[:6] for k in range(10) if k != 4])
    detector = BeatrixInput().run(DefenderView(model=model, clean=train[rows]), Context())
    assert sorted(detector.known) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    fours = train[(given == 4)].inputs[:5]
    scores = detector.score(fours)
    assert bool(scores.isfinite().all()) and float(detector.rest.usual) > 0
    with pytest.raises(InputError, match="clean"):
        BeatrixInput().run(DefenderView(model=model, clean=train[torch.arange(2)]), Context())


@case("defense/input/beatrix", auroc=least(0.9), tpr=least(0.5), fpr=most(0.2))
def badnets(seed: int) -> Numbers:
    return detected(seed, BeatrixInput())


@case("defense/input/beatrix_wanet", auroc=least(0.9), fpr=most(0.2))
def wanet(seed: int) -> Numbers:
    return detected(seed, BeatrixInput(), planted(seed, "wanet", poison_rate=0.1, s=2.0)[0])


test_effect = effects(__name__)
