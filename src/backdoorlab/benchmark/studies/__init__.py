"""Studies: the claims of a paper reproduced cell by cell, on any task, with a table and figures."""

from __future__ import annotations

from backdoorlab.benchmark.studies.abl import IsolationStudy
from backdoorlab.benchmark.studies.base import (
    Cell,
    Measurement,
    Outcome,
    Planned,
    Site,
    Study,
    StudyOptions,
    plan_study,
    run_study,
)
from backdoorlab.benchmark.studies.linf import NormStudy

STUDIES: dict[str, type[Study]] = {study.name: study for study in (IsolationStudy, NormStudy)}
"""All studies by name."""

__all__ = [
    "STUDIES",
    "Cell",
    "IsolationStudy",
    "Measurement",
    "NormStudy",
    "Outcome",
    "Planned",
    "Site",
    "Study",
    "StudyOptions",
    "plan_study",
    "run_study",
]
