"""The poisoned data of a stored attack as plain files, for tools that know nothing of this library.

    DIR/export.json README.md       what this is: run, attack, settings, counts, sha256 of the tables
    DIR/SHA256SUMS                  every file with its checksum, for ``sha256sum -c`` and for ``--force``
    DIR/train.npz                   the training set as the attacker left it, with roles and true labels
    DIR/test.npz                    the clean test set
    DIR/test_triggered.npz          test samples with the trigger, labelled as the attacker wants them
    DIR/train/CLASS/INDEX.png       the same three as one file per sample, under the (poisoned) label;
    DIR/test/...  test_triggered/...    wav for sound; ``--dataset folder:DIR`` reads the first two again
    DIR/roles.csv test_triggered.csv    file, index, label, true label and role of each of them

Texts have no arrays and no file each: they are ``train.csv``, ``test.csv`` (which ``--dataset csv:DIR`` reads) and the
same as ``.jsonl`` where other modalities have an npz. In a csv, text that a spreadsheet would run as a formula has an
apostrophe in front; ``csv:`` takes it off again, and the ``.jsonl`` has the texts as they are. Clips have no lossless
file of their own and are npz only.

Everything is written into a temporary folder beside DIR, which is renamed at the end: DIR is whole or not there (see
:mod:`backdoorlab.benchmark.export_place`).
"""

from __future__ import annotations

import csv
import hashlib
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backdoorlab.attacks.result import Backdoor
from backdoorlab.benchmark.export_card import ARRAYS, ROLES, Part, export_card, readme
from backdoorlab.benchmark.export_place import checked_place, whole_folder, write_sums
from backdoorlab.benchmark.runner import Runner
from backdoorlab.benchmark.store import StoredRun
from backdoorlab.core.errors import InputError, unknown
from backdoorlab.core.foreign import csv_cell
from backdoorlab.data.class_folders import SUFFIXES, sample_names, write_files
from backdoorlab.data.split import BACKDOOR, CLEAN, take
from backdoorlab.tasks import Task
from backdoorlab.training.context import Reporter

FORMATS = ("both", "folder", "npz")
ONLY = ("all", "poisoned")


