"""Names, aliases and trigger kinds are unique: whatever would make a method unreachable is refused."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, ClassVar

import pytest
from torch import Tensor

from backdoorlab.attacks.triggers.base import Trigger
from backdoorlab.core.errors import BackdoorLabError
from backdoorlab.core.registry import Registry


def registry() -> Registry[Any]:
    return Registry("thing", (), "backdoorlab.nothing")


def thing(name: str, *aliases: str, modalities: tuple[str, ...] = ("image",)) -> Any:
    return type(f"Thing_{name}", (), {"name": name, "modalities": modalities, "aliases": aliases})


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (thing("one", "uno"), thing("two", "uno"), "things 'one' and 'two' .* share the alias 'uno'"),
        (thing("one"), thing("two", "one"), "alias 'one' is the name of another one"),
        (thing("one", "two"), thing("two"), "'two' .* has the name of an alias of 'one'"),
        (thing("one"), thing("two", "two"), "alias 'two' is its own name"),
        (thing("one"), thing("one", "uno", modalities=("text", "image")), "two things are called 'one' for image"),
    ],
)
def test_a_name_that_means_two_things_is_refused(first: Any, second: Any, words: str) -> None:
    names = registry()
    names.register(first)
    if first.__qualname__ == second.__qualname__:
        second.__qualname__ = "Other"
    with pytest.raises(BackdoorLabError, match=words):
        names.register(second)
    assert names.names() == ["one"]
    assert names.get("one") is first
    assert names.names("text") == []
    assert names.canonical("uno") == ("one" if "uno" in first.aliases else "uno"), "a refused class leaves no alias"


def test_one_method_may_have_several_classes_that_share_its_alias() -> None:
    names = registry()
    image, text = thing("one", "uno"), thing("one", "uno", modalities=("text",))
    names.register(image)
    names.register(text)
    names.register(image)  # the same module imported once more
    assert names.get("uno", "text") is text
    assert names.get("uno", "image") is image


def test_two_trigger_classes_of_one_kind_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trigger, "_kinds", dict(Trigger._kinds))

    def make(name: str) -> type[Trigger]:
        def call(self: Any, inputs: Any, indices: Tensor | None = None, generator: Any = None) -> Any:
            return inputs

        body = {"kind": "test.twin", "__call__": call, "__annotations__": {"kind": ClassVar[str]}, "__qualname__": name}
        return dataclasses.dataclass(frozen=True, eq=False)(type(name, (Trigger,), body))

    first = make("First")
    with pytest.raises(BackdoorLabError, match=re.escape("two triggers are of kind 'test.twin'")):
        make("Second")
    assert Trigger._kinds["test.twin"] is first
    again = make("First")  # a reloaded module replaces its own class
    assert Trigger._kinds["test.twin"] is again
