"""EP: its histograms and entropies against numpy and scipy, and its effect on backdoored digits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from torch import Tensor

from backdoorlab.attacks import Backdoor
from backdoorlab.data.sources import balanced_subset
from backdoorlab.data.split import Split
from backdoorlab.defenses import DefenderView, defenses
from backdoorlab.defenses.common.pruning import prunable
from backdoorlab.defenses.repair.ep import BINS, EntropyPruning, bin_counts, entropies
from backdoorlab.models import Classifier
from backdoorlab.models.anatomy import split_units
from backdoorlab.tasks import Task
from backdoorlab.training import Context
from effect_tools import Numbers, case, effects, least, most, repaired, wide_benign, wide_victim


@pytest.fixture(scope="module")
def clean(digits_task: Task) -> Split:
    return balanced_subset(digits_task.train, 144, 0, "digits training set")


def test_histograms_and_entropies_agree_with_numpy_and_scipy() -> None:
    values = np.random.default_rng(0).normal(0, 2.5, size=(500, 6)).astype(np.float32)
    values[:, 2], values[0, 3], values[1, 3] = 0.05, 40, -40
    counts = bin_counts(torch.tensor(values))
    assert counts.shape == (6, BINS) and (counts.sum(1) == 500).all()
    for unit in range(6):
        inside = np.clip(values[:, unit].astype(np.float64), -4.9999, 4.9999)
        expected, _ = np.histogram(inside, bins=100, range=(-5, 5))
        assert np.abs(counts[unit].numpy() - expected).sum() <= 2, "a value on the edge of a bin may round either way"
        assert entropies(counts)[unit].item() == pytest.approx(entropy(counts[unit].numpy()), abs=1e-9)
    assert entropies(counts)[2] == 0


@pytest.mark.parametrize("values", ["peak", "all"])
def test_entropies_of_units_agree_with_one_pass_over_all_samples(
    badnets_digits: Backdoor, clean: Split, values: str
) -> None:
    model = badnets_digits.model
    groups = prunable(model)
    caught: dict[str, Tensor] = {}
    handles = [g.module.register_forward_hook(lambda m, a, out, n=g.name: caught.__setitem__(n, out)) for g in groups]
    with torch.no_grad():
        model(model.modality.prepare(clean.inputs))
    for handle in handles:
        handle.remove()
    found = EntropyPruning(values=values).measure(model, groups, clean.inputs)
    for group, mine in zip(groups, found, strict=True):
        maps = caught[group.name].flatten(2)
        table = (maps.amax(2) if values == "peak" else maps.movedim(1, 2).flatten(0, 1)).double().numpy()
        scaled = (table - table.mean(0)) / table.std(0)
        for unit in range(0, group.count, 7):
            share, _ = np.histogram(np.clip(scaled[:, unit], -4.9999, 4.9999), bins=100, range=(-5, 5))
            # fp32 standardises a little differently: single values may fall into the next bin
            assert mine[unit].item() == pytest.approx(entropy(share), abs=0.05)


def test_two_modes_far_apart_have_the_lowest_entropy_of_a_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = torch.randn(2000, 12, generator=generator)
    layer[:200, 5] += 25
    scaled = (layer - layer.mean(0)) / layer.std(0)
    found = entropies(bin_counts(scaled))
    assert int(found.argmin()) == 5 and found[5] < found.mean() - 3 * found.std()


def test_units_that_never_change_are_left_alone(benign_digits: Classifier, clean: Split) -> None:
    model = EntropyPruning(u=100.0).run(
        DefenderView(model=benign_digits, clean=clean, suspicious=clean), Context()
    )  # u = 100: a plain copy
    groups = prunable(model)
    groups[1].zero(4)
    with torch.no_grad():
        groups[1].bias[4] = 0.7  # type: ignore[index]
    measured = EntropyPruning().measure(model, groups, clean.inputs)
    assert torch.isnan(measured[1]).nonzero().flatten().tolist() == [4]
    repaired_model = EntropyPruning(u=0.5).run(DefenderView(model=model, clean=clean, suspicious=clean), Context())
    after = prunable(repaired_model)[1]
    assert after.bias is not None and after.bias[4].item() == pytest.approx(0.7)


def test_exactly_the_units_below_the_line_are_silent(badnets_digits: Backdoor, clean: Split) -> None:
    model = badnets_digits.model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    method = EntropyPruning(u=1.5)
    repaired_model = method.run(DefenderView(model=model, clean=clean, suspicious=clean), Context())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    measured, total = method.measure(model, prunable(model), clean.inputs), 0
    for group, after, mine in zip(prunable(model), prunable(repaired_model), measured, strict=True):
        line = mine.mean() - 1.5 * mine.std()
        assert after.bias is not None
        silent = (after.weight == 0) & (after.bias == 0)
        assert torch.equal(silent, mine < line)
        assert torch.equal(after.weight[~silent], group.weight[~silent])
        total += int(silent.sum())
    assert total > 0
    parts = split_units(torch.zeros(112), prunable(model))
    assert [len(p) for p in parts] == [16, 32, 64]


def test_known_by_its_names_and_reads_the_mixture() -> None:
    assert defenses.get("ep", "audio") is EntropyPruning is defenses.get("dde", "audio")
    assert EntropyPruning.reads == ("model", "clean", "suspicious")


@case(
    "defense/repair/ep",
    fragile="DER 0.88, 0.97, 0.98 in bf16, 0.66 in fp32",
    der=least(0.7),
    acc_lost=most(0.1),
    benign_lost=most(0.1),
)
def ep(seed: int) -> Numbers:
    """In a network with channels to spare; what it does to one of 112 channels differs widely between draws."""
    return repaired(seed, EntropyPruning(), backdoor=wide_victim(seed), harmless=wide_benign(seed))


test_effect = effects(__name__)
