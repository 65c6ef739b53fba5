"""The help page of one attack or defense: what it does, its facts and every hyper-parameter."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from rich.table import Table
from rich.text import Text

from backdoorlab.cli.console import out
from backdoorlab.core.method import Method, ParamInfo


def show_method(kind: str, classes: list[type[Method]]) -> None:
    """Print the page.

    Args:
        kind: "attack" or "defense".
        classes: all classes of that name; one for each group of modalities.
    """
    classes = sorted(classes, key=lambda cls: "image" not in cls.modalities)
    shared = [p for p in classes[0].parameters() if all(p in cls.parameters() for cls in classes)]
    for cls in classes:
        facts = {k: v for k, v in cls.facts().items() if k not in ("name", "paper", "year", "modalities", "aliases")}
        out.rule(
            Text.assemble(
                (cls.name, "bold"),
                *(f" = {alias}" for alias in cls.aliases),
                f" · {kind} · {', '.join(cls.modalities)}",
            ),
            align="left",
            style="dim",
        )
        _summary(cls)
        line = "   ".join(f"{_LABELS.get(k, k.replace('_', ' '))}: {_fact(v)}" for k, v in facts.items())
        out.print(Text(line, style="dim"))
        out.print()
        listed = [p for p in cls.parameters() if len(classes) == 1 or p not in shared]
        if listed:
            out.print(_parameters(listed, "Hyper-parameters (--set KEY=VALUE)"))
            out.print()
    if len(classes) > 1 and shared:
        out.print(_parameters(shared, "Hyper-parameters for all modalities (--set KEY=VALUE)"))
        out.print()
    out.print(Text.assemble(("Example: ", "bold"), example(kind, classes[0])), soft_wrap=True)
    out.print(Text(f"The command's own options: backdoorlab {_COMMANDS[kind]} --help", style="dim"))


_LABELS = {"asset_kinds": "assets (--asset KIND=FILE)"}
_COMMANDS = {"attack": "attack", "defense": "defend"}


def example(kind: str, cls: type[Method]) -> str:
    """A command that uses the method."""
    from backdoorlab.attacks.base import Attack

    common = {p.name for p in Attack.parameters()}
    changed = next(
        (p for p in cls.parameters() if p.default is not None and p.name not in common | {"target_map"}), None
    )
    change = f" --set {changed.name}={plain(changed.default)}" if changed else ""
    what = f"--dataset {_dataset(cls.modalities)}" if kind == "attack" else "--run RUN"
    return f"backdoorlab {_COMMANDS[kind]} {cls.name} {what}{change}"


def _parameters(infos: list[ParamInfo], title: str) -> Table:
    table = Table(
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        title=title,
        title_justify="left",
        title_style="bold",
        show_header=False,
    )
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold", max_width=24)
    table.add_column()
    for p in infos:
        allowed = ", ".join(filter(None, (p.type.replace(" (optional)", ""), p.range)))
        origin = "" if p.source in ("", "ours") else f"; default from {p.source}"
        table.add_row(p.name, Text(plain(p.default)), Text.assemble(p.help, (f"  [{allowed}{origin}]", "dim")))
    return table


def plain(value: Any) -> str:
    """A default as one would write it after ``--set KEY=``."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _summary(cls: type[Method]) -> None:
    """The module's docstring: paper, idea, formula, choices. Prose is filled to the width, indented lines are kept."""
    text = inspect.getdoc(sys.modules[cls.__module__]) or inspect.getdoc(cls) or ""
    for paragraph in text.replace("``", "").split("\n\n"):
        lines = paragraph.splitlines()
        kept = any(line.startswith((" ", "-", "*", "|")) for line in lines)
        out.print(Text(paragraph if kept else " ".join(lines)))
        out.print()


def _fact(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value)) or "none"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _dataset(modalities: tuple[str, ...]) -> str:
    from backdoorlab.data.sources import datasets

    names = [n for n in datasets.names(modalities[0]) if not n.endswith(":")]
    return "digits" if "digits" in names else names[0] if names else "NAME"
