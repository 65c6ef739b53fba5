"""Datasets as tables of raw samples, and the record of what an attack changed in them."""

from backdoorlab.data.sources import DatasetSource, DatasetSpec, datasets, load_dataset
from backdoorlab.data.split import BACKDOOR, CLEAN, COVER, Dataset, Inputs, Poison, PoisonedSplit, Split

__all__ = [
    "BACKDOOR",
    "CLEAN",
    "COVER",
    "Dataset",
    "DatasetSource",
    "DatasetSpec",
    "Inputs",
    "Poison",
    "PoisonedSplit",
    "Split",
    "datasets",
    "load_dataset",
]
