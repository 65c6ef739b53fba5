"""Tables over many cards: an in-memory DuckDB table ``runs`` with one row per run, and means over seeds.

A run that cannot be read (torn, tampered with, of another schema), or whose card cannot be a row of the table (a seed
that is no 64-bit integer, two metrics that differ in case alone), is left out and listed in ``refusals``; it never
takes the others down with it.
"""

from __future__ import annotations

import functools
import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import duckdb

from backdoorlab.benchmark.card import METRICS, Card
from backdoorlab.benchmark.store import Store
from backdoorlab.core.errors import ArtifactError, InputError, nearest, unknown

DEFAULT_GROUP = ("dataset", "model", "attack", "defense")

_TEXT = (
    "key",
    "stage",
    "status",
    "reason",
    "dataset",
    "modality",
    "model",
    "recipe",
    "attack",
    "defense",
    "attack_settings",
    "defense_settings",
    "created",
    "command",
    "verdict",
    "targets",
    "parent",
)
_LEADING = (
    "key",
    "stage",
    "status",
    "reason",
    "dataset",
    "modality",
    "size",
    "train_size",
    "model",
    "recipe",
    "attack",
    "defense",
    "attack_settings",
    "defense_settings",
    "poison_rate",
    "target",
    "seed",
    "clean_fraction",
    *METRICS,
)
_TRAILING = ("seconds", "peak_memory_mb", "created", "command", "parent")
_INTEGER = ("seed", "train_size", "size", "target")
_FIXED = frozenset((*_LEADING, *_TRAILING)) - frozenset(METRICS)


@dataclass(frozen=True)
class Refusal:
    """A run that could not be read.

    Attributes:
        path: its folder.
        reason: one line.
    """

    path: str
    reason: str


class Results:
    """All cards of a store as a table.

    Columns: key, stage, status, reason, dataset, modality, size, train_size, model, recipe, attack ("benign" for none),
    defense ("none"), attack_settings and defense_settings (those that differ from the defaults of the latest run of
    that method in the store, as JSON), poison_rate, target, seed, clean_fraction, every scalar metric, seconds,
    peak_memory_mb, created, command, parent.
    """

    def __init__(self, store: Store) -> None:
        self.refusals: list[Refusal] = []
        with _collector_paused():
            records = self._read(store)
        self.columns = _columns(records)
        self._connection = duckdb.connect(":memory:")
        kinds = {c: _kind(c) for c in self.columns}
        self._connection.execute(f"CREATE TABLE runs ({', '.join(f'{_quoted(c)} {k}' for c, k in kinds.items())})")
        if records:
            self._fill(records, kinds)

    def _read(self, store: Store) -> list[dict[str, Any]]:
        records, used = [], []
        spelled = {name: name for name in METRICS}
        for run in store.runs():
            try:
                record, methods = _tabulated(run.card())
                for name in record.keys() - _FIXED:
                    if spelled.setdefault(name.casefold(), name) != name:
                        other = spelled[name.casefold()]
                        what = f"the metrics {other!r} and {name!r} differ in case alone"
                        raise ArtifactError(f"cannot be tabulated: {what}")
            except ArtifactError as error:
                self.refusals.append(Refusal(str(run.path), str(error)))
                continue
            records.append(record)
            used.append(methods)
        _set_changes(records, used)
        return records

    def _fill(self, records: list[dict[str, Any]], kinds: dict[str, str]) -> None:
        """All rows in one statement; a value that is the same in all of them is passed once."""
        shown, values = [], []
        for column, kind in kinds.items():
            cells = [record.get(column) for record in records]
            same = column != "key" and cells.count(cells[0]) == len(cells)
            shown.append(f"?::{kind}" if same else f"unnest(?::{kind}[])")
            values.append(cells[0] if same else cells)
        self._connection.execute(f"INSERT INTO runs SELECT {', '.join(shown)}", values)

    def sql(self, query: str) -> list[dict[str, Any]]:
        """Any query over the table ``runs``.

        Raises:
            InputError: with DuckDB's message.
        """
        try:
            result = self._connection.execute(query)
        except duckdb.Error as error:
            raise InputError(f"query failed: {' '.join(str(error).split())}") from None
        names = [column[0] for column in result.description or ()]
        return [dict(zip(names, row, strict=True)) for row in result.fetchall()]

    def rows(self, where: str = "") -> list[dict[str, Any]]:
        """One flat record per run, oldest first; ``where`` is an SQL condition such as "attack = 'badnets'"."""
        return self.sql(f"SELECT * FROM runs {'WHERE ' + where if where else ''}")

    def table(self, metric: str = "asr", group_by: Sequence[str] = DEFAULT_GROUP) -> list[dict[str, Any]]:
        """Mean of a metric over the runs of each group, with a 95 % bootstrap interval.

        Returns:
            One record per group: the columns grouped by, n (runs with a value), missing (runs without: failed, not
            applicable or meaningless there), mean, low and high (None for n = 1).

        Raises:
            InputError: for an unknown column or metric.
        """
        numeric = [c for c in self.columns if c not in _TEXT]
        if metric not in numeric:
            raise unknown("metric", metric, numeric)
        for column in group_by:
            if column not in self.columns:
                hint = nearest(column, self.columns)
                raise InputError(f"cannot group by {column!r}.{hint} Columns: {', '.join(self.columns)}")
        if not group_by:
            raise InputError(f"group by at least one of: {', '.join(self.columns)}")
        keys, value = ", ".join(map(_quoted, group_by)), _quoted(metric)
        groups = self.sql(
            f"SELECT {keys}, list({value} ORDER BY seed, key) FILTER ({value} IS NOT NULL) AS found, "
            f"count(*) - count({value}) AS missing FROM runs GROUP BY {keys} ORDER BY {keys}"
        )
        return [_summed(record) for record in groups]


