"""Settings that make the work of a method short, for tests of promises that do not depend on how long it works.

One place for all of them. A method whose class name is not listed gets :data:`USUAL` values for the hyper-parameters of
these names; :func:`quick` refuses a method that would still work long, and says where to put what.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, TypeVar

from backdoorlab.core.method import Method

M = TypeVar("M", bound=Method)

USUAL: dict[str, Any] = {
    "epochs": 1,
    "iterations": 3,
    "overlays": 4,
    "ascent_steps": 1,
    "isolation": 0.05,
    "min_steps": 2,
    "rounds": 3,
    "restarts": 2,
}
"""Hyper-parameter -> value that suits 80 samples."""

METHODS: dict[str, dict[str, Any]] = {
    "lf": {"steps": 3},
    "refool": {"pool": 6},
    "trojannn": {"steps": 3},
    "blind": {"gate_threshold": 100.0},
    "lc": {"steps": 2},
    "narcissus": {"steps": 30},  # RAdam hardly moves before its sixth step
    "lira": {"strength": 0.1},  # a generator that is hardly trained moves some pictures by less than one grey level
    "dfst": {"style_steps": 3, "detox_steps": 3},
    "lba": {"steps": 3},
    "ssba": {"steps": 3, "batch_size": 4, "width": 4},
    "poisonink": {"steps": 3, "batch_size": 4, "width": 4},
    "fc": {"steps": 3},
    "htba": {"steps": 3},
    "tuap": {"passes": 2, "deepfool_steps": 50, "target": 1},
    "asset": {"inner_steps": 3},
    "freeeagle": {"steps": 3},
    "mntd": {"shadows": 2, "folds": 2, "queries": 3, "meta_steps": 3, "shadow_epochs": 1},
    "nad": {"teacher_epochs": 1},
    "mcr": {"curve_epochs": 1},
    "nc": {"tune_epochs": 2},
    "dbd": {"head_steps": 10},
    "d_st": {"head_steps": 10},
    "rnp": {"unlearn_steps": 2, "recover_steps": 2},
}
"""Name of a method -> settings beside the usual ones; only what the promises do not depend on."""

LONG = re.compile(r"(^|_)(epochs|iterations|steps|rounds|passes|trials)$")
FEW = 10
"""Repetitions that a method may have without being listed above."""


def quick(cls: type[M], **changes: Any) -> M:
    """A method that works shortly; ``changes`` are settings of the caller's own.

    Raises:
        AssertionError: if a hyper-parameter says that the method would still repeat something often.
    """
    fields = {field.name: field.default for field in dataclasses.fields(cls)}
    settings = {name: value for name, value in USUAL.items() if name in fields and hasattr(cls, "stage")}
    settings |= METHODS.get(cls.name, {}) | changes
    for name, value in fields.items():
        long = isinstance(value, int) and value > FEW and LONG.search(name) and name not in settings
        assert not long, f"{cls.name}.{name} is {value}: give it a small value in METHODS of tests/quick.py"
    return cls.build(settings)
