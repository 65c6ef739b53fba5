"""SCAn: expectation maximisation, the division in two groups, and planted groups among classes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from backdoorlab.attacks import attacks
from backdoorlab.core.errors import InputError
from backdoorlab.defenses import DefenderView
from backdoorlab.defenses.common.subgroups import (
    Decomposition,
    SubgroupAnalysis,
    decompose,
    log_likelihood,
    second_is_suspicious,
    two_groups,
)
from backdoorlab.defenses.dataset.scan import Scan
from backdoorlab.defenses.model.scan import ScanModel
from backdoorlab.training import Context
from effect_tools import PATCH, Numbers, benign, case, clean, effects, least, most, screened, task, victim


def drawn(sizes: list[int], dims: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features of classes with normal means (standard deviation 3) and a correlated variation."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dims, dims, generator=generator, dtype=torch.float64)
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    means = 3 * torch.randn(len(sizes), dims, generator=generator, dtype=torch.float64)
    return means[labels] + torch.randn(len(labels), dims, generator=generator, dtype=torch.float64) @ mix, labels


def test_likelihood_is_that_of_the_joint_normal_distribution() -> None:
    """Brute force: all samples of a class as one vector of n D numbers, with covariance 1 x between + I x within."""
    features, labels = drawn([4, 1, 2])
    a, b = (torch.randn(3, 3, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (1, 2))
    model = Decomposition(features.mean(0), a @ a.T + torch.eye(3), b @ b.T + torch.eye(3))
    total = 0.0
    for k in range(3):
        mine = features[labels == k] - model.mean
        n = len(mine)
        ones, eye = torch.ones(n, n, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
        joint = torch.kron(ones, model.between) + torch.kron(eye, model.within)
        flat = mine.flatten()
        total -= 0.5 * float(torch.logdet(joint) + flat @ torch.linalg.solve(joint, flat))
        # log_likelihood measures the mean of n samples, not their normalised sum: a constant of D / 2 log n.
        total += 0.5 * 3 * math.log(n)
    assert log_likelihood(features, labels, model) == pytest.approx(total)


def test_every_round_of_expectation_maximisation_raises_the_likelihood() -> None:
    features, labels = drawn([5, 9, 3, 1, 7, 4])
    steps = [log_likelihood(features, labels, decompose(features, labels, rounds, 0.0)) for rounds in (1, 2, 4, 8, 40)]
    assert steps == sorted(steps)
    assert steps[-1] > steps[0] + 0.01


def test_both_covariances_are_recovered() -> None:
    features, labels = drawn([40] * 300, seed=3)
    mix = torch.randn(3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = decompose(features, labels)
    assert torch.allclose(found.within, mix.T @ mix, atol=0.15 * float((mix.T @ mix).abs().max()))
    assert torch.allclose(found.between, 9 * torch.eye(3, dtype=torch.float64), atol=2)


def test_the_division_in_two_is_the_best_of_all() -> None:
    """Brute force over all 2^9 divisions; the ratio is the difference of the two log-likelihoods."""
    points = torch.randn(10, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def fit(part: Tensor) -> float:
        return -0.5 * float((part - part.mean(0)).square().sum()) if len(part) else 0.0

    best = max(
        fit(points[mask]) + fit(points[~mask])
        for code in range(1, 2**9)
        for mask in [torch.tensor([code >> i & 1 for i in range(10)], dtype=torch.bool)]
    )
    found = two_groups(points, restarts=20, seed=0)
    assert found is not None
    assert found.ratio == pytest.approx((best - fit(points)) / 10)


def test_the_division_does_not_depend_on_the_order() -> None:
    points = torch.randn(60, 4, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    points[:20] += 3
    order = torch.randperm(60, generator=torch.Generator().manual_seed(7))
    one, other = two_groups(points, 5, 0), two_groups(points[order], 5, 0)
    assert one is not None and other is not None
    assert torch.equal(one.second[order], other.second)
    assert two_groups(points[:1], 5, 0) is None
    assert two_groups(torch.ones(5, 2, dtype=torch.float64), 5, 0) is None


def test_clean_samples_are_told_from_the_suspicious_ones_exactly() -> None:
    """One clean sample too many or too few on either side turns the verdict."""
    second = torch.tensor([True] * 4 + [False] * 6)
    assert second_is_suspicious(second, torch.tensor([False, False, True]))
    assert not second_is_suspicious(second, torch.tensor([True, True, False]))
    assert second_is_suspicious(second, torch.zeros(0, dtype=torch.bool)), "without clean samples: the smaller one"


def planted(poison: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten classes of 60 samples; the first ``poison`` of class 4 lie elsewhere. And 12 clean samples a class."""
    features, labels = drawn([72] * 10, dims=8, seed=8)
    own = torch.arange(720) % 72 >= 60
    seen, seen_labels = features[~own].clone(), labels[~own]
    seen[(seen_labels == 4).nonzero().flatten()[:poison], 0] += 25
    return seen, seen_labels, features[own], labels[own]


