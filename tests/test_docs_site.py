"""The generated pages of the site, and the Python of docs/python.md; ``make docs`` builds the site itself."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import backdoorlab as bl
from backdoorlab.attacks import attacks
from backdoorlab.core.method import Method
from backdoorlab.core.seeding import isolated_rng
from backdoorlab.defenses import defenses

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "python.md").read_text(), re.M | re.S)


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gen_pages", ROOT / "docs" / "gen_pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_method_has_a_page_with_all_its_hyper_parameters(generator: ModuleType) -> None:
    pages = generator.pages()
    for kind, registry in (("attack", attacks), ("defense", defenses)):
        for cls in registry:
            if not cls.__module__.startswith("backdoorlab."):
                continue
            page = pages[f"{kind}s/{cls.name}.md"]
            assert all(f"| `{p.name}` |" in page for p in cls.parameters()), cls.name
            assert str(cls.year) in page and all(m in page.lower() for m in cls.modalities), cls.name
            assert f"backdoorlab {kind.removesuffix('ack').removesuffix('nse')}" in page, cls.name
            assert f"[{cls.name}]({cls.name}.md)" in pages[f"{kind}s/index.md"]


def test_a_name_of_several_modalities_is_one_page(generator: ModuleType) -> None:
    page = generator.pages()["attacks/badnets.md"]
    assert [re.search(rf"^## {m}$", page, re.M) is not None for m in ("Image", "Text", "Audio", "Video")] == [True] * 4


def test_every_table_is_a_table(generator: ModuleType) -> None:
    for name, page in generator.pages().items():
        for block in page.split("\n\n"):
            if block.startswith("| "):
                bars = {len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", line))) for line in block.splitlines()}
                assert len(bars) == 1, f"{name}: rows of different lengths"


def test_docstrings_become_markdown(generator: ModuleType) -> None:
    text = (
        "Mask m in [0, 1] and *w* <x> * 2:\n\n    a * b < c\n\nChoices\n- one ``a_b``\n  and more\n- two\n\nEnd of a_b."
    )
    assert generator.prose(text) == (
        "Mask m in \\[0, 1\\] and *w* &lt;x> \\* 2:\n\n\n```text\na * b < c\n```\n\n"
        "Choices\n\n- one ``a_b``\n    and more\n- two\n\nEnd of a\\_b."
    )
    assert generator.on_page_content(":func:<code>~backdoorlab.api.load</code> :meth:<code>run</code>") == (
        '<autoref identifier="backdoorlab.api.load" optional><code>load</code></autoref> <code>run</code>'
    )


@pytest.mark.parametrize("package", ["attacks", "defenses", "tasks", "data", "benchmark"])
def test_what_a_package_offers_is_in_the_api_reference(generator: ModuleType, package: str) -> None:
    module = importlib.import_module(f"backdoorlab.{package}")
    documented = [importlib.import_module(f"backdoorlab.{name}") for name in generator.API[package]]
    for name in module.__all__:
        offered = getattr(module, name)
        if isinstance(offered, type):
            shown = [m for m in documented if offered.__module__ == m.__name__ or name in getattr(m, "__all__", ())]
            assert shown, f"{name} of {offered.__module__} is on no page"


def test_the_page_about_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks in turn, as a reader would paste them; only trainings are made shorter."""
    monkeypatch.chdir(tmp_path)
    short = {
        'recipe="smoke"': 'recipe="smoke", recipe_changes={"epochs": 2, "min_steps": 0}',
        "iterations=300": "iterations=2",
        "NeuralCleanse(epochs=20)": "NeuralCleanse(epochs=1, min_steps=1)",
        "STRIP()": "STRIP(overlays=2)",
        '"ft", backdoor': '"ft", backdoor, epochs=1',
    }
    code = "\n".join(BLOCKS)
    for long, quick in short.items():
        assert code.count(long) == 1, long
        code = code.replace(long, quick)
    names: dict[str, object] = {}
    with isolated_rng(0):  # a reader's own network draws its weights from the global generator
        exec(code, names)
    assert isinstance(names["screened"], type(names["backdoor"].evaluate()))  # type: ignore[attr-defined]


def test_the_ten_lines_are_the_same_everywhere() -> None:
    readme = (ROOT / "README.md").read_text()
    assert BLOCKS[0] in readme
    lines = [line.strip() for line in BLOCKS[0].splitlines() if line]
    assert len(lines) <= 10
    assert lines[:3] == [line.strip() for line in (bl.__doc__ or "").splitlines() if line.startswith("    ")][:3]


def test_no_page_fetches_anything() -> None:
    config = (ROOT / "mkdocs.yml").read_text()
    assert "font: false" in config
    assert not re.search(r"https?://|repo_url|- offline", config)


def test_methods_without_a_docstring_would_show() -> None:
    for registry in (attacks, defenses):
        for cls in registry:
            assert issubclass(cls, Method)
            assert importlib.import_module(cls.__module__).__doc__, f"{cls.__module__} has no docstring for its page"
