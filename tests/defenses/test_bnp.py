"""BNP: its divergence against numerical integration, and its effect on backdoored digits."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm as gaussian
from torch import nn

from backdoorlab.attacks import Backdoor
from backdoorlab.core.errors import InputError, NotApplicable
from backdoorlab.data.sources import balanced_subset
from backdoorlab.data.split import Split
from backdoorlab.defenses import DefenderView, defenses
from backdoorlab.defenses.repair.bnp import BatchNormPruning, divergence, divergences
from backdoorlab.modalities.image import ImageModality
from backdoorlab.models import Classifier, build_model
from backdoorlab.models.anatomy import channels, reestimate_batchnorm
from backdoorlab.tasks import Task
from backdoorlab.training import Context
from effect_tools import Numbers, case, effects, least, most, repaired, wide_benign, wide_victim


@pytest.fixture(scope="module")
def clean(digits_task: Task) -> Split:
    return balanced_subset(digits_task.train, 144, 0, "digits training set")


@pytest.mark.parametrize(("m1", "v1", "m2", "v2"), [(0.3, 0.5, -0.2, 1.7), (1.0, 2.0, 1.0, 0.4), (0.0, 1.0, 2.0, 1.0)])
def test_divergence_is_the_integral(m1: float, v1: float, m2: float, v2: float) -> None:
    first, second = gaussian(m1, math.sqrt(v1)), gaussian(m2, math.sqrt(v2))
    expected, _ = quad(lambda x: first.pdf(x) * (first.logpdf(x) - second.logpdf(x)), -12, 12)
    found = divergence(*(torch.tensor([value], dtype=torch.float64) for value in (m1, v1, m2, v2)))
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_divergence_is_never_negative_and_zero_for_equal_statistics() -> None:
    generator = torch.Generator().manual_seed(0)
    means, variances = torch.randn(2, 50, generator=generator), torch.rand(2, 50, generator=generator) + 0.01
    assert (divergence(means[0], variances[0], means[1], variances[1]) >= -1e-6).all()
    same = divergence(means[0], variances[0], means[0], variances[0])
    torch.testing.assert_close(same, torch.zeros(50), atol=1e-6, rtol=0)


def test_statistics_are_those_of_what_the_norm_receives(badnets_digits: Backdoor, clean: Split) -> None:
    model = badnets_digits.model
    groups = channels(model, kinds=("batchnorm",))
    found = divergences(model, groups, clean.inputs)
    caught: list[np.ndarray] = []
    handles = [g.module.register_forward_hook(lambda m, a, o: caught.append(a[0].double().numpy())) for g in groups]
    with torch.no_grad():
        model(model.modality.prepare(clean.inputs))
    for handle in handles:
        handle.remove()
    for group, seen, mine in zip(groups, caught, found, strict=True):
        stored = group.module.state_dict()
        for k in range(0, group.count, 5):
            values = seen[:, k].reshape(-1)
            m1, v1 = values.mean(), values.var() + 1e-5
            m2, v2 = float(stored["running_mean"][k]), float(stored["running_var"][k]) + 1e-5
            expected = 0.5 * (math.log(v2 / v1) + (v1 + (m1 - m2) ** 2) / v2 - 1)
            assert mine[k].item() == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_a_channel_whose_statistics_were_moved_is_the_one_pruned(benign_digits: Classifier, clean: Split) -> None:
    model = copy.deepcopy(benign_digits)
    reestimate_batchnorm(model, clean.inputs)
    norm = channels(model, kinds=("batchnorm",))[1].module
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None
    norm.running_var[7] *= 50
    repaired_model = BatchNormPruning(u=5.0).run(DefenderView(model=model, clean=clean), Context())
    silent = [(g.weight == 0).nonzero().flatten().tolist() for g in channels(repaired_model, kinds=("batchnorm",))]
    assert silent == [[], [7], []]


def test_networks_without_stored_statistics_are_not_applicable(clean: Split) -> None:
    vit = build_model("vit_tiny_patch16_224", ImageModality(1, 16, 16), 10)
    with pytest.raises(NotApplicable, match="no batch norm that keeps statistics"):
        BatchNormPruning().run(DefenderView(model=vit, clean=clean), Context())
    with pytest.raises(InputError, match="at least 2 clean samples"):
        BatchNormPruning().run(DefenderView(model=vit, clean=clean[torch.arange(1)]), Context())


def test_known_by_its_names() -> None:
    assert defenses.get("bnp", "video") is BatchNormPruning is defenses.get("mbns", "video")


@case("defense/repair/bnp", der=least(0.7), acc_lost=most(0.1), benign_lost=most(0.1))
def bnp(seed: int) -> Numbers:
    """In a network with channels to spare; in one of 112 channels it has hardly an effect."""
    return repaired(seed, BatchNormPruning(), backdoor=wide_victim(seed), harmless=wide_benign(seed))


test_effect = effects(__name__)
