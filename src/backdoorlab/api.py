"""The Python interface: what ``import backdoorlab as bl`` offers."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from backdoorlab.attacks.base import Attack, attacks
from backdoorlab.attacks.files import read_folder
from backdoorlab.attacks.result import Backdoor
from backdoorlab.benchmark.measure import Victim, run_defense
from backdoorlab.benchmark.meter import Meter
from backdoorlab.benchmark.spec import owned_fraction, task_from_json, task_spec
from backdoorlab.core.errors import InputError, NotApplicable
from backdoorlab.core.registry import Registry
from backdoorlab.data.sources import datasets
from backdoorlab.data.split import clean_indices
from backdoorlab.defenses.base import Defense, defenses
from backdoorlab.metrics.tables import Comparison, Evaluation, compared
from backdoorlab.modalities.base import Modality
from backdoorlab.modalities.image import ImageModality
from backdoorlab.models.classifier import Classifier, models
from backdoorlab.tasks import Task
from backdoorlab.training.session import session


def load_task(
    dataset: str = "digits",
    *,
    model: str = "auto",
    recipe: str = "fast",
    recipe_changes: dict[str, Any] | None = None,
    size: int | None = None,
    train_size: int | None = None,
    test_size: int | None = None,
    data_seed: int = 0,
    root: str | Path | None = None,
    download: bool = False,
) -> Task:
    """Load a data set together with an architecture and a training recipe.

    Args:
        dataset: a name of :func:`list_datasets`, "folder:PATH" or "csv:PATH".
        model: a name of :func:`list_models`, any timm name, or "auto".
        recipe: "reference", "fast" (minutes on a CPU) or "smoke" (seconds).
        recipe_changes: fields of the recipe to change, such as ``{"epochs": 20}``.
        size: height and width in pixels, for images of a folder.
        train_size: a class-balanced subset of so many training samples.
        test_size: likewise for the test set.
        data_seed: of subsets and of procedural sets.
        root: folder searched before ``$BACKDOORLAB_DATA``.
        download: fetch missing data (checksummed).

    Returns:
        The task: ``task.train``, ``task.test``, ``task.clean_subset(0.05)``.

    Raises:
        InputError: for an unknown name, missing data, or values out of range.

    Examples:
        >>> import backdoorlab as bl
        >>> task = bl.load_task("digits", recipe="smoke")
        >>> len(task.train), len(task.test), task.num_classes
        (1437, 360, 10)
    """
    spec = task_spec(
        dataset,
        size=size,
        train_size=train_size,
        test_size=test_size,
        data_seed=data_seed,
        model=model,
        recipe=recipe,
        recipe_changes=recipe_changes,
    )
    return Task.load(spec, root=root, download=download)


def attack(
    name: str,
    task: Task,
    *,
    seed: int = 0,
    device: str | torch.device = "auto",
    progress: bool | None = None,
    **settings: Any,
) -> Backdoor:
    """Plant a backdoor by name; a name that several modalities serve follows the task.

    Args:
        name: a name or alias of :func:`list_attacks`.
        task: of :func:`load_task`.
        seed: all randomness derives from it.
        device: "auto", "cpu", "cuda", ...
        progress: show bars; None shows them on a terminal and in a notebook.
        **settings: hyper-parameters of the attack, such as ``poison_rate=0.05``.

    Raises:
        InputError: for an unknown attack or hyper-parameter, or values that do not fit the task.

    Examples:
        >>> import backdoorlab as bl
        >>> task = bl.load_task("digits", recipe="smoke", recipe_changes={"min_steps": 0, "epochs": 1})
        >>> backdoor = bl.attack("badnets", task, poison_rate=0.05, device="cpu")
        >>> backdoor.notes["poisoned"]
        72
    """
    method: Attack = attacks.get(name, task.modality.name).build(settings)
    return method.plant(task, seed=seed, device=device, progress=progress)


def defend(
    name: str,
    backdoor: Backdoor,
    *,
    clean_fraction: float | None = None,
    retrain: bool = True,
    seed: int | None = None,
    device: str | torch.device = "auto",
    progress: bool | None = None,
    **settings: Any,
) -> Evaluation:
    """Apply a defense to a planted backdoor and measure how well it works.

    The defense never sees the test set or the trigger; measuring does. For a model or data of unknown origin call the
    defense itself: ``bl.defenses.ANP().repair(model, clean=...)``.

    Args:
        name: a name or alias of :func:`list_defenses`.
        backdoor: of :func:`attack`, or loaded by :func:`load`.
        clean_fraction: share of the training set that the defender owns; None takes the defense's default.
        retrain: after a dataset defense, train a fresh model on the samples that it kept.
        seed: None takes that of the backdoor.
        device: "auto", "cpu", "cuda", ...
        progress: show bars; None shows them on a terminal and in a notebook.
        **settings: hyper-parameters of the defense.

    Returns:
        ACC, ASR, RA, DER, RIR, and detection metrics under ``values``.

    Raises:
        InputError: for an unknown defense or hyper-parameter, or a backdoor without a task.
        NotApplicable: if the method cannot work on such a model or such data.
    """
    task = _task_of(backdoor)
    defense: Defense = defenses.get(name, task.modality.name).build(settings)
    seed = backdoor.seed if seed is None else seed
    rows = clean_indices(task.train.labels, task.num_classes, owned_fraction(defense, clean_fraction), seed)
    ctx, before = session(seed, device, progress, "defense"), backdoor.evaluate()
    retraining = session(seed, device, progress, "retrain") if retrain else None
    victim = Victim(task, backdoor.model.to(ctx.device), backdoor, True, before.values, backdoor.measuring(device))
    return Evaluation(defense.name, run_defense(defense, victim, rows, ctx, retraining, Meter(ctx.device)).metrics)


def compare(backdoor: Backdoor, *others: Classifier | Evaluation, **named: Classifier) -> Comparison:
    """Measure a victim and models that were made of it on the same samples.

    Args:
        backdoor: the undefended victim.
        *others: repaired or retrained models, or evaluations of :func:`defend`.
        **named: further models, with the name of their row.

    Returns:
        A table that prints and displays itself: ACC, ASR, RA, and DER and RIR against the first row.

    Raises:
        InputError: for a backdoor without a task.
    """
    rows: list[Evaluation] = []
    for i, other in enumerate([*others, *named.values()]):
        if isinstance(other, Evaluation):
            rows.append(other)
            continue
        title = list(named)[i - len(others)] if i >= len(others) else other.title or f"model {i + 1}"
        rows.append(backdoor.evaluate(other, title=title))
    return compared(backdoor.evaluate(), rows)


def load(folder: str | Path, *, root: str | Path | None = None, device: str | torch.device = "auto") -> Backdoor:
    """A backdoor that was saved by ``backdoor.save(DIR)``, with its task.

    Args:
        folder: where it was saved.
        root: folder with data sets, searched before ``$BACKDOORLAB_DATA``.
        device: where the model goes.

    Raises:
        ArtifactError: if the folder holds no such thing, or a file is missing or was changed.
        InputError: if the data of its task cannot be found.
    """
    tensors, record = read_folder(folder)
    planted = Backdoor.from_state(tensors, record["backdoor"])
    planted.model.to(session(0, device).device)
    if record["task"] is None:
        return planted
    task = Task.load(task_from_json(record["task"]), root=root)
    return planted.on(task, int(record["seed"]), str(record["title"]))


def wrap(
    module: nn.Module,
    *,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    size: int | tuple[int, int] = 32,
    channels: int | None = None,
    like: Task | None = None,
) -> Classifier:
    """A network of the user's own as a classifier that defenses can read.

    Args:
        module: takes float [B,C,H,W], returns logits [B,K]; it is used as it is, not copied.
        mean: per channel, in [0, 1], with which its input is normalised.
        std: per channel.
        size: height and width of its images in pixels.
        channels: 1 or 3; None follows ``mean``, or 3.
        like: a task whose samples the network takes; stands in for all of the above, for any modality.

    Raises:
        InputError: if the network does not return logits for such input.
    """
    if like is not None:
        modality: Modality = like.modality
    else:
        height, width = (size, size) if isinstance(size, int) else size
        count = channels or (len(mean) if len(mean) > 1 else 3)
        if len(mean) not in (1, count) or len(std) not in (1, count):
            raise InputError(f"mean and std need one value or {count} each, got {len(mean)} and {len(std)}")
        spread = [tuple(v) * (count if len(v) == 1 else 1) for v in (mean, std)]
        modality = ImageModality(count, height, width, spread[0], spread[1])
    wrapped = Classifier(module, modality, type(module).__name__, 0)
    try:
        with torch.inference_mode():
            training = wrapped.training
            logits = wrapped.eval()(modality.prepare(modality.encode(modality.example(2))))
            wrapped.train(training)
    except Exception as error:
        raise InputError(f"{type(module).__name__} cannot process such input: {error}") from error
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or len(logits) != 2:
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise InputError(f"{type(module).__name__} must return logits [B, K] for a batch of B, got {got}")
    wrapped.num_classes = logits.shape[1]
    return wrapped.eval()


def list_attacks(pattern: str = "*", *, modality: str | None = None) -> list[str]:
    """Names of attacks.

    Args:
        pattern: with * and ?, such as "*net*".
        modality: "image", "text", "audio", "video" or "diffusion"; None for all.

    Examples:
        >>> import backdoorlab as bl
        >>> bl.list_attacks("badnets*", modality="image")
        ['badnets', 'badnets_a2a']
    """
    return _names(attacks, pattern, modality)


def list_defenses(pattern: str = "*", *, modality: str | None = None, stage: str | None = None) -> list[str]:
    """Names of defenses.

    Args:
        pattern: with * and ?.
        modality: as for :func:`list_attacks`.
        stage: "dataset", "training", "repair", "input" or "model"; None for all.

    Examples:
        >>> import backdoorlab as bl
        >>> "anp" in bl.list_defenses(stage="repair")
        True
    """
    of_stage = {cls.name for cls in defenses if stage in (None, cls.stage)}
    return [name for name in _names(defenses, pattern, modality) if name in of_stage]


def list_datasets(pattern: str = "*", *, modality: str | None = None) -> list[str]:
    """Names of data sets; those ending in ":" take a path.

    Examples:
        >>> import backdoorlab as bl
        >>> bl.list_datasets("cifar*")
        ['cifar10', 'cifar100']
    """
    return _names(datasets, pattern, modality)


def list_models(pattern: str = "*", *, modality: str | None = None) -> list[str]:
    """Names of our own architectures; for images any timm name works as well.

    Examples:
        >>> import backdoorlab as bl
        >>> "preact_resnet18" in bl.list_models(modality="image")
        True
    """
    return _names(models, pattern, modality)


def _names(registry: Registry[Any], pattern: str, modality: str | None) -> list[str]:
    return fnmatch.filter(registry.names(modality), pattern)


def _task_of(backdoor: Backdoor) -> Task:
    if backdoor.task is None:
        raise InputError(
            "this backdoor does not know its task; plant it with attack(...) or attach it: backdoor.on(task)"
        )
    return backdoor.task


__all__ = [
    "NotApplicable",
    "attack",
    "compare",
    "defend",
    "list_attacks",
    "list_datasets",
    "list_defenses",
    "list_models",
    "load",
    "load_task",
    "wrap",
]
