"""``backdoorlab stamp`` and ``backdoorlab predict``: a stored run applied to new files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from backdoorlab.cli import options as opt
from backdoorlab.cli.console import err, out, print_json, shown
from backdoorlab.cli.defend import RunOption, need_run
from backdoorlab.cli.helppage import HelpCommand
from backdoorlab.core.errors import InputError
from backdoorlab.core.paths import exists, is_folder, printable

if TYPE_CHECKING:
    from backdoorlab.attacks.triggers.base import Trigger
    from backdoorlab.benchmark import StoredRun
    from backdoorlab.data.files import SampleFile, SampleFormat
    from backdoorlab.data.split import Inputs
    from backdoorlab.modalities import Modality

InputsArgument = Annotated[
    list[Path], typer.Argument(help="Files (png, jpg, bmp, wav, txt, npy) or folders of them.", metavar="IN")
]
ResizeOption = Annotated[
    bool, typer.Option("--resize", help="Rescale images of another size; pad or cut sound of another length.")
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("stamp", cls=HelpCommand)(stamp_command)
    app.command("predict", cls=HelpCommand)(predict_command)


def stamp_command(
    inputs: InputsArgument,
    run: RunOption = None,
    folder: Annotated[str | None, typer.Option("--out", help="Folder for the stamped files.", metavar="DIR")] = None,
    resize: ResizeOption = False,
    force: Annotated[bool, typer.Option("--force", help="Replace files of the same name in DIR.")] = False,
    store: opt.StoreOption = "",
    as_json: opt.JsonOption = False,
) -> None:
    """Apply the trigger of a stored attack to new files.

    Files keep their name and format, but a jpg becomes a png: JPEG compression would destroy the trigger. Inputs are
    never overwritten, other files only with --force. A txt file is one sample.

    Try:

      backdoorlab stamp --run 3f2a photo.png --out stamped

      backdoorlab stamp --run 3f2a photos/ --out stamped --resize
    """
    if folder is None:
        raise InputError("stamp: expected --out DIR, the folder for the stamped files")
    place = opt.output_folder(folder, "--out")
    stored = _find(run, store)
    from backdoorlab.attacks.triggers.base import stamp_all
    from backdoorlab.data.files import find_samples, output_names, read_samples, write_samples

    trigger, modality = _trigger(stored)
    with stored.rebuilding():
        form = sample_format(modality)
        blank = blank_samples(form)
        if stamp_all(trigger, blank).shape != blank.shape:
            raise InputError("its trigger changes the size of samples")
    paths = find_samples(inputs, form.modality)
    targets = output_names(paths, place)
    _check_targets(targets, force)
    files = [read_samples(path, form, fit=resize) for path in paths]
    for file, target in zip(files, targets, strict=True):
        write_samples(target, file, stamp_all(trigger, file.inputs), form)
        if target.suffix != file.path.suffix and not as_json:
            note = f"{file.path.name} is written as {target.name}: JPEG compression would destroy the trigger"
            err.print(shown(note, "dim"), soft_wrap=True)
    if as_json:
        print_json([{"input": str(f.path), "output": str(t)} for f, t in zip(files, targets, strict=True)])
    else:
        for target in targets:
            out.print(shown(target), soft_wrap=True)


def predict_command(
    inputs: InputsArgument,
    run: RunOption = None,
    resize: ResizeOption = False,
    device: opt.DeviceOption = "auto",
    store: opt.StoreOption = "",
    as_json: opt.JsonOption = False,
) -> None:
    """Classify new files with the model of a stored run (victim, benign or repaired).

    Try:

      backdoorlab predict --run 3f2a photo.png stamped/photo.png

      backdoorlab predict --run 9c1d stamped/ --json
    """
    stored = _find(run, store)
    from backdoorlab.cli.attack import make_runner
    from backdoorlab.data.files import find_samples, join_samples, read_samples
    from backdoorlab.models.classifier import Classifier
    from backdoorlab.training.evaluate import predict

    runner = make_runner(store, device)
    model = runner.load_model(stored)
    if not isinstance(model, Classifier):
        raise InputError(f"{stored.id} is a {model.kind}, which classifies nothing; `backdoorlab show` describes it")
    with stored.rebuilding():
        form = sample_format(model.modality)
        outputs = predict(model, blank_samples(form)).shape[1]
        names = _class_names(stored.record().get("classes"), outputs)
    files = [read_samples(path, form, fit=resize) for path in find_samples(inputs, form.modality)]
    confidence, classes = predict(model, join_samples(files), batch_size=256).softmax(1).max(1)
    rows = [
        {"input": label, "class": k, "name": names[k] if names else None, "confidence": float(c)}
        for label, k, c in zip(_labels(files), classes.tolist(), confidence, strict=True)
    ]
    if as_json:
        print_json(rows)
    else:
        out.print(_table(rows))


def _check_targets(targets: list[Path], force: bool) -> None:
    """Nothing that is there is replaced unless asked for.

    Raises:
        InputError: naming the first file in the way.
    """
    existing = [target for target in targets if exists(target) or target.is_symlink()]
    folders = [target for target in existing if is_folder(target)]
    if folders:
        raise InputError(f"--out: {printable(folders[0])} is a folder; a stamped file would get its name")
    if existing and not force:
        more = f" (and {len(existing) - 1} more)" if len(existing) > 1 else ""
        raise InputError(
            f"--out: {printable(existing[0])} exists{more}; choose another folder, or pass --force to replace"
        )


def sample_format(modality: Modality) -> SampleFormat:
    """What a modality's raw samples look like."""
    from backdoorlab.data.files import SampleFormat

    settings = modality.config()
    shape = {
        "image": ("channels", "height", "width"),
        "video": ("frames", "channels", "height", "width"),
        "audio": ("length",),
        "text": (),
    }[modality.name]
    return SampleFormat(modality.name, tuple(int(settings[key]) for key in shape), int(settings.get("sample_rate", 0)))


