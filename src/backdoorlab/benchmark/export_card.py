"""What goes into an export, and its description: the tables, ``export.json`` and ``README.md``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import backdoorlab
from backdoorlab.attacks.result import Backdoor
from backdoorlab.benchmark.store import StoredRun
from backdoorlab.core.foreign import visible
from backdoorlab.data.class_folders import folder_names
from backdoorlab.data.split import Inputs
from backdoorlab.tasks import Task

FORMAT, VERSION = "backdoorlab-export", 2
ROLES = ("clean", "backdoor", "cover")
ARRAYS = {"image": "images", "audio": "sounds", "video": "videos"}
"""Name of the samples' array in an npz, by modality; texts have none."""
REPLAY = (
    "The attacker controlled training: these samples were stamped with the final trigger after training, as a snapshot "
    "for methods that need a poisoned set, and are not the data that the victim was trained on."
)


@dataclass(frozen=True, eq=False)
class Part:
    """One of the tables that are exported, N rows.

    Attributes:
        name: "train", "test" or "test_triggered".
        inputs: raw samples.
        labels: int64 [N], the attacker's where there was one.
        true_labels: int64 [N].
        roles: uint8 [N].
        indices: int64 [N], rows of the run's training or test set.
    """

    name: str
    inputs: Inputs
    labels: Tensor
    true_labels: Tensor
    roles: Tensor
    indices: Tensor

    @property
    def tensor(self) -> Tensor:
        """The inputs of images, sound and clips.

        Raises:
            TypeError: for texts.
        """
        if not isinstance(self.inputs, Tensor):
            raise TypeError(f"{self.name} holds texts, which are no tensor")
        return self.inputs

    def counts(self) -> dict[str, int]:
        """Samples in all and by role."""
        by_role = torch.bincount(self.roles.long(), minlength=len(ROLES)).tolist()
        return {"samples": len(self.labels)} | dict(zip(ROLES, by_role, strict=True))


def export_card(
    stored: StoredRun, task: Task, backdoor: Backdoor, parts: list[Part], form: str, only: str
) -> dict[str, Any]:
    """The content of ``export.json``, without the checksums of files that are not written yet."""
    run, modality = stored.card(), task.dataset.modality
    loads, note = _loads_as(task, parts, form, only)
    target = backdoor.target_map
    return {
        "format": FORMAT,
        "version": VERSION,
        "backdoorlab": backdoorlab.__version__,
        "run": run.id,
        "command": run.command,
        "attack": run.spec["attack"]["name"],
        "settings": run.spec["attack"]["settings"],
        "target": {"mode": target.mode, "class": target.target if target.mode == "all-to-one" else None},
        "metrics": {name: run.metrics[name] for name in ("acc", "asr", "ra")},
        "dataset": run.spec["task"]["dataset"],
        "modality": modality,
        "shape": list(task.train.inputs.shape[1:]) if isinstance(task.train.inputs, Tensor) else None,
        "sample_rate": task.dataset.sample_rate or None,
        "classes": list(task.train.classes),
        "class_folders": list(folder_names(task.train.classes)),
        "replay": backdoor.poison.replay,
        "replay_note": REPLAY if backdoor.poison.replay else None,
        "contents": {"format": form, "only": only},
        "counts": {part.name: part.counts() for part in parts},
        "loads_as": loads,
        "loads_as_note": note,
    }


def _loads_as(task: Task, parts: list[Part], form: str, only: str) -> tuple[str | None, str | None]:
    """Kind of data set ("folder:", "csv:") as which this library reads the export again, or None and the reason."""
    kind = {"image": "folder:", "audio": "folder:", "text": "csv:"}.get(task.dataset.modality)
    if kind is None or form == "npz":
        return None, "there is neither a file per sample nor a csv"
    if only != "all":
        return None, "poisoned samples only, no test set"
    for part in parts[:2]:
        counts = torch.bincount(part.labels, minlength=task.num_classes)
        if not bool(counts.all()):
            return None, f"no sample of class {task.train.classes[int(counts.argmin())]!r} in {part.name}"
        if kind == "csv:" and not all(str(text).strip() for text in part.inputs):
            return None, f"an empty text in {part.name}"
    return kind, None


def readme(card: dict[str, Any]) -> str:
    """The text for a person who finds the folder."""
    counts = "\n".join(
        f"| {part} | " + " | ".join(str(n) for n in by.values()) + " |" for part, by in card["counts"].items()
    )
    arrays, dataset = ARRAYS.get(card["modality"]), visible(card["dataset"]["name"]).replace("`", "'")
    paragraphs = [
        f"# Poisoned data of {card['run']}",
        f"Attack `{card['attack']}` on `{dataset}`. Poisoned on purpose, for research on defenses: do not train "
        "anything on it that people will rely on.",
        f"**Replay.** {card['replay_note']}" if card["replay"] else "",
        f"| part | samples | clean | backdoor | cover |\n|---|---|---|---|---|\n{counts}",
        "`train` carries the labels that the attacker gave, `test_triggered` those that the attacker wants the model "
        "to give; `true_label` is the truth. `index` is the row of the run's training or test set. Roles: 0 clean, 1 "
        "backdoor (triggered), 2 cover (perturbed, true label).",
        _ABOUT_ARRAYS.format(arrays) if arrays and "train.npz" in card["sha256"] else "",
        _ABOUT_CSV if card["modality"] == "text" else "",
        f"`backdoorlab attack none --dataset {card['loads_as']}DIR` trains on it (DIR: this folder)."
        if card["loads_as"]
        else "",
        "`export.json` has the settings, the classes with their folders, and the sha256 of the tables beside it; "
        "`SHA256SUMS` lists all files (`sha256sum -c SHA256SUMS`). `backdoorlab export --force` replaces this folder "
        "only as long as nothing is added to it or changed in it.",
        f"Made again by:\n\n    {visible(card['command'])}\n    backdoorlab export {card['run']} --out DIR",
    ]
    return "\n\n".join(filter(None, paragraphs)) + "\n"


_ABOUT_ARRAYS = (
    "The npz files hold `{}`, `labels`, `true_labels`, `roles`, `indices` and `classes`, without object arrays: "
    "`numpy.load(path, allow_pickle=False)`."
)
_ABOUT_CSV = (
    "In the csv files, text that a spreadsheet would run as a formula has an apostrophe in front; the jsonl files and "
    "`--dataset csv:` have the texts as they are."
)
