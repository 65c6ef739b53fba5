"""Attacks: contracts in ``base``, one file per attack below."""

from backdoorlab.attacks.base import (
    Attack,
    Backdoor,
    PoisoningAttack,
    TargetMap,
    TrainingAttack,
    Trigger,
    WeightAttack,
    attacks,
)

__all__ = [
    "Attack",
    "Backdoor",
    "PoisoningAttack",
    "TargetMap",
    "TrainingAttack",
    "Trigger",
    "WeightAttack",
    "attacks",
]
