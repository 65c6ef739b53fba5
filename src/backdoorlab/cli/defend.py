"""``backdoorlab defend``: apply a defense to a stored run, measure and store it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from backdoorlab.cli import options as opt
from backdoorlab.cli.console import out
from backdoorlab.cli.helppage import HelpCommand
from backdoorlab.core.errors import InputError

if TYPE_CHECKING:
    from backdoorlab.benchmark import Runner

RunOption = Annotated[
    str | None, typer.Option("--run", help="A stored run: (the start of) its key, or its folder.", metavar="RUN")
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("defend", cls=HelpCommand, context_settings=opt.OWN_HELP)(defend_command)


def defend_command(
    ctx: typer.Context,
    name: Annotated[str | None, typer.Argument(help="One of `backdoorlab list defenses`.", metavar="NAME")] = None,
    run: RunOption = None,
    settings: opt.SetOption = None,
    clean_fraction: Annotated[
        float | None,
        typer.Option(help="Clean samples that the defender owns, as a share of the training set.", metavar="SHARE"),
    ] = None,
    no_retrain: Annotated[
        bool, typer.Option("--no-retrain", help="Only find poisoned samples; train no model on the others.")
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of the run, which the defense shares; checked if given.",
            metavar="SEED",
            callback=opt.seed_check("--seed"),
        ),
    ] = None,
    device: opt.DeviceOption = "auto",
    store: opt.StoreOption = "",
    root: opt.RootOption = None,
    download: opt.DownloadOption = False,
    as_json: opt.JsonOption = False,
    help_: opt.HelpOption = False,
) -> None:
    """Apply a defense to a stored run and measure it.

    The run may be an attacked model, or a benign one to see what the defense costs.

    Try:

      backdoorlab defend ft --run 3f2a

      backdoorlab defend ft --run runs/attack/3f2a... --clean-fraction 0.1 --set epochs=20

      backdoorlab defend ft --help                  (all hyper-parameters of fine-tuning)
    """
    from dataclasses import replace

    if help_:
        _help(ctx, name)
    if name is None:
        raise InputError("defend: with what? Expected a NAME, see `backdoorlab list defenses`")
    from backdoorlab.benchmark import MethodSpec
    from backdoorlab.cli.attack import make_runner
    from backdoorlab.cli.outcome import conclude
    from backdoorlab.defenses import defenses

    defenses.get(name)
    run = need_run(run)
    opt.existing_store(store)
    runner = make_runner(store, device, root, download)
    experiment = runner.experiment_on(run, MethodSpec(name, opt.pairs(settings)))
    if seed is not None and seed != experiment.seed:
        raise InputError(
            f"--seed {seed}: run {run} has seed {experiment.seed}, and a defense derives its seed from its run; "
            f"repeat the attack with --seed {seed} and defend that run"
        )
    base = _base_id(runner, run)
    resolved = runner.resolve(replace(experiment, clean_fraction=clean_fraction, retrain=not no_retrain))
    if resolved.base is not None and base.rpartition("/")[2] != resolved.base.key:
        raise InputError(
            f"--run {run}: {base} was made by another version of the attack's code or of the data (it would now be "
            f"{resolved.base.key}); repeat the attack: {runner.store.find(base).card().command}"
        )
    conclude(runner.run(resolved), as_json)


def _base_id(runner: Runner, run: str) -> str:
    """Such as "attack/3f2a...": the run that was named, or the one that a named defense builds on.

    Raises:
        InputError: if the run lies in another store.
    """
    stored = runner.store.find(run)
    if runner.store.root.resolve() not in stored.path.resolve().parents:
        raise InputError(f"--run {run} lies outside the store {runner.store.root}; pass its store with --store")
    return stored.card().parents[0] if stored.stage == "defense" else stored.id


def need_run(run: str | None) -> str:
    """The --run option.

    Raises:
        InputError: if it was not given.
    """
    if not run:
        raise InputError(
            "expected --run RUN: (the start of) a run's key or its folder; `backdoorlab results` shows them"
        )
    return run


def _help(ctx: typer.Context, name: str | None) -> None:
    if name is None:
        out.print(ctx.get_help(), end="")
        raise typer.Exit
    from backdoorlab.cli.methodpage import show_method
    from backdoorlab.defenses import defenses

    defenses.get(name)
    show_method("defense", [cls for cls in defenses if cls.name == name])
    raise typer.Exit
