"""Metrics of detectors: positives are poisoned samples, scores rise with suspicion.

Counted over the inspected set: TPR = TP / (TP + FN), FPR = FP / (FP + TN), precision = TP / (TP + FP) and
F1 = 2 TP / (2 TP + FP + FN). The weighted F1 counts a miss w = (1 - rho) / rho times in the recall, where rho is the
share of positives (9 at 10 % poison, the constant of BackdoorBench). What is undefined is None, never 0 or NaN: without
a flag there is no precision, without a positive no TPR, no AUROC, no F1.

Cover samples (role 2: triggered or perturbed, true label kept) carry no wrong label, so that missing one is no miss and
flagging one no false alarm. They are left out of both classes; the share of them that is flagged is reported beside.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from backdoorlab.core.errors import BackdoorLabError, InputError


def detection_metrics(
    scores: Tensor | None, flags: Tensor | None, positives: Tensor, ignore: Tensor | None = None
) -> dict[str, Any]:
    """Ranking quality of scores and confusion of flags.

    Args:
        scores: float [N], higher = more suspicious; None if the detector does not rank.
        flags: bool [N], True = flagged as poisoned; None if the detector sets no threshold.
        positives: bool [N], True = poisoned.
        ignore: bool [N], samples that count neither way (covers).

    Returns:
        auroc, auprc, tpr, fpr, precision, f1, f1_weighted, n_positive, n_negative, n_flagged (and ignored_flagged).

    Raises:
        BackdoorLabError: if a score is NaN.
        InputError: if the lengths differ.
    """
    for name, values in (("scores", scores), ("flags", flags), ("ignore", ignore)):
        if values is not None and len(values) != len(positives):
            raise InputError(f"detection metrics need one of {name} per sample, got {len(values)} for {len(positives)}")
    metrics: dict[str, Any] = {}
    if ignore is not None and bool(ignore.any()):
        metrics["n_ignored"] = int(ignore.sum())
        if flags is not None:
            metrics["ignored_flagged"] = float(flags[ignore].double().mean())
        scores = None if scores is None else scores[~ignore]
        flags = None if flags is None else flags[~ignore]
        positives = positives[~ignore]
    metrics |= {"n_positive": int(positives.sum()), "n_negative": int((~positives).sum())}
    return metrics | _ranking(scores, positives) | _confusion(flags, positives)


def detection_reasons(metrics: dict[str, Any]) -> dict[str, str]:
    """For every null of :func:`detection_metrics`: why there is no number."""
    reasons = {}
    for name in ("auroc", "auprc", "tpr", "fpr", "precision", "f1", "f1_weighted", "n_flagged"):
        if metrics[name] is not None:
            continue
        if metrics["n_flagged"] is None and name not in ("auroc", "auprc"):
            reasons[name] = "the method sets no samples apart"
        elif not metrics["n_positive"] and name != "fpr" and not (name == "precision" and metrics["n_flagged"] == 0):
            reasons[name] = "no poisoned samples to be found"
        elif not metrics["n_negative"] and name in ("auroc", "fpr"):
            reasons[name] = "no clean samples"
        elif name in ("auroc", "auprc"):
            reasons[name] = "the method ranks no samples"
        else:
            reasons[name] = "nothing was flagged"
    return reasons


def _ranking(scores: Tensor | None, positives: Tensor) -> dict[str, Any]:
    from sklearn.metrics import average_precision_score, roc_auc_score  # a second that most commands do not need

    if scores is None:
        return {"auroc": None, "auprc": None}
    values, labels = scores.detach().double().cpu(), positives.cpu()
    if bool(values.isnan().any()):
        raise BackdoorLabError(f"{int(values.isnan().sum())} of {len(values)} scores are NaN")
    largest = float(values[values.isfinite()].abs().max()) if bool(values.isfinite().any()) else 0.0
    values = values.clamp(-2 * largest - 1, 2 * largest + 1)  # infinite scores keep their rank
    any_positive, all_positive = bool(labels.any()), bool(labels.all())
    return {
        "auroc": float(roc_auc_score(labels.numpy(), values.numpy())) if any_positive and not all_positive else None,
        "auprc": float(average_precision_score(labels.numpy(), values.numpy())) if any_positive else None,
    }


def _confusion(flags: Tensor | None, positives: Tensor) -> dict[str, Any]:
    if flags is None:
        return dict.fromkeys(("tpr", "fpr", "precision", "f1", "f1_weighted", "n_flagged"))
    flags, labels = flags.bool().cpu(), positives.cpu()
    tp, fp = int((flags & labels).sum()), int((flags & ~labels).sum())
    fn, tn = int(labels.sum()) - tp, int((~labels).sum()) - fp
    weight = (fp + tn) / (tp + fn) if tp + fn else 1.0
    return {
        "tpr": tp / (tp + fn) if tp + fn else None,
        "fpr": fp / (fp + tn) if fp + tn else None,
        "precision": tp / (tp + fp) if tp + fp else None,
        "f1": 2 * tp / (2 * tp + fp + fn) if tp + fn else None,
        "f1_weighted": 2 * tp / (2 * tp + fp + weight * fn) if tp + fn and 2 * tp + fp + weight * fn else None,
        "n_flagged": tp + fp,
    }
