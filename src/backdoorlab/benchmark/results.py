"""Tables over many cards: an in-memory DuckDB table ``runs`` with one row per run, and means over seeds.

A run that cannot be read (torn, tampered with, of another schema) is left out and listed in ``refusals``; it never
takes the others down with it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import duckdb

from backdoorlab.attacks.base import attacks
from backdoorlab.benchmark.card import METRICS, Card
from backdoorlab.benchmark.store import Store
from backdoorlab.core.errors import ArtifactError, InputError, nearest, unknown
from backdoorlab.core.registry import Registry
from backdoorlab.defenses.base import defenses
from backdoorlab.metrics.statistics import bootstrap_ci

DEFAULT_GROUP = ("dataset", "model", "attack", "defense")

_TEXT = ("key", "stage", "status", "reason", "dataset", "model", "recipe", "attack", "defense", "attack_settings",
         "defense_settings", "created", "command", "verdict", "targets", "parent")  # fmt: skip
_LEADING = ("key", "stage", "status", "reason", "dataset", "size", "train_size", "model", "recipe", "attack", "defense",
            "attack_settings", "defense_settings", "poison_rate", "target", "seed", "clean_fraction",
            *METRICS)  # fmt: skip
_TRAILING = ("seconds", "peak_memory_mb", "created", "command", "parent")
_INTEGER = ("seed", "train_size", "size", "target")


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

    Columns: key, stage, status, reason, dataset, size, train_size, model, recipe, attack ("benign" for none), defense
    ("none"), attack_settings and defense_settings (those that differ from the defaults, as JSON), poison_rate, target,
    seed, clean_fraction, every scalar metric, seconds, peak_memory_mb, created, command, parent.
    """

    def __init__(self, store: Store) -> None:
        self.refusals: list[Refusal] = []
        records = []
        for run in store.runs():
            try:
                records.append(flat(run.card()))
            except ArtifactError as error:
                self.refusals.append(Refusal(str(run.path), str(error)))
        self.columns = _columns(records)
        self._connection = duckdb.connect(":memory:")
        kinds = {c: "VARCHAR" if c in _TEXT else "BIGINT" if c in _INTEGER else "DOUBLE" for c in self.columns}
        self._connection.execute(f"CREATE TABLE runs ({', '.join(f'{_quoted(c)} {k}' for c, k in kinds.items())})")
        if records:
            values = [[record.get(c) for c in self.columns] for record in records]
            self._connection.begin()  # one transaction: several times faster
            self._connection.executemany(f"INSERT INTO runs VALUES ({', '.join('?' * len(self.columns))})", values)
            self._connection.commit()

    def sql(self, query: str) -> list[dict[str, Any]]:
        """Any query over the table ``runs``.

        Raises:
            InputError: with DuckDB's message.
        """
        try:
            found = self._connection.execute(query)
        except duckdb.Error as error:
            raise InputError(f"query failed: {' '.join(str(error).split())}") from None
        names = [column[0] for column in found.description or ()]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()]

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
        found = self.sql(
            f"SELECT {keys}, list({value} ORDER BY seed, key) FILTER ({value} IS NOT NULL) AS found, "
            f"count(*) - count({value}) AS missing FROM runs GROUP BY {keys} ORDER BY {keys}"
        )
        return [_summed(record) for record in found]


def rows(store: Store) -> list[dict[str, Any]]:
    """One flat record per readable run of a store."""
    return Results(store).rows()


def table(store: Store, group_by: Sequence[str] = DEFAULT_GROUP, metric: str = "asr") -> list[dict[str, Any]]:
    """See :meth:`Results.table`."""
    return Results(store).table(metric, group_by)


def flat(card: Card) -> dict[str, Any]:
    """A card as one row of scalars."""
    spec, dataset = card.spec, card.spec["task"]["dataset"]
    attack, defense = spec["attack"] or {}, spec["defense"] or {}
    record = {
        "key": card.key,
        "stage": card.stage,
        "status": card.status,
        "reason": card.reason,
        **{k: dataset.get(k) for k in ("size", "train_size")},
        "dataset": dataset["name"],
        "model": spec["task"]["model"],
        "recipe": spec["task"]["recipe"],
        "attack": attack.get("name", "benign"),
        "defense": defense.get("name", "none"),
        "attack_settings": _changed(attacks, attack),
        "defense_settings": _changed(defenses, defense),
        "poison_rate": attack.get("settings", {}).get("poison_rate"),
        "target": attack.get("settings", {}).get("target"),
        "seed": spec["seed"],
        "clean_fraction": spec["clean_fraction"],
        "seconds": sum(card.seconds.values()),
        "peak_memory_mb": card.peak_memory_mb,
        "created": card.created,
        "command": card.command,
        "parent": card.parents[0] if card.parents else None,
    }
    for name, value in card.metrics.items():
        if isinstance(value, (bool, int, float)) or value is None:
            record[name] = value if value is None else float(value)
        elif name in ("verdict", "targets"):
            record[name] = value if isinstance(value, str) else json.dumps(value)
    return record


def _changed(registry: Registry[Any], method: dict[str, Any]) -> str:
    """Settings that differ from the method's defaults, as JSON; all of them if the method is not installed here."""
    if not method:
        return "{}"
    found = method["settings"]
    if method["name"] in registry.names():
        defaults = {p.name: json.loads(json.dumps(p.default)) for p in registry.get(method["name"]).parameters()}
        found = {k: v for k, v in found.items() if k not in defaults or defaults[k] != v}
    return json.dumps(found, sort_keys=True)


def _columns(records: list[dict[str, Any]]) -> list[str]:
    others = sorted({name for record in records for name in record} - {*_LEADING, *_TRAILING})
    return [*_LEADING, *others, *_TRAILING]


def _summed(record: dict[str, Any]) -> dict[str, Any]:
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
