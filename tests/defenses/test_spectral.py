"""Spectral signatures: scores against numpy's SVD and the removal rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from backdoorlab.data.split import BACKDOOR, Split
from backdoorlab.defenses import DefenderView
from backdoorlab.defenses.dataset.spectral import SpectralSignatures, spectral_scores, standardise
from backdoorlab.training import Context
from effect_tools import Numbers, case, effects, found, least, task, victim


def test_scores_equal_numpy_svd() -> None:
    features = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) + 5
    centred = features.double().numpy() - features.double().numpy().mean(0)
    _, _, right = np.linalg.svd(centred)
    assert np.allclose(spectral_scores(features).numpy(), (centred @ right[0]) ** 2)


def test_scores_ignore_the_class_mean() -> None:
    features = torch.randn(30, 6, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(spectral_scores(features), spectral_scores(features + 100), atol=1e-3)


def test_planted_outliers_score_highest() -> None:
    features = torch.randn(200, 16, generator=torch.Generator().manual_seed(2))
    features[:20, 3] += 8
    assert set(spectral_scores(features).topk(20).indices.tolist()) == set(range(20))


def test_equal_scores_standardise_to_zero() -> None:
    assert standardise(torch.full((4,), 3.0)).tolist() == [0, 0, 0, 0]
    assert float(standardise(torch.tensor([1.0, 2.0, 6.0])).std(correction=0)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("settings", "counts"),
    [({}, [3, 6]), ({"eps": 0.2}, [6, 12]), ({"percentile": 90.0}, [2, 4]), ({"eps": 1.0}, [10, 20])],
)
def test_a_fixed_share_of_every_class_is_removed(settings: dict[str, float], counts: list[int]) -> None:
    labels = torch.tensor([0] * 20 + [1] * 40)
    data = Split(torch.zeros(60, 1, 4, 4, dtype=torch.uint8), labels, ("a", "b"))
    scores = torch.randperm(60, generator=torch.Generator().manual_seed(3)).float()
    flagged = SpectralSignatures(**settings).flags(scores, DefenderView(suspicious=data))
    for k, count in enumerate(counts):
        assert flagged[labels == k].sum() == count
        assert scores[(labels == k) & flagged].min() > scores[(labels == k) & ~flagged].max()


@case("defense/dataset/spectral", fragile="TPR 0.45 in one of nine draws", auroc=least(0.85), tpr=least(0.5))
def effect_of_spectral(seed: int) -> Numbers:
    """BadNets at 2 %; AUROC within the target class."""
    backdoor = victim(seed, poison_rate=0.02, exclude_target=True)
    poisoned = backdoor.poison.apply(task(seed).train)
    method = SpectralSignatures()
    scores = method.score(DefenderView(suspicious=poisoned.as_seen(), model=backdoor.model), Context(seed))
    truth, target = poisoned.roles == BACKDOOR, poisoned.labels == 0
    numbers = found(method.flags(scores, DefenderView(suspicious=poisoned.as_seen())), scores, truth)
    return numbers | {"auroc": float(roc_auc_score(truth[target], scores[target]))}


test_effect = effects(__name__)
