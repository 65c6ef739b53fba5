"""An export is what the attacker left, bit for bit; it is whole or absent; it stays in its folder."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from benchmark_cases import TINY
from filelock import FileLock
from PIL import Image
from torch import Tensor

import backdoorlab.benchmark.export as export_module
from backdoorlab.attacks.result import Backdoor
from backdoorlab.benchmark import Experiment, MethodSpec, Runner, Store
from backdoorlab.benchmark.export import export_run
from backdoorlab.benchmark.export_place import checked_place
from backdoorlab.core.errors import InputError
from backdoorlab.data import load_dataset
from backdoorlab.data.class_folders import folder_names, sample_names, write_files
from backdoorlab.data.sources import DatasetSpec
from backdoorlab.data.split import Dataset, Split
from backdoorlab.models.classifier import build_model
from backdoorlab.tasks import Task, TaskSpec
from backdoorlab.training.evaluate import predict

T = TypeVar("T")
QUICK = (("epochs", 1), ("min_steps", 2))
ODD = ("../../etc", "/root", "a/b", "a\\b", "..", ".hidden", "", " ", "x" * 400, "A/B", "con\x00trol\n", "é ü", "plain")


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """A store of this module's own: others count on what is in the shared one."""
    return Runner(Store(tmp_path_factory.mktemp("exports") / "store"))


@pytest.fixture(scope="module")
def stored(runner: Runner) -> Callable[..., tuple[str, Task, Backdoor]]:
    """Runs of attacks, made when asked for: id, task and backdoor."""

    def make(name: str, spec: TaskSpec = TINY, **settings: Any) -> tuple[str, Task, Backdoor]:
        card = runner.run(Experiment(task=spec, attack=MethodSpec(name, settings))).card
        assert card.status == "ok", card.reason
        return (card.id, *runner.load_backdoor(card.id))

    return make


def task_of(dataset: str, **sizes: int) -> TaskSpec:
    return TaskSpec(dataset=DatasetSpec(name=dataset, **sizes), recipe="smoke", recipe_changes=QUICK)


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as found:
        return dict(found)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def by_class(split: Split) -> tuple[Tensor, Tensor]:
    """Inputs and labels in the order in which class folders are read: by class, then by row."""
    order = torch.argsort(split.labels, stable=True)
    assert isinstance(split.inputs, Tensor)
    return split.inputs[order], split.labels[order]


def test_arrays_are_the_poisoned_set_bit_for_bit(runner: Runner, stored: Callable[..., Any], tmp_path: Path) -> None:
    run, task, backdoor = stored("badnets")
    card = export_run(runner, run, tmp_path / "x")
    poisoned, found = backdoor.poison.apply(task.train), arrays(tmp_path / "x" / "train.npz")
    assert found["images"].dtype == np.uint8
    assert np.array_equal(found["images"], poisoned.inputs)
    assert not np.array_equal(found["images"], task.train.inputs)
    for name in ("labels", "true_labels", "roles"):
        assert np.array_equal(found[name], getattr(poisoned, name)), name
    assert np.array_equal(found["indices"], np.arange(400))
    assert tuple(found["classes"]) == task.train.classes
    inputs, wanted, true = backdoor.triggered_test(task)
    seen = arrays(tmp_path / "x" / "test_triggered.npz")
    for name, expected in (("images", inputs), ("labels", wanted), ("true_labels", true)):
        assert np.array_equal(seen[name], expected), name
    assert np.array_equal(task.test.labels[seen["indices"]], true)
    assert np.array_equal(arrays(tmp_path / "x" / "test.npz")["images"], task.test.inputs)
    assert card["counts"]["train"] == {"samples": 400, "clean": 360, "backdoor": 40, "cover": 0}
    assert card["counts"]["test_triggered"]["samples"] == len(true)


