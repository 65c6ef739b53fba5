"""Published numbers beside ours: the public leaderboard of BackdoorBench, as it was when it was copied.

Source: BackdoorBench leaderboard, http://backdoorbench.com (accuracies in percent; data set, model, attack, poison
ratio, defense). Wu et al., "BackdoorBench: A Comprehensive Benchmark of Backdoor Learning", NeurIPS 2022 Datasets and
Benchmarks. Single runs without intervals.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from statistics import fmean
from typing import Any

SOURCE = "BackdoorBench leaderboard, http://backdoorbench.com"

_DATASETS = {"cifar10": "cifar10", "cifar100": "cifar100", "gtsrb": "gtsrb", "tiny_imagenet": "tiny_imagenet"}
_ATTACKS = {
    "BPP": "bpp",
    "BadNet": "badnets",
    "Blended": "blended",
    "InputAware": "input_aware",
    "LC": "lc",
    "LF": "lf",
    "SIG": "sig",
    "SSBA": "ssba",
    "TrojanNN": "trojannn",
    "WaNet": "wanet",
}
_DEFENSES = {
    "none": "none",
    "ABL": "abl",
    "AC": "ac",
    "ANP": "anp",
    "CLP": "clp",
    "D-BR": "d_br",
    "D-ST": "d_st",
    "DBD": "dbd",
    "DDE": "ep",
    "FP": "fp",
    "FT": "ft",
    "MBNS": "bnp",
    "NAD": "nad",
    "NC": "nc",
    "i-BAU": "ibau",
}
_MODELS = {
    "PreActResNet-18": "preact_resnet18",
    "VGG19_BN": "vgg19_bn",
    "ConvNext_tiny": "convnext_tiny",
    "ViT_b_16": "vit_b_16",
}
REFERENCE = "preact_resnet18"
"""The published model that stands beside ours where the benchmark has no such network."""

_METRICS = {"acc": "clean_accuracy", "asr": "attack_success_rate", "ra": "robust_accuracy"}

Place = tuple[str, str, str, float, str]
"""Data set, model, attack, poison rate, defense, by the names of this library."""


@dataclass(frozen=True)
class Published:
    """One published run.

    Attributes:
        acc: clean accuracy, a share.
        asr: attack success rate, a share.
        ra: robust accuracy, a share.
    """

    acc: float
    asr: float
    ra: float


@lru_cache(maxsize=1)
def published() -> dict[Place, Published]:
    """All published runs, by data set, model, attack, poison rate and defense."""
    text = files("backdoorlab.benchmark").joinpath("published_backdoorbench.csv").read_text(encoding="ascii")
    table: dict[Place, Published] = {}
    for row in csv.DictReader(text.splitlines()):
        place = (
            _DATASETS[row["dataset"]],
            _MODELS[row["model"]],
            _ATTACKS[row["attack"]],
            float(row["poison_ratio"]),
            _DEFENSES[row["defense"]],
        )
        table[place] = Published(*(float(row[column]) / 100 for column in _METRICS.values()))
    return table


def beside(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Our runs beside the published ones.

    Args:
        rows: of the results table; see :class:`~backdoorlab.benchmark.results.Results`.

    Returns:
        A record for each (data set, model, recipe, attack, poison rate, defense) of finished runs that has a published
        counterpart: n (runs), our means of acc, asr and ra, "published_model", and for each metric the published value
        ("published_acc") and ours minus theirs ("acc_difference"). All are shares; None where we have no value.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        if row.get("status") == "ok" and row.get("poison_rate") is not None:
            groups[
                tuple(row[name] for name in ("dataset", "model", "recipe", "attack", "poison_rate", "defense"))
            ].append(row)
    table, records = published(), []
    for (dataset, model, recipe, attack, rate, defense), runs in sorted(groups.items(), key=lambda item: str(item[0])):
        known = model if model in _MODELS.values() else REFERENCE
        theirs = table.get((dataset, known, attack, round(float(rate), 6), defense))
        if theirs is None:
            continue
        record: dict[str, Any] = {
            "dataset": dataset,
            "model": model,
            "recipe": recipe,
            "attack": attack,
            "poison_rate": rate,
            "defense": defense,
            "n": len(runs),
            "published_model": known,
        }
        for name in _METRICS:
            values = [run[name] for run in runs if run.get(name) is not None]
            ours, other = fmean(values) if values else None, getattr(theirs, name)
            record |= {
                name: ours,
                f"published_{name}": other,
                f"{name}_difference": None if ours is None else ours - other,
            }
        records.append(record)
    return records
