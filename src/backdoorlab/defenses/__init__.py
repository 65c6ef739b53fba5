"""Defenses: contracts in ``base`` and ``view``, one file per defense below."""

from backdoorlab.core.registry import by_attribute
from backdoorlab.defenses.base import (
    DatasetDefense,
    Defense,
    InputDefense,
    InputDetector,
    ModelDefense,
    Outcome,
    Repair,
    RepairDefense,
    ScanReport,
    Screening,
    TrainingDefense,
    TrainingReport,
    defenses,
)
from backdoorlab.defenses.view import DefenderView

__all__ = [
    "DatasetDefense",
    "DefenderView",
    "Defense",
    "InputDefense",
    "InputDetector",
    "ModelDefense",
    "Outcome",
    "Repair",
    "RepairDefense",
    "ScanReport",
    "Screening",
    "TrainingDefense",
    "TrainingReport",
    "defenses",
]


def __getattr__(name: str) -> type:
    """Any method by the name of its class or its registered name: ``defenses.ANP``."""
    return by_attribute(defenses, name)


def __dir__() -> list[str]:
    return sorted({*__all__, *(cls.__name__ for cls in defenses)})
