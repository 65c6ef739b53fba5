"""Thresholds from clean samples alone."""

from __future__ import annotations

import torch
from torch import Tensor

from backdoorlab.core.errors import InputError
from backdoorlab.data.split import Split
from backdoorlab.training.context import Context


def halves(clean: Split, name: str, ctx: Context, least: int = 4) -> tuple[Split, Split]:
    """Clean samples in two random halves: one to learn from, one on which the threshold is set.

    Learning and calibrating on the same samples makes clean inputs look more usual than they are, and rejects too many.

    Args:
        clean: the defender's samples.
        name: of the defense, for the message.
        ctx: its seed draws the halves.
        least: samples that are needed.

    Raises:
        InputError: if there are fewer.
    """
    if len(clean) < least:
        raise InputError(f"{name} needs at least {least} clean samples (half of them calibrate), got {len(clean)}")
    order = torch.randperm(len(clean), generator=ctx.generator(name, "halves"))
    return clean[order[: len(clean) // 2]], clean[order[len(clean) // 2 :]]


def clean_quantile(scores: Tensor, frr: float) -> float:
    """Threshold above which at most a share ``frr`` of the clean scores lie (higher = more suspicious).

    Raises:
        InputError: without scores.
    """
    if not len(scores):
        raise InputError("a threshold needs clean scores, got none")
    return float(torch.quantile(scores.double(), 1 - frr, interpolation="higher"))