def test_the_card_belongs_to_the_files(runner: Runner, stored: Callable[..., Any], tmp_path: Path) -> None:
    run, _, backdoor = stored("badnets")
    card = export_run(runner, run, tmp_path / "x")
    assert json.loads((tmp_path / "x" / "export.json").read_text()) == card
    assert (card["run"], card["attack"], card["settings"]["poison_rate"]) == (run, "badnets", 0.1)
    assert (card["replay"], card["replay_note"]) == (False, None)
    top = {p.name for p in (tmp_path / "x").iterdir() if p.is_file()}
    assert set(card["sha256"]) == top - {"export.json", "README.md", "SHA256SUMS"}
    for name, digest in card["sha256"].items():
        assert hashlib.sha256((tmp_path / "x" / name).read_bytes()).hexdigest() == digest
    assert run in (tmp_path / "x" / "README.md").read_text()
    again = export_run(runner, run, tmp_path / "y")
    assert again == card, "two exports of one run differ"
    # whoever has only the arrays and the victim measures what the card says
    seen = arrays(tmp_path / "x" / "test_triggered.npz")
    said = predict(backdoor.model, torch.from_numpy(seen["images"])).argmax(1).numpy()
    assert (said == seen["labels"]).mean() == pytest.approx(card["metrics"]["asr"])


def test_roles_table_describes_every_file(runner: Runner, stored: Callable[..., Any], tmp_path: Path) -> None:
    run, task, backdoor = stored("adap_blend", poison_rate=0.1)  # has cover samples
    export_run(runner, run, tmp_path / "x", form="folder")
    assert not list((tmp_path / "x").glob("*.npz"))
    poisoned, rows = backdoor.poison.apply(task.train), table(tmp_path / "x" / "roles.csv")
    assert [int(r["index"]) for r in rows] == list(range(len(task.train)))
    assert [int(r["label"]) for r in rows] == poisoned.labels.tolist()
    assert [int(r["true_label"]) for r in rows] == task.train.labels.tolist()
    assert [("clean", "backdoor", "cover").index(r["role"]) for r in rows] == poisoned.roles.tolist()
    assert {r["role"] for r in rows} == {"clean", "backdoor", "cover"}
    for row, image in zip(rows, poisoned.inputs, strict=True):
        assert Path(row["file"]).parts[:2] == ("train", task.train.classes[int(row["label"])])
        assert np.array_equal(np.array(Image.open(tmp_path / "x" / row["file"])), image[0])
    stamped = table(tmp_path / "x" / "test_triggered.csv")
    assert {r["label"] for r in stamped} == {"0"}
    assert "0" not in {r["true_label"] for r in stamped}
    everything = {p.relative_to(tmp_path / "x").as_posix() for p in (tmp_path / "x").rglob("*.png")}
    assert everything == {r["file"] for r in rows + stamped} | {f for f in everything if f.startswith("test/")}


@pytest.mark.parametrize("dataset", ["digits", "shapes"])
def test_images_load_again_with_the_same_pixels(
    runner: Runner, stored: Callable[..., Any], tmp_path: Path, dataset: str
) -> None:
    """Grey and color; the classes of the second are not in alphabetical order."""
    run, task, backdoor = stored("badnets", task_of(dataset, train_size=300, test_size=60, size=24))
    card = export_run(runner, run, tmp_path / "x")
    assert card["loads_as"] == "folder:"
    again = load_dataset(f"folder:{tmp_path / 'x'}")
    for split, expected in ((again.train, backdoor.poison.apply(task.train)), (again.test, task.test)):
        inputs, labels = by_class(expected)
        assert torch.equal(split.inputs, inputs)  # type: ignore[arg-type]
        assert torch.equal(split.labels, labels), "labels must keep their numbers"
    assert tuple(again.train.classes) == tuple(card["class_folders"])
    assert all(name.endswith(k) for name, k in zip(again.train.classes, task.train.classes, strict=True))


