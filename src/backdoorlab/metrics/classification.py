"""ACC, ASR, RA and the two rates that compare a defended model with the undefended one."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def rate(hits: Tensor) -> float | None:
    """Share of True in a bool tensor; None (not zero) if it is empty."""
    return float(hits.double().mean()) if len(hits) else None


def attack_metrics(
    clean: Tensor, clean_labels: Tensor, triggered: Tensor, target_labels: Tensor, true_labels: Tensor, num_classes: int
) -> dict[str, Any]:
    """Clean accuracy, attack success rate and robust accuracy, with their counts and per-class detail.

    Args:
        clean: int64 [N], predictions on clean test samples.
        clean_labels: int64 [N].
        triggered: int64 [M], predictions on triggered test samples (all-to-one: none of the target class).
        target_labels: int64 [M], the attacker's labels.
        true_labels: int64 [M], true labels.
        num_classes: K.

    Returns:
        acc, asr, ra (None where there are no samples), n_clean, n_triggered, acc_per_class, asr_per_class.
    """
    return {
        "acc": rate(clean == clean_labels),
        "asr": rate(triggered == target_labels),
        "ra": rate(triggered == true_labels),
        "n_clean": len(clean),
        "n_triggered": len(triggered),
        "acc_per_class": [rate((clean == clean_labels)[clean_labels == k]) for k in range(num_classes)],
        "asr_per_class": [rate((triggered == target_labels)[true_labels == k]) for k in range(num_classes)],
    }


def defense_effectiveness(acc: float, asr: float, acc_after: float, asr_after: float) -> float:
    """DER in [0, 1]: (max(0, drop of ASR) - max(0, drop of ACC) + 1) / 2; 0.5 means that nothing happened."""
    return (max(0.0, asr - asr_after) - max(0.0, acc - acc_after) + 1) / 2


def robust_improvement(acc: float, ra: float, acc_after: float, ra_after: float) -> float:
    """RIR in [0, 1]: (max(0, gain of RA) - max(0, drop of ACC) + 1) / 2; 0.5 means that nothing happened."""
    return (max(0.0, ra_after - ra) - max(0.0, acc - acc_after) + 1) / 2