def export_run(
    runner: Runner, run: str, folder: Path, *, form: str = "both", only: str = "all", force: bool = False
) -> dict[str, Any]:
    """Write the poisoned data of a stored attack.

    Args:
        runner: whose store has the run; its reporter shows progress.
        run: see :meth:`~backdoorlab.benchmark.store.Store.find`.
        folder: which appears whole or not at all.
        form: one of :data:`FORMATS`; "folder" is one file per sample, "npz" arrays.
        only: one of :data:`ONLY`; "poisoned" leaves out clean samples, and with them the clean test set.
        force: replace an earlier export, if nothing was added to it or changed in it.

    Returns:
        The content of ``export.json``.

    Raises:
        InputError: if the run has no poisoned data, the folder cannot be used, or the format does not suit the data.
    """
    for option, value, choices in (("--format", form, FORMATS), ("--only", only, ONLY)):
        if value not in choices:
            raise unknown(option, value, choices)
    place = checked_place(folder, force)
    stored = attack_of(runner, run)
    task, backdoor = runner.load_classification(stored)
    with stored.rebuilding("poison.safetensors"):
        parts, modality = parts_of(task, backdoor, only), task.dataset.modality
    if modality == "video" and form == "folder":
        raise InputError("clips have no lossless file of their own; export video with --format npz")
    card = export_card(stored, task, backdoor, parts, form, only)
    with whole_folder(place) as draft:
        for part in parts:
            if modality == "text":
                _write_texts(draft, part, task.train.classes, form)
                continue
            if form != "npz" and modality in SUFFIXES:
                _write_folder(draft, part, card["class_folders"], task.dataset.sample_rate, runner.reporter)
            if form != "folder":
                _write_arrays(draft / f"{part.name}.npz", part, task)
        card["sha256"] = {p.name: _sha256(p) for p in sorted(draft.iterdir()) if p.is_file()}
        (draft / "README.md").write_text(readme(card), encoding="utf-8")
        (draft / "export.json").write_text(json.dumps(card, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        write_sums(draft)
    return card


def attack_of(runner: Runner, run: str) -> StoredRun:
    """The stored attack that is meant.

    Raises:
        InputError: for a run of another kind, naming the attack behind it, and for an attack that poisons no data.
    """
    stored = runner.store.find(run)
    card = stored.card()
    if card.stage == "benign":
        raise InputError(f"{stored.id} is a benign model: its training set is clean; give an attack's run")
    if card.stage == "defense":
        parent = card.parents[0]
        hint = f"export {parent}, on which it stands" if parent.startswith("attack/") else "give an attack's run"
        raise InputError(f"{stored.id} is a defense and has no poisoned data of its own; {hint}")
    if card.status != "ok":
        raise InputError(f"{stored.id} has nothing to export; its status is {card.status}: {card.reason}")
    if stored.record().get("backdoor") != "classification":
        raise InputError(
            f"{stored.id} is an attack on a diffusion model: its trigger lies in noise, not in a poisoned data set; "
            "give an attack on a classifier"
        )
    return stored


def parts_of(task: Task, backdoor: Backdoor, only: str = "all") -> list[Part]:
    """The tables to export: training set after the attack, clean test set (if all), triggered test set.

    Raises:
        InputError: if only poisoned samples are asked for and there are none.
    """
    train, test = backdoor.poison.apply(task.train), task.test
    rows = torch.arange(len(train)) if only == "all" else (train.roles != CLEAN).nonzero().flatten()
    if not len(rows):
        raise InputError("this attack changed no training sample; export everything with --only all")
    inputs = train.inputs if only == "all" else take(train.inputs, rows)
    parts = [Part("train", inputs, train.labels[rows], train.true_labels[rows], train.roles[rows], rows)]
    if only == "all":
        roles = torch.full((len(test),), CLEAN, dtype=torch.uint8)
        parts.append(Part("test", test.inputs, test.labels, test.labels, roles, torch.arange(len(test))))
    stamped, desired, true = backdoor.triggered_test(task)
    eligible = backdoor.target_map.eligible(test.labels).nonzero().flatten()
    roles = torch.full((len(eligible),), BACKDOOR, dtype=torch.uint8)
    return [*parts, Part("test_triggered", stamped, desired, true, roles, eligible)]


def _write_folder(draft: Path, part: Part, folders: list[str], sample_rate: int, reporter: Reporter) -> None:
    suffix = SUFFIXES["audio" if sample_rate else "image"]
    names = [f"{part.name}/{n}" for n in sample_names(folders, part.labels, part.indices, suffix)]
    with closing(write_files(draft, names, part.tensor, sample_rate)) as written:
        for _ in reporter.track(written, f"writing {part.name.replace('_', ' ')}", len(names)):
            pass
    if part.name == "test":
        return  # no table: the labels are the folders
    table = draft / ("roles.csv" if part.name == "train" else f"{part.name}.csv")
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("file", "index", "label", "true_label", "role"))
        writer.writerows(zip(map(csv_cell, names), *_columns(part), strict=True))


def _write_arrays(path: Path, part: Part, task: Task) -> None:
    tensors = {
        ARRAYS[task.dataset.modality]: part.tensor.cpu(),
        "labels": part.labels,
        "true_labels": part.true_labels,
        "roles": part.roles,
        "indices": part.indices,
    }
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
    arrays["classes"] = np.array(task.train.classes, dtype=np.str_)
    if task.dataset.sample_rate:
        arrays["sample_rate"] = np.array(task.dataset.sample_rate)
    np.savez(path, **arrays)


def _write_texts(draft: Path, part: Part, classes: tuple[str, ...], form: str) -> None:
    header = ("text", "label", "class", "index", "true_label", "role")
    indices, labels, true_labels, roles = _columns(part)
    names = [classes[k] for k in labels]
    rows = list(zip(map(str, part.inputs), labels, names, indices, true_labels, roles, strict=True))
    if form != "npz":
        with (draft / f"{part.name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
            writer.writerow(header)
            writer.writerows([csv_cell(value) for value in row] for row in rows)
    if form != "folder":
        with (draft / f"{part.name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(dict(zip(header, row, strict=True)), ensure_ascii=False) + "\n" for row in rows)


def _columns(part: Part) -> tuple[list[int], list[int], list[int], list[str]]:
    """Index, label, true label and role of every sample."""
    roles = [ROLES[r] for r in part.roles.tolist()]
    return part.indices.tolist(), part.labels.tolist(), part.true_labels.tolist(), roles


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
