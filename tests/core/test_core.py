"""Registries, hyper-parameters and seeding."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from backdoorlab.core import method
from backdoorlab.core.errors import BackdoorLabError, InputError
from backdoorlab.core.method import Method, param
from backdoorlab.core.registry import Registry
from backdoorlab.core.seeding import derive_seed, isolated_rng, make_generator
from backdoorlab.core.syntax import code_of


@dataclass(frozen=True, kw_only=True)
class Toy(Method):
    """A method with one field of each type."""

    name: ClassVar[str] = "toy"
    paper: ClassVar[str] = "none"
    year: ClassVar[int] = 2026
    modalities: ClassVar[tuple[str, ...]] = ("image",)

    rate: float = param(0.1, "a share", above=0, high=1)
    size: int | None = param(None, "pixels", low=1)
    mode: str = param("a", "a choice", choices=("a", "bee"))
    on: bool = param(False, "a switch")
    words: tuple[str, ...] = param(("cf",), "words")


class TestMethod:
    def test_strings_become_typed_values(self) -> None:
        toy = Toy.build({"rate": "0.5", "size": "4", "mode": "bee", "on": "true", "words": "x, y"})
        assert toy == Toy(rate=0.5, size=4, mode="bee", on=True, words=("x", "y"))
        assert Toy.build({"size": "none"}).size is None
        assert Toy.build(toy.settings()) == toy

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"rte": 1}, "no hyper-parameter 'rte'. Did you mean 'rate'"),
            ({"rate": 0}, "rate must be > 0 and <= 1, got 0"),
            ({"rate": 1.5}, "rate must be > 0 and <= 1, got 1.5"),
            ({"rate": "nan"}, "rate must be > 0 and <= 1, got nan"),
            ({"rate": "much"}, "rate must be of type float, got 'much'"),
            ({"size": 2.5}, "size must be of type"),
            ({"size": 0}, "size must be >= 1"),
            ({"mode": "be"}, "mode must be a | bee, got 'be'. Did you mean 'bee'"),
            ({"on": "maybe"}, "on must be true or false"),
        ],
    )
    def test_bad_values_are_refused_with_what_was_expected(self, settings: dict, message: str) -> None:
        with pytest.raises(InputError) as caught:
            Toy.build(settings)
        assert message in str(caught.value)

    def test_keyword_arguments_are_read_as_settings_are(self) -> None:
        assert Toy(rate="0.5", size=4.0, on="yes", words=["x"]) == Toy(rate=0.5, size=4, on=True, words=("x",))  # type: ignore[arg-type]
        with pytest.raises(InputError, match=r"toy: size must be of type int, got 'big'"):
            Toy(size="big")  # type: ignore[arg-type]
        with pytest.raises(InputError, match=r"toy: words must be a list of type str, got 5"):
            Toy(words=5)  # type: ignore[arg-type]

    def test_parameters_describe_themselves(self) -> None:
        rate = Toy.parameters()[0]
        assert (rate.name, rate.type, rate.default, rate.range) == ("rate", "float", 0.1, "> 0 and <= 1")
        assert Toy.facts()["modalities"] == ["image"]

    def test_code_digest_covers_the_files_that_a_method_is_built_from(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from backdoorlab.attacks.image.badnets import BadNets
        from backdoorlab.attacks.image.badnets_a2a import BadNetsA2A

        def digests() -> tuple[str, ...]:
            code_of.cache_clear()
            method._code_digest.cache_clear()
            return BadNets.code_digest(), BadNetsA2A.code_digest(), Toy.code_digest()

        before, read = digests(), Path.read_bytes
        assert len(set(before)) == 3
        monkeypatch.setattr(Path, "read_bytes", lambda p: read(p) + b"x = 1\n" * (p.name == "badnets.py"))
        after = digests()
        assert [a != b for a, b in zip(before, after, strict=True)] == [True, True, False]
        monkeypatch.setattr(Path, "read_bytes", lambda p: read(p) + b'# a remark\n"""Another."""\n')
        assert digests() == before
        monkeypatch.undo()
        digests()

    def test_a_method_that_was_typed_in_is_refused_in_one_line(self) -> None:
        typed = type("Typed", (Toy,), {"__module__": "typed_in"})
        sys.modules["typed_in"] = types.ModuleType("typed_in")
        try:
            with pytest.raises(InputError, match=r"toy: its code was typed in, not read from a file"):
                typed.code_digest()
        finally:
            del sys.modules["typed_in"]

    def test_changed_names_what_differs_from_the_defaults(self) -> None:
        assert Toy().changed() == {}
        assert Toy.build({"rate": "0.1", "mode": "bee", "words": "x"}).changed() == {"mode": "bee", "words": ("x",)}


SOURCE = '''
"""What it is."""
import math  # for pi

@staticmethod
def area(r: float = 1.0, *, text: str = f"{1!r:>{2}} and" " more") -> float:
    """Of a circle."""
    if r < 0:
        pass
    return math.pi * r ** 2  # known

class A:
    name: str = "a"
    """Its name."""
    def f(self): ...
'''


class TestSyntax:
    def code(self, tmp_path: Path, text: str, name: str = "a.py") -> bytes:
        path = tmp_path / name
        path.write_text(text)
        code_of.cache_clear()
        return code_of(path)

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("What it is.", "What else."),
            ('    """Of a circle."""\n', ""),
            ("  # known", ""),
            ("\nclass", "\n\n\n# a remark\nclass"),
            ('    """Its name."""\n', ""),
            ("r ** 2", "(r**2)"),
            ('"{1!r:>{2}} and" " more"', '"{1!r:>{2}} and more"'),
        ],
    )
    def test_what_does_not_act_does_not_count(self, tmp_path: Path, old: str, new: str) -> None:
        assert old in SOURCE
        assert self.code(tmp_path, SOURCE) == self.code(tmp_path, SOURCE.replace(old, new))

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("1.0", "1"),
            ("r ** 2", "r ** 3"),
            ('"a"', "b'a'"),
            ("*, ", ""),
            ("!r", "!s"),
            (" more", " most"),
            ("    if r < 0:\n        pass\n", ""),
            ("@staticmethod\n", ""),
            ("def f(self)", "async def f(self)"),
        ],
    )
    def test_what_acts_counts(self, tmp_path: Path, old: str, new: str) -> None:
        assert old in SOURCE
        assert self.code(tmp_path, SOURCE) != self.code(tmp_path, SOURCE.replace(old, new))

    def test_the_text_is_the_same_for_every_version_of_python(self, tmp_path: Path) -> None:
        """Made by hand from the grammar; a version that adds fields, or drops empty ones, changes nothing."""
        assert self.code(tmp_path, "def f(a=None): return f'{a}b'\n").decode() == (
            "tree\0Module(body=[FunctionDef(name=str:'f',args=arguments(args=[arg(arg=str:'a',),],"
            "defaults=[Constant(value=NoneType:None,),],),body=[Return(value=JoinedStr(values=[FormattedValue("
            "value=Name(id=str:'a',),conversion=int:-1,),Constant(value=str:'b',),],),),],),],)"
        )

    def test_what_is_not_python_source_is_taken_as_it_is(self, tmp_path: Path) -> None:
        assert self.code(tmp_path, "x = = 1  # a") != self.code(tmp_path, "x = = 1  # b")
        assert self.code(tmp_path, "x = 1", "a.so") == b"bytes\0x = 1"


class TestRegistry:
    def make(self) -> Registry:
        return Registry("toy", (), "backdoorlab.no-such-group")

    def test_one_name_may_serve_several_modalities(self) -> None:
        registry = self.make()
        text = type("TextToy", (Toy,), {"modalities": ("text",)})
        registry.register(Toy)
        registry.register(text)
        assert registry.get("toy", "image") is Toy
        assert registry.get("toy", "text") is text
        assert list(registry) == [Toy, text]
        with pytest.raises(InputError, match="does not serve audio data, only: image, text"):
            registry.get("toy", "audio")

    def test_two_methods_of_one_name_are_an_error(self) -> None:
        registry = self.make()
        registry.register(Toy)
        with pytest.raises(BackdoorLabError, match="two toys are called"):
            registry.register(type("Other", (Toy,), {}))

    def test_unknown_names_get_the_nearest(self) -> None:
        registry = self.make()
        registry.register(Toy)
        with pytest.raises(InputError, match=r"unknown toy 'tyo'\. Did you mean 'toy'"):
            registry.get("tyo")


class TestSeeding:
    def test_seeds_depend_on_every_name_and_are_stable(self) -> None:
        assert derive_seed(0, "attack") == 4808529251686049494
        assert len({derive_seed(s, n) for s in (0, 1) for n in ("a", "b")}) == 4
        a, b = make_generator(1, "x"), make_generator(1, "x")
        assert torch.equal(torch.rand(3, generator=a), torch.rand(3, generator=b))

    def test_isolated_rng_leaves_the_global_generator_alone(self) -> None:
        before = torch.random.get_rng_state()
        with isolated_rng(5):
            first = torch.rand(2)
        with isolated_rng(5):
            assert torch.equal(torch.rand(2), first)
        assert torch.equal(before, torch.random.get_rng_state())
