"""``backdoorlab attack``: plant a backdoor (or train the benign model), measure and store it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from backdoorlab.cli import options as opt
from backdoorlab.cli.console import Progress, out
from backdoorlab.cli.helppage import HelpCommand
from backdoorlab.core.errors import InputError

if TYPE_CHECKING:
    from backdoorlab.benchmark import Runner

BENIGN = ("none", "benign")
DEFAULT_KIND = "classification"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("attack", cls=HelpCommand, context_settings=opt.OWN_HELP)(attack_command)


def attack_command(
    ctx: typer.Context,
    name: Annotated[
        str | None,
        typer.Argument(help="One of `backdoorlab list attacks`; none trains the benign model.", metavar="NAME"),
    ] = None,
    dataset: Annotated[
        str, typer.Option(help="Data set: one of `backdoorlab list datasets`.", metavar="NAME")
    ] = "digits",
    model: Annotated[
        str, typer.Option(help="Architecture: one of `backdoorlab list models`, or any timm name.", metavar="NAME")
    ] = "auto",
    recipe: Annotated[
        str, typer.Option(help="Training recipe: reference, fast (minutes) or smoke (seconds).", metavar="NAME")
    ] = "fast",
    poison_rate: Annotated[
        float | None, typer.Option(help="Poisoned samples as a share of the training set.", metavar="RATE")
    ] = None,
    target: Annotated[
        int | None, typer.Option(help="Class as which triggered samples should be classified.", metavar="CLASS")
    ] = None,
    settings: opt.SetOption = None,
    asset: Annotated[
        list[str] | None,
        typer.Option(
            help="Your file for a network or pattern that the attack would make first; repeatable.", metavar="KIND=FILE"
        ),
    ] = None,
    recipe_set: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe-set",
            help="Change a field of the training recipe, such as epochs=5; repeatable.",
            metavar="KEY=VALUE",
        ),
    ] = None,
    train_size: Annotated[
        int | None, typer.Option(help="Training samples to use, a class-balanced subset.", metavar="N")
    ] = None,
    test_size: Annotated[
        int | None, typer.Option(help="Test samples to use, a class-balanced subset.", metavar="N")
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Height and width of images in pixels, for data sets of any size.", metavar="PX")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="Kind of task, classification or diffusion; by default that of the attack.", metavar="KIND"),
    ] = None,
    data_seed: Annotated[
        int,
        typer.Option(
            help="Seed of subsets, splits and procedural data sets.",
            metavar="SEED",
            callback=opt.seed_check("--data-seed"),
        ),
    ] = 0,
    seed: opt.SeedOption = 0,
    device: opt.DeviceOption = "auto",
    store: opt.StoreOption = "",
    root: opt.RootOption = None,
    download: opt.DownloadOption = False,
    as_json: opt.JsonOption = False,
    help_: opt.HelpOption = False,
) -> None:
    """Plant a backdoor in a model, measure it and keep it in the store.

    What was already run is not run again: the same command prints the stored result.

    Try:

      backdoorlab attack badnets                               (embedded digits, seconds)

      backdoorlab attack badnets --dataset cifar10 --poison-rate 0.05 --set size=5

      backdoorlab attack none --dataset digits                 (the benign model)

      backdoorlab attack lf --asset clean-surrogate=my-model.safetensors

      backdoorlab attack badnets --help                        (all hyper-parameters of BadNets)
    """
    if help_:
        _help(ctx, name)
    if name is None:
        raise InputError("attack: which one? Expected a NAME, see `backdoorlab list attacks`")
    from backdoorlab.benchmark import Experiment, MethodSpec
    from backdoorlab.benchmark.spec import task_spec
    from backdoorlab.cli.outcome import conclude

    changes: dict[str, Any] = dict(opt.pairs(settings))
    for key, value in (("poison_rate", poison_rate), ("target", target)):
        if value is None:
            continue
        if key in changes:
            raise InputError(f"{key} is given twice: by --{key.replace('_', '-')} and by --set")
        changes[key] = value
    spec = task_spec(
        dataset,
        size=size,
        train_size=train_size,
        test_size=test_size,
        data_seed=data_seed,
        model=model,
        recipe=recipe,
        recipe_changes=opt.pairs(recipe_set, "--recipe-set"),
        kind=kind_of(name, kind),
    )
    files = opt.pairs(asset, "--asset", separator="-")
    if name in BENIGN and files:
        raise InputError(f"attack {name} trains the benign model and has no asset {next(iter(files))!r}")
    if name in BENIGN and changes:
        raise InputError(f"attack {name} trains the benign model and has no {', '.join(changes)}")
    runner = make_runner(store, device, root, download)
    assets = {kind: runner.keep_asset(kind, path) for kind, path in files.items()}
    method = None if name in BENIGN else MethodSpec(name, changes, assets)
    conclude(runner.run(Experiment(task=spec, attack=method, seed=seed)), as_json)


def kind_of(name: str, kind: str | None) -> str:
    """The kind of task: that of the attack; for the benign model the kind asked for, by default classification.

    Args:
        name: of the attack.
        kind: what the user asked for, if anything.

    Raises:
        InputError: for an unknown attack or kind, or a kind that the attack does not serve.
    """
    from backdoorlab.attacks import attacks
    from backdoorlab.tasks import kinds

    if kind is not None:
        kind = kinds.get(kind).name
    if name in BENIGN:
        return kind or DEFAULT_KIND
    name = attacks.canonical(name)
    served = {m for cls in attacks if cls.name == name for m in cls.modalities} or {*attacks.get(name).modalities}
    fitting = {cls.name for cls in kinds if served & {*cls.modalities}}
    if kind is not None and kind not in fitting:
        raise InputError(f"--kind {kind}: attack {name} is for tasks of kind {', '.join(sorted(fitting))}")
    return kind or (DEFAULT_KIND if DEFAULT_KIND in fitting else min(fitting))


def make_runner(store: str, device: str, root: str | None = None, download: bool = False) -> Runner:
    """A runner over the store, with progress on standard error.

    Raises:
        InputError: for a store, device or root that cannot be used.
    """
    if root is not None:
        root = str(opt.existing_folder(root, "--root"))
    where = opt.device_of(device)
    from backdoorlab.benchmark import Runner

    return Runner(opt.open_store(store), device=where, reporter=Progress(), root=root, download=download)


def _help(ctx: typer.Context, name: str | None) -> None:
    if name is None or name in BENIGN:
        out.print(ctx.get_help(), end="")
        raise typer.Exit
    from backdoorlab.attacks import attacks
    from backdoorlab.cli.methodpage import show_method

    name = attacks.get(name).name
    show_method("attack", [cls for cls in attacks if cls.name == name])
    raise typer.Exit