def rows(store: Store) -> list[dict[str, Any]]:
    """One flat record per readable run of a store."""
    return Results(store).rows()


def table(store: Store, group_by: Sequence[str] = DEFAULT_GROUP, metric: str = "asr") -> list[dict[str, Any]]:
    """See :meth:`Results.table`."""
    return Results(store).table(metric, group_by)


def flat(card: Card) -> dict[str, Any]:
    """A card as one row of scalars; its settings are those that differ from the defaults that the run had.

    Raises:
        ArtifactError: if it lacks what every run has, or has a value that the column's type cannot hold.
    """
    record, methods = _tabulated(card)
    for method in methods:
        record[f"{method.kind}_settings"] = method.unlike({} if method.changed is None else method.kept())
    return record


def _tabulated(card: Card) -> tuple[dict[str, Any], list[_Used]]:
    """A row without settings, and the methods that they belong to."""
    try:
        record = _flat(card)
        used = [method for kind in ("attack", "defense") if (method := _Used.of(card, kind)) is not None]
    except KeyError as error:
        raise ArtifactError(f"cannot be tabulated: its spec or metrics lack {error}") from None
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise ArtifactError(f"cannot be tabulated: {error}") from None
    for column, value in record.items():
        if value is None:
            continue
        kind = _KINDS.get(column, "DOUBLE")
        if kind == "VARCHAR":
            fits = type(value) is str and "\0" not in value
        elif kind == "BIGINT":
            fits = type(value) is int and -(2**63) <= value < 2**63
        else:
            fits = type(value) is float or (type(value) is int and abs(value) < 2**1023)
        if not fits:
            raise ArtifactError(f"cannot be tabulated: {column} must be {_WORDS[kind]}, got {str(value)[:60]!r}")
    return record, used


def _flat(card: Card) -> dict[str, Any]:
    spec, task = card.spec, card.spec["task"]
    dataset, attack, defense = task["dataset"], spec["attack"] or {}, spec["defense"] or {}
    settings = attack.get("settings", {})
    record = {
        "key": card.key,
        "stage": card.stage,
        "status": card.status,
        "reason": card.reason,
        "size": dataset.get("size"),
        "train_size": dataset.get("train_size"),
        "dataset": dataset["name"],
        "modality": card.modality,
        "model": task["model"],
        "recipe": task["recipe"],
        "attack": attack["name"] if attack else "benign",
        "defense": defense["name"] if defense else "none",
        "attack_settings": "{}",
        "defense_settings": "{}",
        "poison_rate": settings.get("poison_rate") or card.notes.get("effective_rate"),
        "target": settings.get("target"),
        "seed": spec["seed"],
        "clean_fraction": spec["clean_fraction"],
        "seconds": sum(card.seconds.values()),
        "peak_memory_mb": card.peak_memory_mb,
        "created": card.created,
        "command": card.command,
        "parent": card.parents[0] if card.parents else None,
    }
    for name, value in card.metrics.items():
        if name.casefold() in _FIXED or not name.strip() or "\0" in name:
            raise ValueError(f"a metric cannot be called {name!r}")
        if isinstance(value, (bool, int, float)) or value is None:
            record[name] = value if value is None else float(value)
        elif name in ("verdict", "targets"):
            record[name] = value if isinstance(value, str) else json.dumps(value)
    return record


