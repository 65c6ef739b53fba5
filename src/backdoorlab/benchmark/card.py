"""The result card: everything that is known about one run, as JSON that a published schema describes.

A number that does not exist is null, and ``null_reasons`` says why; it is never -1, 0 or NaN. The schema lies beside
this file as ``card.schema.json``, so that other programs can read cards without this library.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import from_json

from backdoorlab.core.canonical import dump_canonical, jsonable
from backdoorlab.core.errors import ArtifactError
from backdoorlab.metrics.result import Metrics

if TYPE_CHECKING:
    from backdoorlab.benchmark.spec import Experiment

SCHEMA_VERSION = 2
SCHEMA_FILE = Path(__file__).with_name("card.schema.json")

METRICS = (
    "acc",
    "asr",
    "ra",
    "der",
    "rir",
    "auroc",
    "tpr",
    "fpr",
    "precision",
    "f1",
    "score",
    "verdict",
    "targets",
)
"""Keys that every card of a run has, null where they mean nothing."""

_SINCE_2 = ("modality", "changed")
_PARSED = "values that come from a parsed file"
"""Context of a validation that need not turn tensors and tuples into plain values."""


class Card(BaseModel):
    """One run of one stage."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1, 2] = Field(
        2, description="version of this format; 1 lacks the fields modality and changed"
    )
    stage: Literal["benign", "attack", "defense", "asset"] = Field(description="what was run")
    key: str = Field(pattern="^[0-9a-f]{20}$", description="hash of the resolved spec")
    status: Literal["ok", "failed", "not_applicable"]
    reason: str | None = Field(None, description="why the status is not ok")
    spec: dict[str, Any] = Field(description="the experiment with all defaults resolved")
    metrics: dict[str, Any] = Field(description="numbers; missing ones are null")
    null_reasons: dict[str, str] = Field(description="for every metric that is or contains null: why")
    modality: str | None = Field(None, description="of the data, such as image; null on cards of version 1 and assets")
    changed: dict[str, list[str]] | None = Field(
        None, description="for the attack and the defense, the hyper-parameters that differed from their defaults"
    )
    notes: dict[str, Any] = Field(default_factory=dict, description="facts that a method states about its run")
    seconds: dict[str, float] = Field(description="wall time of each part of the run")
    peak_memory_mb: float | None = Field(description="high-water mark of the process's resident memory, in MB")
    peak_device_memory_mb: float | None = Field(
        None, description="high-water mark on the accelerator, null without one"
    )
    hardware: dict[str, Any] = Field(description="processor, cores, memory, accelerator")
    versions: dict[str, str] = Field(description="of the library, Python and the packages that make the numbers")
    commit: str | None = Field(None, description="git commit of the library; null outside of a checkout")
    parents: list[str] = Field(default_factory=list, description="stage/key of the runs that this one builds on")
    command: str = Field(description="command line that reproduces the run")
    created: str = Field(description="UTC time, ISO 8601")
    digests: dict[str, str] = Field(default_factory=dict, description="sha256 of every other file of the artifact")
    digest: str = Field("", description="sha256 of this card's canonical JSON without this field")

    @field_validator("metrics", "notes", "spec", "seconds", "hardware", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        if info.context == _PARSED:
            return value
        value = jsonable(value)
        where = _not_finite(value)
        if where is not None:
            raise ValueError(f"{where or 'value'} is not a finite number; use null and a reason")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.status == "ok") != (self.reason is None):
            raise ValueError("a reason is given exactly when the status is not ok")
        if self.stage != "asset" and (missing := [m for m in METRICS if m not in self.metrics]):
            raise ValueError(f"metrics lack {', '.join(missing)}")
        nulls = {
            name
            for name, value in self.metrics.items()
            if value is None or (isinstance(value, (list, dict)) and _has_null(value))
        }
        if nulls != set(self.null_reasons):
            raise ValueError(f"null_reasons must explain exactly the nulls: {sorted(nulls ^ set(self.null_reasons))}")
        return self

    @property
    def id(self) -> str:
        """Such as "attack/0123456789abcdef0123"."""
        return f"{self.stage}/{self.key}"

    def experiment(self) -> Experiment:
        """What was run."""
        from backdoorlab.benchmark.spec import Experiment

        return Experiment.from_json(self.spec)

    def sealed(self, digests: Mapping[str, str]) -> Card:
        """A copy that lists the artifact's files and its own digest."""
        listed = self.model_copy(update={"digests": dict(sorted(digests.items()))})
        return listed.model_copy(update={"digest": listed.own_digest()})

    def own_digest(self) -> str:
        """Hash of the card's content without the field ``digest``."""
        return record_digest(self.record())

    def record(self) -> dict[str, Any]:
        """As JSON values, with the fields that its version has."""
        newer = () if self.schema_version > 1 else _SINCE_2
        return {k: v for k, v in self.model_dump().items() if k not in newer}

    def to_json(self) -> str:
        """As text, one field a line."""
        return json.dumps(self.record(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "card") -> Card:
        """Inverse of :meth:`to_json`.

        Raises:
            ArtifactError: one line naming the file and what is wrong with it.
        """
        return cls.from_record(parse_record(text, where)[0], where)

    @classmethod
    def from_record(cls, record: dict[str, Any], where: str = "card") -> Card:
        """Inverse of :meth:`record`, for the object that :func:`parse_record` found.

        Raises:
            ArtifactError: as :meth:`from_json`.
        """
        try:
            return cls.model_validate(record, context=_PARSED)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "content"
            raise ArtifactError(f"{where}: not a valid result card ({field}: {first['msg']})") from None


def parse_record(text: str | bytes, where: str = "card") -> tuple[dict[str, Any], str]:
    """The JSON object of a card's file, all numbers of which are finite, and its hash without the field ``digest``.

    Raises:
        ArtifactError: one line naming the file and what is wrong with it.
    """
    try:
        record = from_json(text, allow_inf_nan=False)
        if not isinstance(record, dict):
            raise ValueError("expected an object")
        return record, record_digest(record)
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ArtifactError(f"{where}: not a valid result card (not JSON: {what})") from None


def record_digest(record: Mapping[str, Any]) -> str:
    """Hash of a card's JSON object without the field ``digest``."""
    return hashlib.sha256(dump_canonical({k: v for k, v in record.items() if k != "digest"}).encode()).hexdigest()


def complete(metrics: Metrics, default: str) -> Metrics:
    """Fill in the metrics that every card has, and a reason for every null.

    Args:
        metrics: what was measured, with the reasons that are known; a number that is not finite becomes null.
        default: the reason for all other nulls.
    """
    filled = dict.fromkeys(METRICS) | {name: _finite(jsonable(value)) for name, value in metrics.items()}
    nulls = [name for name, value in filled.items() if _has_null(value)]
    return Metrics(filled, {name: metrics.reasons.get(name, default) for name in nulls})


def schema() -> dict[str, Any]:
    """JSON schema of a card, as published in ``card.schema.json``."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Card.model_json_schema()


def _has_null(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_null, value.values()))
    return any(map(_has_null, value)) if isinstance(value, list) else value is None


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _not_finite(value: Any, path: str = "") -> str | None:
    """Path of the first number that is not finite, or None."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        place = _not_finite(inner, f"{path}.{key}".lstrip("."))
        if place is not None:
            return place
    return path if isinstance(value, float) and not math.isfinite(value) else None