@pytest.mark.parametrize("poison", [8, 20, 40])
def test_a_planted_group_is_found_even_where_it_is_the_majority(poison: int) -> None:
    seen, labels, known, known_labels = planted(poison)
    found = SubgroupAnalysis().judge(seen, labels, known, known_labels, 10, Context(0))
    assert found.targets == (4,)
    wanted = torch.zeros(600, dtype=torch.bool)
    wanted[(labels == 4).nonzero().flatten()[:poison]] = True
    assert torch.equal((found.margins > 0) & (labels == 4), wanted)


def test_without_poison_no_class_is_suspected() -> None:
    seen, labels, known, known_labels = planted(0)
    assert SubgroupAnalysis().judge(seen, labels, known, known_labels, 10, Context(0)).targets == ()


def test_two_natural_groups_are_excused_by_the_clean_samples() -> None:
    """The paper's rule, level 1, suspects them."""
    seen, labels, known, known_labels = planted(20)
    known = known.clone()
    known[(known_labels == 4).nonzero().flatten()[:4], 0] += 25
    parts = seen, labels, known, known_labels, 10, Context(0)
    assert SubgroupAnalysis().judge(*parts).targets == ()
    assert SubgroupAnalysis(level=1.0).judge(*parts).targets == (4,)


def test_missing_and_tiny_classes_are_not_judged() -> None:
    seen, labels, known, known_labels = planted(20)
    kept = (labels != 7) & ((labels != 8) | (torch.arange(600) % 60 < 2))
    found = SubgroupAnalysis().judge(seen[kept], labels[kept], known, known_labels, 10, Context(0))
    assert found.targets == (4,)
    assert bool(found.evidence.values[7:9].isnan().all())
    assert bool(torch.isfinite(found.margins).all())


def test_as_a_scan_it_says_the_same_of_the_model() -> None:
    backdoor, mine = victim(0, **PATCH), task(0)
    seen = backdoor.poison.apply(mine.train).as_seen()
    view = DefenderView(model=backdoor.model, clean=clean(0), suspicious=seen)
    report = ScanModel().apply(view, Context(0))
    found = Scan().analyse(backdoor.model, seen, clean(0), Context(0))
    assert report.targets == found.targets == (0,)
    assert report.score == pytest.approx(float(found.evidence.index.max()))
    assert ScanModel().scan(backdoor.model, clean(0), suspicious=seen).targets == (0,)
    with pytest.raises(InputError, match="needs the suspicious training set"):
        ScanModel().scan(backdoor.model, clean(0))


@case("defense/dataset/scan", core=True, auroc=least(0.9), tpr=least(0.8), fpr=most(0.02))
def effect_of_scan(seed: int) -> Numbers:
    return screened(seed, Scan())


@case("defense/dataset/scan_blended", auroc=least(0.95), tpr=least(0.9), fpr=most(0.02))
def effect_of_scan_on_blended(seed: int) -> Numbers:
    return screened(seed, Scan(), attacks.get("blended", "image")(poison_rate=0.1).run(task(seed), Context(seed)))


@case("defense/dataset/scan_rare", auroc=least(0.9), tpr=least(0.8), fpr=most(0.02))
def effect_of_scan_at_two_percent(seed: int) -> Numbers:
    return screened(seed, Scan(), victim(seed, poison_rate=0.02))


@case("defense/model/scan_model", accused=least(1), benign_accused=most(0))
def effect_of_scan_model(seed: int) -> Numbers:
    backdoor, mine, ctx = victim(seed, **PATCH), task(seed), Context(seed)
    report, innocent = (
        ScanModel().apply(DefenderView(model=model, clean=clean(seed), suspicious=data), ctx)
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
