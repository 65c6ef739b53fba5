from __future__ import annotations

import pytest
import torch
from sklearn.metrics import f1_score, precision_score, recall_score

from backdoorlab.core.errors import BackdoorLabError, InputError
from backdoorlab.metrics.detection import detection_metrics, detection_reasons


def test_against_sklearn_and_brute_force():
    generator = torch.Generator().manual_seed(0)
    positives = torch.rand(200, generator=generator) < 0.2
    scores = torch.rand(200, generator=generator) + 0.4 * positives
    scores = (scores * 10).round() / 10  # with ties
    flags = scores > 0.8
    found = detection_metrics(scores, flags, positives)
    pairs = scores[positives][:, None] - scores[~positives][None]
    assert found["auroc"] == pytest.approx(float(((pairs > 0) + 0.5 * (pairs == 0)).mean()))
    assert found["precision"] == pytest.approx(precision_score(positives, flags))
    assert found["tpr"] == pytest.approx(recall_score(positives, flags))
    assert found["f1"] == pytest.approx(f1_score(positives, flags))
    assert found["fpr"] == pytest.approx(float(flags[~positives].float().mean()))
    misses, rho = int((positives & ~flags).sum()), float(positives.double().mean())
    hits = int((positives & flags).sum())
    recall = hits / (hits + (1 - rho) / rho * misses)
    expected = 2 * found["precision"] * recall / (found["precision"] + recall)
    assert found["f1_weighted"] == pytest.approx(expected)
    assert detection_reasons(found) == {}


def test_nothing_flagged_has_no_precision_and_no_hits():
    positives = torch.tensor([True, False, False, True])
    found = detection_metrics(torch.zeros(4), torch.zeros(4, dtype=torch.bool), positives)
    assert (found["tpr"], found["fpr"], found["f1"], found["precision"]) == (0.0, 0.0, 0.0, None)
    assert found["auroc"] == 0.5  # constant scores rank nothing
    assert found["auprc"] == 0.5
    assert detection_reasons(found) == {"precision": "nothing was flagged"}


def test_no_positives_leaves_only_false_alarms():
    found = detection_metrics(torch.arange(4.0), torch.tensor([True, False, False, False]), torch.zeros(4).bool())
    assert found["fpr"] == 0.25
    assert found["precision"] == 0.0
    assert {k for k, v in found.items() if v is None} == {"auroc", "auprc", "tpr", "f1", "f1_weighted"}
    assert set(detection_reasons(found)) == {"auroc", "auprc", "tpr", "f1", "f1_weighted"}


def test_covers_count_neither_way():
    scores, flags = torch.tensor([3.0, 2.0, 1.0, 0.0]), torch.tensor([True, True, False, False])
    positives, covers = torch.tensor([True, False, False, False]), torch.tensor([False, True, False, False])
    found = detection_metrics(scores, flags, positives, covers)
    assert (found["tpr"], found["fpr"], found["precision"]) == (1.0, 0.0, 1.0)
    assert (found["n_ignored"], found["ignored_flagged"]) == (1, 1.0)
    assert detection_metrics(scores, flags, positives)["fpr"] == pytest.approx(1 / 3)


def test_infinite_scores_keep_their_rank_and_nan_is_an_error():
    positives = torch.tensor([True, False, False])
    assert detection_metrics(torch.tensor([torch.inf, 5.0, -torch.inf]), None, positives)["auroc"] == 1.0
    with pytest.raises(BackdoorLabError, match="1 of 3 scores are NaN"):
        detection_metrics(torch.tensor([torch.nan, 0, 0]), None, positives)


def test_a_ranking_without_decision_and_the_reverse():
    positives = torch.tensor([True, False])
    ranked = detection_metrics(torch.tensor([1.0, 0.0]), None, positives)
    assert ranked["auroc"] == 1.0
    assert ranked["tpr"] is None
    assert detection_reasons(ranked)["tpr"] == "the method sets no samples apart"
    decided = detection_metrics(None, torch.tensor([True, False]), positives)
    assert decided["f1"] == 1.0
    assert detection_reasons(decided)["auroc"] == "the method ranks no samples"
    with pytest.raises(InputError, match="one of flags per sample, got 3 for 2"):
        detection_metrics(None, torch.zeros(3).bool(), positives)
