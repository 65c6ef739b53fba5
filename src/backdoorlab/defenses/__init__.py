"""Defenses: contracts in ``base``, one file per defense below."""

from backdoorlab.defenses.base import (
    DatasetDefense,
    Defense,
    InputDefense,
    ModelDefense,
    RepairDefense,
    ScanReport,
    TrainingDefense,
    defenses,
)

__all__ = [
    "DatasetDefense",
    "Defense",
    "InputDefense",
    "ModelDefense",
    "RepairDefense",
    "ScanReport",
    "TrainingDefense",
    "defenses",
]