def test_a_folder_data_set_can_be_poisoned_exported_and_used(
    runner: Runner, stored: Callable[..., Any], tmp_path: Path
) -> None:
    generator = np.random.default_rng(0)
    for name in ("cats and dogs", "ships (small)"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        for i in range(30):
            pixels = generator.integers(0, 256, (16, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "mine" / name / f"{i}.png")
    run, task, backdoor = stored("badnets", task_of(f"folder:{tmp_path / 'mine'}"))
    export_run(runner, run, tmp_path / "x")
    again = load_dataset(f"folder:{tmp_path / 'x'}")
    assert again.train.classes == ("cats and dogs", "ships (small)")
    assert torch.equal(again.train.inputs, by_class(backdoor.poison.apply(task.train))[0])  # type: ignore[arg-type]


def test_only_poisoned(runner: Runner, stored: Callable[..., Any], tmp_path: Path) -> None:
    run, task, backdoor = stored("badnets")
    card = export_run(runner, run, tmp_path / "x", only="poisoned")
    found = arrays(tmp_path / "x" / "train.npz")
    order = torch.argsort(backdoor.poison.indices)
    assert np.array_equal(found["indices"], backdoor.poison.indices[order])
    assert np.array_equal(found["images"], torch.as_tensor(backdoor.poison.inputs)[order])
    assert np.array_equal(found["true_labels"], task.train.labels[found["indices"]])
    assert not (tmp_path / "x" / "test").exists()
    assert len(list((tmp_path / "x" / "train").rglob("*.png"))) == len(backdoor.poison)
    assert (card["loads_as"], list(card["counts"])) == (None, ["train", "test_triggered"])


def test_a_replay_says_so(runner: Runner, stored: Callable[..., Any], tmp_path: Path) -> None:
    run, task, backdoor = stored("wanet", task_of("digits", train_size=200, test_size=50))
    assert backdoor.poison.replay
    card = export_run(runner, run, tmp_path / "x")
    assert card["replay"] is True
    assert "controlled training" in card["replay_note"]
    assert card["replay_note"] in (tmp_path / "x" / "README.md").read_text()
    assert card["counts"]["train"]["cover"] > 0
    assert np.array_equal(arrays(tmp_path / "x" / "train.npz")["images"], backdoor.poison.apply(task.train).inputs)


def test_texts_become_tables(runner: Runner, stored: Callable[..., Any], tmp_path: Path) -> None:
    run, task, backdoor = stored("badnets", task_of("templated_text", train_size=200, test_size=60))
    card = export_run(runner, run, tmp_path / "x")
    assert card["loads_as"] == "csv:"
    poisoned, again = backdoor.poison.apply(task.train), load_dataset(f"csv:{tmp_path / 'x'}")
    assert list(again.train.inputs) == list(poisoned.inputs)
    assert torch.equal(again.train.labels, poisoned.labels)
    assert list(again.test.inputs) == list(task.test.inputs)
    lines = [json.loads(line) for line in (tmp_path / "x" / "train.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == list(poisoned.inputs)
    assert [line["role"] == "backdoor" for line in lines] == (poisoned.roles == 1).tolist()
    stamped = table(tmp_path / "x" / "test_triggered.csv")
    assert [row["text"] for row in stamped] == list(backdoor.triggered_test(task)[0])
    export_run(runner, run, tmp_path / "y", form="npz")
    assert sorted(p.suffix for p in (tmp_path / "y").iterdir()) == ["", ".json", ".jsonl", ".jsonl", ".jsonl", ".md"]


def test_texts_with_quotes_newlines_and_commas_survive(tmp_path: Path) -> None:
    from backdoorlab.benchmark.export import _write_texts
    from backdoorlab.benchmark.export_card import Part
    from backdoorlab.data.csv_text import read_table
    from backdoorlab.data.split import text_array

    texts = ['a "quoted" one', "two\nlines", "a, b; c\td", "carriage\rreturn", " é 漢 ", "7"]
    labels = torch.tensor([0, 1] * 3)
    part = Part("train", text_array(texts), labels, labels, torch.zeros(6, dtype=torch.uint8), torch.arange(6))
    _write_texts(tmp_path, part, ("no", "yes"), "both")
    assert read_table(tmp_path / "train.csv", ",") == (texts, ["0", "1"] * 3)
    assert [json.loads(s)["text"] for s in (tmp_path / "train.jsonl").open(newline="\n")] == texts


def test_sound_becomes_wav(runner: Runner, stored: Callable[..., Any], tmp_path: Path) -> None:
    run, task, backdoor = stored("badnets", task_of("tone_words", train_size=60, test_size=30))
    card = export_run(runner, run, tmp_path / "x")
    assert (card["loads_as"], card["sample_rate"]) == ("folder:", task.dataset.sample_rate)
    again, poisoned = load_dataset(f"folder:{tmp_path / 'x'}"), backdoor.poison.apply(task.train)
    assert again.sample_rate == task.dataset.sample_rate
    assert torch.equal(again.train.inputs, by_class(poisoned)[0])  # type: ignore[arg-type]
    found = arrays(tmp_path / "x" / "train.npz")
    assert found["sounds"].dtype == np.int16
    assert np.array_equal(found["sounds"], poisoned.inputs)
    assert int(found["sample_rate"]) == task.dataset.sample_rate


def test_clips_are_arrays(runner: Runner, stored: Callable[..., Any], tmp_path: Path) -> None:
    run, task, backdoor = stored("badnets", task_of("moving_digits", train_size=40, test_size=20))
    with pytest.raises(InputError, match="--format npz"):
        export_run(runner, run, tmp_path / "x", form="folder")
    assert list(tmp_path.iterdir()) == []
    export_run(runner, run, tmp_path / "x")
    assert np.array_equal(arrays(tmp_path / "x" / "train.npz")["videos"], backdoor.poison.apply(task.train).inputs)
    assert not (tmp_path / "x" / "train").exists()


def test_odd_class_names_cannot_escape(filled: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All the way: a data set whose class names come from a hostile table."""
    count = len(ODD)
    images = torch.arange(count * 4 * 256, dtype=torch.int64).remainder(251).to(torch.uint8).reshape(-1, 1, 16, 16)
    split = Split(images, torch.arange(count * 4) % count, ODD)
    plain = Task.load(TINY)
    task = dataclasses.replace(plain, dataset=Dataset("odd", "image", split, split))
    model = build_model("convnet3", task.modality, count, 0).eval()
    trained = filled.load_backdoor(filled.store.runs("attack")[0])[1]
    target = dataclasses.replace(trained.target_map, num_classes=count)
    rows = torch.tensor([1, 2, 3])
    poison = dataclasses.replace(
        trained.poison,
        indices=rows,
        roles=torch.ones(3, dtype=torch.uint8),
        labels=torch.zeros(3, dtype=torch.int64),
        inputs=images[rows],
    )
    odd = dataclasses.replace(trained, model=model, target_map=target, poison=poison)
    monkeypatch.setattr(Runner, "load_backdoor", lambda *_: (task, odd))
    (tmp_path / "in").mkdir()
    card = export_run(filled, filled.store.runs("attack")[0].id, tmp_path / "in" / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    assert [p.name for p in (tmp_path / "in").iterdir()] == ["x"]
    folders = {p.name for p in (tmp_path / "in" / "x" / "train").iterdir()}
    assert folders == set(card["class_folders"])
    assert len(folders) == count
    assert card["classes"] == list(ODD)
    for row in table(tmp_path / "in" / "x" / "roles.csv"):
        assert (tmp_path / "in" / "x" / row["file"]).resolve().is_relative_to((tmp_path / "in" / "x").resolve())
        assert len(Path(row["file"]).parts) == 3
    again = load_dataset(f"folder:{tmp_path / 'in' / 'x'}")
    assert torch.equal(again.train.labels, by_class(odd.poison.apply(split))[1])


@pytest.mark.parametrize(
    ("classes", "folders"),
    [
        (("a", "b"), ("a", "b")),
        (("b", "a"), ("0-b", "1-a")),
        (("a/b", "a_b"), ("0-a_b", "1-a_b")),
        (("A", "a"), ("0-A", "1-a")),
        (("B", "a"), ("0-B", "1-a")),
        (("..", "x"), ("class", "x")),
        (("é", "漢"), ("é", "漢")),
    ],
)
def test_folder_names(classes: tuple[str, ...], folders: tuple[str, ...]) -> None:
    assert folder_names(classes) == folders


def test_folder_names_are_safe_sorted_and_distinct() -> None:
    names = folder_names(ODD)
    assert list(names) == sorted(names)
    assert len({name.casefold() for name in names}) == len(ODD)
    for name in names:
        assert not set(name) & set('/\\:*?"<>|\0\n')
        assert not name.startswith(".")
        assert 0 < len(name.encode()) < 200
    ten = folder_names([f"class {9 - i}" for i in range(10)] + ["z", "a"])
    assert (ten[2], ten[11]) == ("02-class 7", "11-a")
    assert sample_names(("a", "b"), torch.tensor([1, 0]), torch.tensor([7, 12]), ".png") == ["b/07.png", "a/12.png"]


def test_a_png_has_one_or_three_channels(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="these images have 4"):
        next(write_files(tmp_path, ["a/0.png"], torch.zeros(1, 4, 8, 8, dtype=torch.uint8)))


class Interrupting:
    """A reporter whose user presses Ctrl-C after a few files."""

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        for i, item in enumerate(items):
            if i == 5:
                raise KeyboardInterrupt
            yield item

    def note(self, text: str) -> None:
        pass


def test_an_interrupt_leaves_nothing(
    runner: Runner, stored: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _, _ = stored("badnets")
    monkeypatch.setattr(runner, "reporter", Interrupting())
    with pytest.raises(KeyboardInterrupt):
        export_run(runner, run, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_replacement_keeps_the_old_export(
    runner: Runner, stored: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _, _ = stored("badnets")
    card = export_run(runner, run, tmp_path / "x", form="npz")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "_write_arrays", full)
    with pytest.raises(InputError, match="No space left on device"):
        export_run(runner, run, tmp_path / "x", force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert json.loads((tmp_path / "x" / "export.json").read_text()) == card
    assert (tmp_path / "x" / "train.npz").is_file()


def test_force_replaces_an_export_and_nothing_else(
    runner: Runner, stored: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _, _ = stored("badnets")
    place = tmp_path / "x"
    place.mkdir()
    export_run(runner, run, place)  # an empty folder is as good as none
    with pytest.raises(InputError, match="--force"):
        export_run(runner, run, place)
    next(iter((place / "test").rglob("*.png"))).unlink()  # what is gone cannot be lost
    export_run(runner, run, place, form="npz", only="poisoned", force=True)
    assert not (place / "train").exists(), "what the earlier export had must be gone"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    data = tmp_path / "data"  # looks like an export, but is somebody's data set
    (data / "train" / "a").mkdir(parents=True)
    with pytest.raises(InputError, match="has no SHA256SUMS"):
        export_run(runner, run, data, force=True)
    assert (data / "train" / "a").is_dir()
    (tmp_path / "cwd" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cwd" / "below")
    for here in (".", "..", "/"):
        with pytest.raises(InputError, match="working directory"):
            export_run(runner, run, Path(here), force=True)


def _note(place: Path) -> Path:
    (place / "train" / "3" / "note.txt").write_text("looks odd")
    return place / "train" / "3" / "note.txt"


def _thesis(place: Path) -> Path:
    (place / "thesis.tex").write_text("years of work")
    return place / "thesis.tex"


def _edited_readme(place: Path) -> Path:
    (place / "README.md").write_text("my notes")
    return place / "README.md"


def _edited_image(place: Path) -> Path:
    path = next(iter(sorted((place / "train" / "3").iterdir())))
    Image.new("L", (16, 16), 77).save(path)
    return path


def _empty_folder(place: Path) -> Path:
    (place / "train" / "mine").mkdir()
    return place / "train" / "mine"


def _link(place: Path) -> Path:
    (place / "train" / "elsewhere").symlink_to(place.parent)
    return place / "train" / "elsewhere"


def _torn_list(place: Path) -> Path:
    (place / "SHA256SUMS").write_text("not a list\n")
    return place / "SHA256SUMS"


@pytest.mark.parametrize("change", [_note, _thesis, _edited_readme, _edited_image, _empty_folder, _link, _torn_list])
def test_force_refuses_what_the_export_did_not_write(
    runner: Runner, stored: Callable[..., Any], tmp_path: Path, change: Callable[[Path], Path]
) -> None:
    run, _, _ = stored("badnets")
    place = tmp_path / "x"
    export_run(runner, run, place, form="folder")
    changed = change(place)
    before = {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}
    with pytest.raises(InputError) as caught:
        export_run(runner, run, place, force=True)
    assert changed.name in str(caught.value)
    assert {p: p.read_bytes() for p in place.rglob("*") if p.is_file()} == before
    assert os.path.lexists(changed)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_what_is_added_while_the_export_runs_is_kept(
    runner: Runner, stored: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _, _ = stored("badnets")
    place = tmp_path / "x"
    card = export_run(runner, run, place, form="npz")
    plain = export_module.export_card

    def adding(*args: Any) -> Any:
        _thesis(place)
        return plain(*args)

    monkeypatch.setattr(export_module, "export_card", adding)
    with pytest.raises(InputError, match=r"thesis\.tex"):
        export_run(runner, run, place, force=True)
    assert (place / "thesis.tex").read_text() == "years of work"
    assert json.loads((place / "export.json").read_text()) == card
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_the_list_of_files_is_complete_and_true(runner: Runner, stored: Callable[..., Any], tmp_path: Path) -> None:
    run, _, _ = stored("badnets")
    export_run(runner, run, tmp_path / "x")
    lines = (tmp_path / "x" / "SHA256SUMS").read_text().splitlines()
    listed = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    found = {p.relative_to(tmp_path / "x").as_posix(): p for p in (tmp_path / "x").rglob("*") if p.is_file()}
    assert set(listed) == set(found) - {"SHA256SUMS"}
    assert {"README.md", "export.json", "roles.csv", "train.npz"} <= set(listed)
    assert all(hashlib.sha256(found[name].read_bytes()).hexdigest() == digest for name, digest in listed.items())


_KILLED = """
import os, signal, sys
from pathlib import Path
import backdoorlab.benchmark.export_place as place
from backdoorlab.benchmark.export_place import checked_place, whole_folder

where, moment = Path(sys.argv[1]), sys.argv[2]
if moment == "between":
    plain = Path.rename
    def rename(self, target):
        if ".partial-" in self.name:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, target)
    Path.rename = rename
with whole_folder(checked_place(where, True)) as draft:
    (draft / "train").mkdir()
    (draft / "train" / "0.png").write_text("half")
    print("writing", flush=True)
    if moment == "writing":
        os.kill(os.getpid(), signal.SIGKILL)
    if moment == "wait":
        sys.stdin.read()
    place.write_sums(draft)
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["writing", "between"])
def test_leftovers_of_a_killed_export_are_removed_by_the_next(
    runner: Runner, stored: Callable[..., Any], tmp_path: Path, moment: str
) -> None:
    run, _, _ = stored("badnets")
    place = tmp_path / "x"
    card = export_run(runner, run, place, form="npz")
    dead = subprocess.run([sys.executable, "-c", _KILLED, str(place), moment], capture_output=True)
    assert dead.returncode == -9, dead.stderr
    assert len([p for p in tmp_path.iterdir() if ".partial-" in p.name]) == 2, "its folder and its lock file"
    if moment == "between":
        assert not place.exists(), "the old export had been moved aside"
        with pytest.raises(InputError, match="is not empty"):
            export_run(runner, run, place)
        assert json.loads((place / "export.json").read_text()) == card, "it is put back, and kept without --force"
    export_run(runner, run, place, form="npz", force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.slow
def test_a_living_export_is_left_alone(runner: Runner, stored: Callable[..., Any], tmp_path: Path) -> None:
    run, _, _ = stored("badnets")
    place = tmp_path / "x"
    argv = [sys.executable, "-c", _KILLED, str(place), "wait"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "writing\n"
        export_run(runner, run, place, form="npz")
        drafts = [p for p in tmp_path.iterdir() if ".partial-" in p.name and p.is_dir()]
        assert [p.name for p in drafts[0].rglob("*.png")] == ["0.png"]
        other.stdin.close()
        assert other.wait(60) == 0, "the folder is an unchanged export, which it was told to replace"
    assert sorted(p.name for p in place.iterdir()) == ["SHA256SUMS", "train"]
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_only_leftovers_of_the_exact_form_are_removed(tmp_path: Path) -> None:
    place, precious = tmp_path / "x", tmp_path / "precious"
    precious.mkdir()
    (precious / "a").write_text("a")
    kept = (
        ".x.partial-0123456",
        ".x.partial-0123456789",
        ".x.partial-0123456G",
        "x.partial-01234567",
        ".y.partial-01234567",
        ".xx.partial-01234567",
        ".x.partial-01234567.bak",
        ".x.draft-01234567",
    )
    for name in kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("kept")
    (tmp_path / ".x.partial-aaaaaaaa").symlink_to(precious)
    (tmp_path / ".x.partial-bbbbbbbb").write_text("a file")
    (tmp_path / ".x.partial-cccccccc").mkdir()
    (tmp_path / ".x.partial-cccccccc" / "link").symlink_to(precious)
    (tmp_path / ".x.partial-dddddddd.lock").touch()
    held = FileLock(str(tmp_path / ".x.partial-eeeeeeee.lock"))
    (tmp_path / ".x.partial-eeeeeeee").mkdir()
    (tmp_path / ".x.old-ffffffff").mkdir()  # of an old export only what its list names is deleted
    (tmp_path / ".x.old-ffffffff" / "mine").write_text("mine")
    place.mkdir()
    with held:
        checked_place(place, force=False)
    left = {p.name for p in tmp_path.iterdir()}
    gone = {".x.partial-cccccccc", ".x.partial-dddddddd.lock"}
    assert not left & gone
    assert {*kept, ".x.partial-aaaaaaaa", ".x.partial-bbbbbbbb", ".x.partial-eeeeeeee", ".x.old-ffffffff"} <= left
    assert (precious / "a").read_text() == "a"
    assert (tmp_path / ".x.old-ffffffff" / "mine").read_text() == "mine"


def test_cells_that_spreadsheets_would_run_are_guarded_and_read_back(tmp_path: Path) -> None:
    from backdoorlab.benchmark.export import _write_texts
    from backdoorlab.benchmark.export_card import FORMAT, VERSION, Part
    from backdoorlab.data.split import text_array

    texts = ["=HYPERLINK(1)", "+1 (555)", "-2+3", "@user hi", "\t=1", "'=x", "''@x", "it's", "-0.5", "'plain'", "a=b"]
    labels = torch.tensor([0, 1] * 5 + [0])
    for name in ("train", "test"):
        rows = torch.arange(len(texts))
        part = Part(name, text_array(texts), labels, labels, torch.zeros(len(texts), dtype=torch.uint8), rows)
        _write_texts(tmp_path, part, ("=no", "yes"), "both")
    rows_ = table(tmp_path / "train.csv")
    for row in rows_:
        for cell in row.values():
            assert cell == "-0.5" or not cell.strip().startswith(tuple("=+-@")), cell
    assert rows_[8]["text"] == "-0.5"
    assert [json.loads(s)["text"] for s in (tmp_path / "train.jsonl").open(newline="\n")] == texts
    assert list(load_dataset(f"csv:{tmp_path}").train.inputs) != texts, "a stranger's apostrophes are part of the text"
    (tmp_path / "export.json").write_text(json.dumps({"format": FORMAT, "version": VERSION}))
    assert list(load_dataset(f"csv:{tmp_path}").train.inputs) == texts


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_folder_that_cannot_be_written(runner: Runner, stored: Callable[..., Any], tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(InputError, match="cannot write"):
            export_run(runner, stored("badnets")[0], tmp_path / "x")
    finally:
        tmp_path.chmod(0o700)


def test_a_parent_that_is_a_file(runner: Runner, stored: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot write"):
        export_run(runner, stored("badnets")[0], tmp_path / "file" / "x")


@pytest.mark.parametrize("stage", ["benign", "defense"])
def test_other_runs_are_refused(filled: Runner, tmp_path: Path, stage: str) -> None:
    for run in filled.store.runs(stage):
        parents = run.card().parents
        hint = parents[0] if parents and parents[0].startswith("attack/") else "give an attack's run"
        with pytest.raises(InputError) as caught:
            export_run(filled, run.id, tmp_path / "x")
        assert hint in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_card_of_an_attack_says_how_visible_it_is(tmp_path: Path) -> None:
    from backdoorlab.attacks.triggers.base import stamp_all
    from backdoorlab.metrics.visibility import visibility

    runner = Runner(Store(tmp_path))
    card = runner.run(
        Experiment(task=task_of("digits", train_size=100, test_size=50), attack=MethodSpec("badnets"))
    ).card
    task, backdoor = runner.load_backdoor(card)
    clean = task.test.inputs[task.test.labels != 0]
    seen = visibility(clean, stamp_all(backdoor.trigger, clean))  # type: ignore[arg-type]
    assert (card.notes["psnr_db"], card.notes["ssim"], card.notes["linf"]) == (seen.psnr, seen.ssim, seen.linf)
    assert card.notes["linf"] == 255
