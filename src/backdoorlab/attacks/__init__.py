"""Attacks: contracts in ``base``, one file per attack below."""

from backdoorlab.attacks.base import Attack, attacks
from backdoorlab.attacks.poisoning import PoisoningAttack, TrainingAttack, WeightAttack
from backdoorlab.attacks.result import Backdoor
from backdoorlab.attacks.selection import ClassificationAttack
from backdoorlab.attacks.targets import TargetMap
from backdoorlab.attacks.triggers.base import Trigger
from backdoorlab.core.registry import by_attribute

__all__ = [
    "Attack",
    "Backdoor",
    "ClassificationAttack",
    "PoisoningAttack",
    "TargetMap",
    "TrainingAttack",
    "Trigger",
    "WeightAttack",
    "attacks",
]


def __getattr__(name: str) -> type:
    """Any method by the name of its class or its registered name: ``attacks.BadNets``."""
    return by_attribute(attacks, name)


def __dir__() -> list[str]:
    return sorted({*__all__, *(cls.__name__ for cls in attacks)})
