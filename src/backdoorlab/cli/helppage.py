"""How the help page of a command looks: filled paragraphs, and no Python types beside flags and arguments."""

from __future__ import annotations

from typing import Any

from typer.core import TyperArgument, TyperCommand, TyperOption


class _Argument(TyperArgument):
    """An argument without the Python type that some versions of typer print beside its name."""

    def display_type_rich(self, ctx: Any) -> str | None:
        """Nothing."""
        return None


class HelpCommand(TyperCommand):
    """A command with such a page."""

    def __init__(self, *args: Any, help: str | None = None, **settings: Any) -> None:
        super().__init__(*args, help=filled(help), **settings)

    def get_params(self, ctx: Any) -> list[Any]:
        """All parameters, ready to be shown."""
        return without_types(super().get_params(ctx))


def without_types(parameters: list[Any]) -> list[Any]:
    """The same parameters; flags and arguments show no type any more."""
    for parameter in parameters:
        if isinstance(parameter, TyperOption) and parameter.is_flag and parameter.metavar is None:
            parameter.metavar = ""
        elif type(parameter) is TyperArgument:
            parameter.__class__ = _Argument
    return parameters


def filled(text: str | None) -> str | None:
    """The text with one line per paragraph, so that the page can wrap it; indented lines are kept."""
    if text is None:
        return None
    paragraphs = text.split("\n\n")
    return "\n\n".join(p if p.startswith(" ") else p.replace("\n", " ") for p in paragraphs)