@dataclass(frozen=True)
class _Used:
    """A method of a run: its settings, and which of them were not its defaults (None: the card does not say)."""

    kind: str
    name: str
    modality: str | None
    settings: dict[str, Any]
    changed: list[str] | None

    @classmethod
    def of(cls, card: Card, kind: str) -> _Used | None:
        method = card.spec[kind]
        if not method:
            return None
        changed = None if card.changed is None else card.changed.get(kind, [])
        return cls(kind, method["name"], card.modality, dict(method["settings"].items()), changed)

    def kept(self) -> dict[str, Any]:
        """Those that had their default value."""
        return {k: v for k, v in self.settings.items() if k not in (self.changed or ())}

    def unlike(self, defaults: dict[str, Any]) -> str:
        """Those that differ from these defaults, or are not among them, as JSON."""
        different = {k: v for k, v in self.settings.items() if k not in defaults or defaults[k] != v}
        return json.dumps(different, sort_keys=True) if different else "{}"


def _set_changes(records: list[dict[str, Any]], used: Sequence[Sequence[_Used]]) -> None:
    """Compare the settings of all runs of a method with the same defaults: the latest ones that a run was made with.

    Runs from before and after a change of a default thus differ in the table. Cards of version 1 do not say what their
    defaults were; those of the method as it is installed here are taken, and all settings are shown if it is not.
    """
    latest: dict[tuple[str, str, str | None], dict[str, Any]] = {}
    for method in (m for methods in used for m in methods if m.changed is not None):
        latest.setdefault((method.kind, method.name, method.modality), {}).update(method.kept())
    for record, methods in zip(records, used, strict=True):
        for method in methods:
            known = (
                _installed_defaults(method.kind, method.name)
                if method.changed is None
                else latest[method.kind, method.name, method.modality]
            )
            record[f"{method.kind}_settings"] = method.unlike(known)


@functools.cache
def _installed_defaults(kind: str, name: str) -> dict[str, Any]:
    """Defaults of a method of this installation; empty if it has none of that name. Imports all methods."""
    from backdoorlab.attacks.base import Attack, attacks
    from backdoorlab.core.registry import Registry
    from backdoorlab.defenses.base import Defense, defenses

    registry: Registry[Attack] | Registry[Defense] = attacks if kind == "attack" else defenses
    if name not in registry.names():
        return {}
    return {p.name: json.loads(json.dumps(p.default)) for p in registry.get(name).parameters()}


_WORDS = {"VARCHAR": "text", "BIGINT": "a 64-bit integer", "DOUBLE": "a finite number"}


_KINDS = dict.fromkeys(_TEXT, "VARCHAR") | dict.fromkeys(_INTEGER, "BIGINT")


def _kind(column: str) -> str:
    return _KINDS.get(column, "DOUBLE")


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Reading thousands of cards makes many small objects and no cycles; looking for some takes half of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _columns(records: list[dict[str, Any]]) -> list[str]:
    others = sorted({name for record in records for name in record} - {*_LEADING, *_TRAILING})
    return [*_LEADING, *others, *_TRAILING]


def _summed(record: dict[str, Any]) -> dict[str, Any]:
    from backdoorlab.metrics.statistics import bootstrap_ci

    values = record.pop("found") or []
    interval = bootstrap_ci(values)
    return {k: v for k, v in record.items() if k != "missing"} | {
        "n": len(values),
        "missing": record["missing"],
        "mean": fmean(values) if values else None,
        "low": interval[0] if interval else None,
        "high": interval[1] if interval else None,
    }


def _quoted(column: str) -> str:
    escaped = column.replace('"', '""')
    return f'"{escaped}"'
