"""l-infinity pruning: norms and biases of constructed maps, the choice of the fraction, and its effect on digits."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from backdoorlab.attacks import Backdoor
from backdoorlab.core.errors import InputError
from backdoorlab.core.seeding import isolated_rng
from backdoorlab.data.sources import balanced_subset
from backdoorlab.data.split import Split
from backdoorlab.defenses import DefenderView, defenses
from backdoorlab.defenses.common.maps import last_maps
from backdoorlab.defenses.repair.linf import PeakPruning, Stamp, bias, choose_fraction, norms
from backdoorlab.modalities.image import ImageModality
from backdoorlab.models import Classifier
from backdoorlab.models.anatomy import head
from backdoorlab.tasks import Task
from backdoorlab.training import Context
from effect_tools import Numbers, case, effects, least, most, repaired


@pytest.fixture(scope="module")
def clean(digits_task: Task) -> Split:
    return balanced_subset(digits_task.train, 144, 0, "digits training set")


def test_norms_of_constructed_maps() -> None:
    maps = torch.zeros(2, 4, 3)
    maps[0, :, 0] = torch.tensor([3.0, 0.0, 4.0, 0.0])
    maps[1, :, 2] = 2.0
    assert norms(maps, "linf").tolist() == [[4, 0, 0], [0, 0, 2]]
    assert norms(maps, "l2").tolist() == [[5, 0, 0], [0, 0, 4]]
    assert norms(maps, "l1").tolist() == [[7, 0, 0], [0, 0, 8]]


def test_bias_agrees_with_a_slow_loop() -> None:
    plain, stamped = np.random.default_rng(0).random((2, 20, 5))
    raised = [sum(stamped[i, j] - plain[i, j] for i in range(20)) / 20 for j in range(5)]
    torch.testing.assert_close(bias(torch.tensor(plain), torch.tensor(stamped), False), torch.tensor(raised).double())
    scaled = [raised[j] / (plain[:, j].std(ddof=1) + 1e-6) for j in range(5)]
    torch.testing.assert_close(bias(torch.tensor(plain), torch.tensor(stamped), True), torch.tensor(scaled).double())


def test_the_largest_fraction_that_clean_samples_tolerate_and_that_kills_the_trigger() -> None:
    accuracy = torch.tensor([0.90, 0.91, 0.88, 0.86, 0.89, 0.5])
    assert choose_fraction(accuracy, torch.tensor([1.0, 0.5, 0.05, 0.0, 0.3, 0.0]), 0.03, 0.1) == (2, True)
    assert choose_fraction(accuracy, torch.tensor([1.0, 0.5, 0.4, 0.0, 0.3, 0.0]), 0.03, 0.1) == (4, False)
    assert choose_fraction(accuracy, torch.ones(6), 0.0, 0.1) == (1, False)


def planted() -> tuple[Classifier, Stamp]:
    """A network one of whose channels fires only on a corner patch and votes for class 2."""
    with isolated_rng(0):
        conv, last = nn.Conv2d(1, 6, 3, bias=True), nn.Linear(6, 3)
    with torch.no_grad():
        conv.weight.mul_(0.1)
        conv.weight[4], conv.bias[4] = torch.tensor([[1.0, -1, 1], [-1, 1, -1], [1, -1, 1]]) * 3, -8.0  # type: ignore[index]
        last.weight[2, 4] = 50.0
    net = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), last)
    mask, pattern = torch.zeros(1, 8, 8), torch.zeros(1, 8, 8)
    mask[0, 5:, 5:] = 1
    pattern[0, 5:, 5:] = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]])
    return Classifier(net, ImageModality(1, 8, 8), "planted", 3).eval(), Stamp(mask, pattern, 2)


@pytest.mark.parametrize("statistic", ["linf", "l2", "l1"])
def test_a_planted_channel_is_ranked_first_and_its_removal_kills_the_trigger(statistic: str) -> None:
    model, stamp = planted()
    images = torch.randint(0, 80, (30, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    with torch.no_grad():
        labels = model(model.modality.prepare(images)).argmax(1)
    data = Split(images, labels, ("a", "b", "c"))
    method, maps = PeakPruning(statistic=statistic), last_maps(model)
    ranking = method.rank(model, maps, data, stamp).argsort(descending=True)
    assert int(ranking[0]) == 4
    accuracy, success = method.sweep(model, maps, ranking, torch.tensor([0, 1]), data, stamp)
    assert accuracy.tolist() == [1, 1] and success[0] == 1 and success[1] <= 0.5
    gone = torch.arange(6) == 4
    maps.silence(gone)
    with torch.no_grad():
        assert torch.equal(model(model.modality.prepare(images)).argmax(1), labels)
    assert (head(model).weight[:, 4] == 0).all()


def test_a_fixed_share_is_pruned_without_a_trigger(badnets_digits: Backdoor, clean: Split) -> None:
    model = badnets_digits.model
    before = copy.deepcopy(model.state_dict())
    method = PeakPruning(trigger="none", fraction=0.25)
    repaired_model = method.run(DefenderView(model=model, clean=clean), Context())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    gone = (head(repaired_model).weight == 0).all(0)
    assert int(gone.sum()) == 16
    ratio = method.rank(model, last_maps(model), clean, None)
    maps = last_maps(model).of(model, model.modality.prepare(clean.inputs))
    torch.testing.assert_close(ratio, maps.amax(1).mean(0) / maps.sum(1).mean(0).clamp_min(1e-12))


def test_wrong_targets_are_named(badnets_digits: Backdoor, clean: Split) -> None:
    with pytest.raises(InputError, match="target must be a class from 0 to 9 of this model, got 10"):
        PeakPruning(target=10).run(DefenderView(model=badnets_digits.model, clean=clean), Context())
    with pytest.raises(InputError, match="at least 2 clean samples"):
        PeakPruning().run(DefenderView(model=badnets_digits.model, clean=clean[torch.arange(1)]), Context())
    assert defenses.get("linf", "video") is PeakPruning


@case("defense/repair/linf", asr_lost=least(0.3), acc_lost=most(0.1), benign_lost=most(0.1))
def linf(seed: int) -> Numbers:
    return repaired(seed, PeakPruning(batch_size=32, min_steps=3, patience=3), harmless=True)


test_effect = effects(__name__)
