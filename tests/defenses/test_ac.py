"""Activation clustering: planted clusters, the rules, and invariance to order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from backdoorlab.attacks import Backdoor, attacks
from backdoorlab.core.errors import InputError
from backdoorlab.data.split import BACKDOOR, Split
from backdoorlab.defenses import DefenderView
from backdoorlab.defenses.dataset.ac import (
    ActivationClustering,
    TwoClusters,
    own_over_other,
    reduce_features,
    two_clusters,
)
from backdoorlab.models import Classifier
from backdoorlab.tasks import Task
from backdoorlab.training import Context
from effect_tools import RARE, Numbers, benign, case, effects, found, least, most, task, victim


@pytest.fixture(scope="module")
def rare(digits_task: Task) -> Backdoor:
    """BadNets at 5 %: the poison is a minority of its class."""
    return attacks.get("badnets", "image")(poison_rate=0.05, exclude_target=True).run(digits_task, Context())


def planted(count: int = 120, poison: int = 30) -> torch.Tensor:
    features = torch.randn(count, 24, generator=torch.Generator().manual_seed(0))
    features[:poison, 5] += 12
    return features


@pytest.mark.parametrize("reduction", ["pca", "ica"])
def test_a_planted_cluster_is_recovered(reduction: str) -> None:
    found = two_clusters(planted(), 10, reduction, seed=0)
    assert found is not None
    assert (found.margin > 0).nonzero().flatten().tolist() == list(range(30))
    assert found.share == pytest.approx(0.25)


def test_margin_is_the_difference_of_distances_to_the_two_means() -> None:
    features = planted()
    found = two_clusters(features, 24, "pca", seed=0)
    assert found is not None
    small = features[:30].mean(0), features[30:].mean(0)  # all dimensions are kept, so distances are those of the data
    wanted = (features - small[1]).norm(dim=1) - (features - small[0]).norm(dim=1)
    assert torch.allclose(found.margin.float(), wanted, atol=1e-4)


def test_reduction_spans_the_leading_directions() -> None:
    features = planted().double().numpy()
    centred = features - features.mean(0)
    left, size, _ = np.linalg.svd(centred, full_matrices=False)
    assert np.allclose(np.abs(reduce_features(features, 3, "pca", 0)), np.abs((left * size)[:, :3]))


def test_equal_features_have_no_clusters() -> None:
    assert two_clusters(torch.ones(30, 4), 10, "pca", seed=0) is None


@pytest.mark.parametrize(
    ("rule", "share", "silhouette", "verdict"),
    [
        ("silhouette", 0.2, 0.5, True),
        ("silhouette", 0.2, 0.05, False),
        ("silhouette", 0.45, 0.5, False),
        ("relative-size", 0.2, 0.05, True),
        ("relative-size", 0.45, 0.5, False),
        ("smaller", 0.49, 0.0, True),
    ],
)
def test_rules(rule: str, share: float, silhouette: float, verdict: bool) -> None:
    assert ActivationClustering(rule=rule).poisoned(TwoClusters(torch.zeros(1), share, silhouette)) is verdict


def test_flags_follow_their_samples_under_shuffling(rare: Backdoor, digits_task: Task) -> None:
    data, method = rare.poison.apply(digits_task.train).as_seen(), ActivationClustering(rule="smaller")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(1))
    flagged = method.flags(
        method.score(DefenderView(suspicious=data, model=rare.model), Context()), DefenderView(suspicious=data)
    )
    shuffled = method.flags(
        method.score(DefenderView(suspicious=data[order], model=rare.model), Context()),
        DefenderView(suspicious=data[order]),
    )
    assert flagged.any()
    assert (shuffled == flagged[order]).float().mean() > 0.995


def test_tiny_classes_are_not_judged(rare: Backdoor, digits_task: Task) -> None:
    data: Split = rare.poison.apply(digits_task.train).as_seen()
    few = data[torch.cat([(data.labels == 0).nonzero().flatten()[:19], (data.labels != 0).nonzero().flatten()])]
    scores = ActivationClustering(rule="smaller").score(DefenderView(suspicious=few, model=rare.model), Context())
    assert not scores[few.labels == 0].any()
    assert scores[few.labels == 1].any()


def test_own_over_other_by_hand() -> None:
    """Three of the class 2, two of class 0, one of class 5."""
    assert own_over_other(torch.tensor([2, 0, 2, 5, 0, 2]), 2) == 1.5
    assert own_over_other(torch.tensor([0, 0, 1]), 7) == 0
    assert own_over_other(torch.tensor([3, 3]), 3) == float("inf")


def test_reclassification_needs_the_blueprint(rare: Backdoor, digits_task: Task) -> None:
    view = DefenderView(suspicious=digits_task.train, model=rare.model)
    with pytest.raises(InputError, match="ac: rule=reclassify trains a model and needs the blueprint"):
        ActivationClustering(rule="reclassify").apply(view, Context())
    with pytest.raises(InputError, match="blueprint"):
        ActivationClustering(rule="reclassify").screen(digits_task.train, rare.model)


def test_an_excluded_cluster_of_poison_goes_back_to_where_it_came_from(rare: Backdoor, digits_task: Task) -> None:
    """A model trained without them takes the poison for its true classes, and a part of class 1 for class 1."""
    data = rare.poison.apply(digits_task.train)
    clusters = {}
    for k, inside in ((0, data.roles == BACKDOOR), (1, torch.arange(len(data)) % 3 == 0)):
        rows = (data.labels == k).nonzero().flatten()
        margin = torch.where(inside[rows], 1.0, -1.0).double()
        clusters[k] = rows, TwoClusters(margin, float((margin > 0).float().mean()), 0.5)
    view = DefenderView(suspicious=data.as_seen(), model=rare.model, blueprint=digits_task.blueprint)
    assert ActivationClustering(rule="reclassify").reclassified(clusters, view, Context()) == {0}


@case(
    "defense/dataset/ac",
    fragile="TPR 0.32 in one of nine draws, 0 for the strict silhouette in two",
    tpr=least(0.7),
    fpr=most(0.15),
    auroc=least(0.75),
    strict_tpr=least(0.7),
    strict_fpr=most(0.05),
    benign_strict=most(0.02),
    benign_share=most(0.7),
)
def effect_of_ac(seed: int) -> Numbers:
    """By default and with a strict silhouette; a benign model's clusters are writing styles, which the paper's
    silhouette of 0.15 lets pass in part ("benign_share": of what is flagged without that rule), 0.4 hardly ever."""
    backdoor = victim(seed, **RARE)
    poisoned = backdoor.poison.apply(task(seed).train)
    strict = ActivationClustering(min_silhouette=0.4)

    def flagged(method: ActivationClustering, data: Split, model: Classifier) -> tuple[Tensor, Tensor]:
        scores = method.score(DefenderView(suspicious=data, model=model), Context(seed))
        return method.flags(scores, DefenderView(suspicious=data)), scores

    truth = poisoned.roles == BACKDOOR
    plain = found(*flagged(ActivationClustering(), poisoned.as_seen(), backdoor.model), truth)
    careful = found(*flagged(strict, poisoned.as_seen(), backdoor.model), truth)
    shares = [
        float(flagged(method, task(seed).train, benign(seed))[0].float().mean())
        for method in (strict, ActivationClustering(), ActivationClustering(rule="smaller"))
    ]
    return plain | {
        "strict_tpr": careful["tpr"],
        "strict_fpr": careful["fpr"],
        "benign_strict": shares[0],
        "benign_share": shares[1] / shares[2],
    }


test_effect = effects(__name__)