def blank_samples(form: SampleFormat) -> Inputs:
    """One sample without content, to try a stored trigger or model on before files are read."""
    import torch

    from backdoorlab.data.split import text_array

    return text_array(["a"]) if form.modality == "text" else torch.zeros((1, *form.shape), dtype=form.dtype)


def _class_names(names: object, count: int) -> list[str] | None:
    if names is None:
        return None
    if not isinstance(names, list) or len(names) != count or not all(isinstance(name, str) for name in names):
        raise InputError(f"names no {count} classes, which the model has")
    return names


def _find(run: str | None, store: str) -> StoredRun:
    name = need_run(run)
    return opt.existing_store(store).find(name)


def _trigger(stored: StoredRun) -> tuple[Trigger, Modality]:
    from backdoorlab.attacks.result import Backdoor

    card = stored.card()
    if stored.stage != "attack":
        parents = [p for p in card.parents if p.startswith("attack/")]
        hint = f"; it builds on {parents[0]}: pass --run {parents[0]}" if parents else "; give an attack's run"
        raise InputError(f"run {stored.id} has no trigger{hint}")
    record = stored.record()
    if record.get("backdoor") != Backdoor.kind:
        raise InputError(f"run {stored.id} is an attack whose trigger cannot be applied to files")
    with stored.rebuilding():
        backdoor = Backdoor.from_state(stored.all_tensors(), record)
    return backdoor.trigger, backdoor.model.modality


def _labels(files: list[SampleFile]) -> list[str]:
    return [f"{f.path}[{i}]" if f.batched else str(f.path) for f in files for i in range(len(f.inputs))]


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("input", overflow="fold")
    table.add_column("class", justify="right", style="bold cyan")
    if any(row["name"] is not None for row in rows):
        table.add_column("name")
    table.add_column("confidence", justify="right")
    for row in rows:
        name = [] if row["name"] is None else [shown(row["name"])]
        table.add_row(shown(row["input"]), str(row["class"]), *name, f"{row['confidence']:.1%}")
    return table
