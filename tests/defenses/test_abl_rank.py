"""ABL's isolation as a filter: the ranking is that of ABL, and the flags are its lowest losses."""

from __future__ import annotations

import torch

from backdoorlab.defenses import DefenderView
from backdoorlab.defenses.dataset.abl_rank import AblRank
from backdoorlab.defenses.training.abl import AntiBackdoorLearning
from backdoorlab.testing import tiny_task
from backdoorlab.training import Context
from effect_tools import RARE, Numbers, case, effects, least, most, screened, victim


def test_the_score_is_minus_the_loss_of_abls_isolation() -> None:
    mine = tiny_task()
    view = DefenderView(suspicious=mine.train, blueprint=mine.blueprint)
    outcome = AblRank(gamma=0.4, isolation=0.1).apply(view, Context(3))
    _, losses = AntiBackdoorLearning(gamma=0.4).isolate(mine.train, mine.blueprint, Context(3))
    assert torch.equal(outcome.scores, -losses)
    assert set(outcome.flags.nonzero().flatten().tolist()) == set(losses.topk(8, largest=False).indices.tolist())


def test_at_least_one_sample_is_flagged() -> None:
    view = DefenderView(suspicious=tiny_task().train)
    assert AblRank(isolation=0.001).flags(torch.arange(80.0), view).nonzero().flatten().tolist() == [79]


@case(
    "defense/dataset/abl_rank",
    fragile="AUROC 0.92 in bf16, 0.70 in fp32",
    auroc=least(0.8),
    tpr=least(0.3),
    fpr=most(0.05),
)
def effect_of_abl_rank(seed: int) -> Numbers:
    """The length of the isolation phase is that of ABL's own cases."""
    return screened(seed, AblRank(isolation=0.05, turning=0.35), victim(seed, **RARE))


test_effect = effects(__name__)
