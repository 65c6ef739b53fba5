"""Which samples a training defense trusts, by a score of each: pure functions of scores and labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def symmetric_cross_entropy(logits: Tensor, labels: Tensor, alpha: float = 0.1, beta: float = 1.0) -> Tensor:
    """The loss alpha CE + beta RCE of each sample, RCE = - sum_k p_k ln y_k, y one-hot, clamped at 1e-4.

    Wang et al., "Symmetric Cross Entropy for Robust Learning with Noisy Labels", ICCV 2019. A wrong label costs at most
    -beta ln 1e-4 through the second term, so that it does not rule the training.

    Args:
        logits: float [B, K].
        labels: int64 [B].
        alpha: weight of the cross-entropy.
        beta: weight of the reverse one.

    Returns:
        Float [B].
    """
    known = F.one_hot(labels, logits.shape[1]).to(logits.dtype).clamp(min=1e-4)
    reverse = -(logits.softmax(1).clamp(min=1e-7) * known.log()).sum(1)
    return alpha * F.cross_entropy(logits, labels, reduction="none") + beta * reverse


def lowest(scores: Tensor, share: float) -> Tensor:
    """The share of lowest scores, at least one: float [N] -> bool [N]."""
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[scores.argsort(stable=True)[: max(1, int(share * len(scores)))]] = True
    return chosen


def lowest_of_each(scores: Tensor, labels: Tensor, share: float = 0.0, count: int = 0) -> Tensor:
    """In each class that occurs the lowest scores.

    Args:
        scores: float [N].
        labels: int64 [N].
        share: of the class, at least one sample.
        count: instead of a share, so many (all of a smaller class); 0 goes by the share.

    Returns:
        Bool [N].
    """
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().flatten()
        wanted = count or max(1, int(share * len(rows)))
        chosen[rows[scores[rows].argsort(stable=True)[:wanted]]] = True
    return chosen


FLOOR = 0.1
"""Share of each class that :func:`trusted_half` keeps at least."""


def trusted_half(scores: Tensor, labels: Tensor, share: float) -> Tensor:
    """The share of lowest scores of all samples, and in each class at least the lowest tenth of it.

    Without the second part a class that is hard to learn would vanish from what is trusted. At least one sample, that
    of the highest score, is not trusted where there are two or more.

    Args:
        scores: float [N], low = trusted.
        labels: int64 [N].
        share: of all samples.

    Returns:
        Bool [N].
    """
    chosen = lowest(scores, share) | lowest_of_each(scores, labels, FLOOR)
    if bool(chosen.all()) and len(chosen) > 1:
        chosen[scores.argmax()] = False
    return chosen
