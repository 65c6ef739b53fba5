"""Pages that are made when the site is built (a hook of mkdocs): one per method, from its facts, and the API reference.

Nothing here needs mkdocs except :func:`on_files`, so that the pages can be tested without it.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from backdoorlab.attacks import attacks
from backdoorlab.cli.methodpage import example, plain
from backdoorlab.core.method import Method, ParamInfo
from backdoorlab.defenses import defenses
from backdoorlab.defenses.view import PARTS

API = {
    "backdoorlab": ("api",),
    "attacks": (
        "attacks.base",
        "attacks.result",
        "attacks.selection",
        "attacks.poisoning",
        "attacks.triggers.base",
        "attacks.targets",
    ),
    "defenses": ("defenses.base", "defenses.view"),
    "methods": ("core.method", "core.errors"),
    "tasks": ("tasks.base", "tasks.classification"),
    "training": ("training.recipes", "training.blueprint", "training.context", "training.loop", "training.evaluate"),
    "models": ("models.classifier", "models.anatomy"),
    "data": ("data.sources", "data.split"),
    "metrics": ("metrics.classification", "metrics.detection", "metrics.statistics", "metrics.tables"),
    "benchmark": (
        "benchmark.spec",
        "benchmark.grid",
        "benchmark.runner",
        "benchmark.store",
        "benchmark.remote",
        "benchmark.card",
        "benchmark.results",
        "benchmark.engine",
        "benchmark.studies.base",
    ),
    "testing": ("testing",),
}
"""Pages of the API reference and the modules on them, below ``backdoorlab``."""

LABELS = {
    "threat_model": "Threat model",
    "trigger_visibility": "Trigger",
    "sample_specific": "Trigger depends on the sample",
    "label_mode": "Labels of poisoned samples",
    "target_mode": "Target map",
    "needs_surrogate": "Trains a surrogate first",
    "asset_kinds": "Assets that your own file can replace",
    "stage": "Stage",
    "reads": "Reads",
    "may_read": "Reads if it is there",
    "needs_clean_fraction": "Clean samples by default",
    "needs_norm": "Needs normalisation layers",
    "needs_conv": "Needs convolutions",
}
COLUMNS = {"attack": ("threat_model", "trigger_visibility"), "defense": ("stage", "reads")}
ROOT = Path(__file__).parents[1]


def pages() -> dict[str, str]:
    """All generated pages: markdown by path below ``docs/``."""
    return {**method_pages("attack"), **method_pages("defense"), **api_pages()}


def method_pages(kind: str) -> dict[str, str]:
    """A page for each attack or each defense of the library (not of plug-ins), and one that lists them."""
    methods: dict[str, list[type[Method]]] = {}
    for cls in attacks if kind == "attack" else defenses:
        if cls.__module__.startswith("backdoorlab."):
            methods.setdefault(cls.name, []).append(cls)
    found = {f"{kind}s/{name}.md": method_page(kind, classes) for name, classes in methods.items()}
    head = ("Name", "What it does", "Modalities", *(LABELS[k] for k in COLUMNS[kind]), "Year")
    rows = [
        (
            f"[{name}]({name}.md)",
            _lead(classes[0]),
            ", ".join(m for cls in classes for m in cls.modalities),
            *(_words(k, classes[0].facts()[k]) for k in COLUMNS[kind]),
            classes[0].year,
        )
        for name, classes in ((name, _image_first(classes)) for name, classes in methods.items())
    ]
    intro = f"Made from the facts that each {kind} declares; `backdoorlab list {kind}s` prints the same."
    found[f"{kind}s/index.md"] = "\n\n".join((f"# {kind.title()}s", intro, _table(head, rows))) + "\n"
    return found


def method_page(kind: str, classes: list[type[Method]]) -> str:
    """Facts, the file's docstring, hyper-parameters and a command for all classes of one name."""
    classes = _image_first(classes)
    first = classes[0]
    parts = [f"# {first.name}"]
    for cls in classes:
        if len(classes) > 1:
            parts.append(f"## {', '.join(cls.modalities).title()}")
        parts += [_facts(cls), prose(_docstring(cls))]
        parts += [f"{'##' if len(classes) == 1 else '###'} Hyper-parameters", _parameters(cls.parameters())]
    front, verb = ("attacks", "plant(task)") if kind == "attack" else ("defenses", _VERBS[first.facts()["stage"]])
    python = f"import backdoorlab as bl\n\nbl.{front}.{first.__name__}().{verb}"
    parts += ["## Use it", f"```console\n{example(kind, first)}\n```", f"```python\n{python}\n```"]
    parts.append(
        f"The verbs are explained in [From Python](../python.md); the contract is in the API reference of "
        f"[{front}](../api/{front}.md)."
    )
    return "\n\n".join(parts) + "\n"


_VERBS = {
    "dataset": "screen(suspicious, model)",
    "training": "train(suspicious, task.blueprint)",
    "repair": "repair(model, clean)",
    "input": "detector(model, clean)",
    "model": "scan(model, clean)",
}


def api_pages() -> dict[str, str]:
    """Directives from which mkdocstrings makes the API reference."""
    found = {}
    for title, modules in API.items():
        blocks = [f"::: backdoorlab.{name}" for name in modules]
        if title == "backdoorlab":
            blocks.insert(0, "::: backdoorlab\n    options:\n      members: false")
        found[f"api/{title}.md"] = "\n\n".join((f"# {title}", *blocks)) + "\n"
    return found


def prose(text: str) -> str:
    """A plain-text docstring as markdown: formulas become blocks, lists get the blank line that markdown wants."""
    out: list[str] = []
    in_list = in_code = False
    for line in inspect.cleandoc(text).splitlines():
        item = re.match(r"(- |\d+\. )", line)
        if line.startswith("    ") and not in_list:
            out += [] if in_code else ["", "```text"]
            in_code = True
            out.append(line[4:])
            continue
        if in_code and line:
            while not out[-1]:
                out.pop()
            out += ["```", ""]
            in_code = False
        if item and not in_list:
            out.append("")
        in_list = bool(item) or (in_list and (line.startswith(" ") or not line))
        if in_list and not item and line:  # python-markdown wants four spaces below an item
            line = "    " + line.strip()
        out.append(line if in_code else _escaped(line))
    return "\n".join([*out, "```"] if in_code else out)


def _escaped(line: str) -> str:
    kept = re.split(r"(``.*?``|(?<!\S)\*\w[\w -]*\*)", line)  # code and *emphasis*
    return "".join(part if part.startswith(("``", "*")) else _literal(part, r"[*_\[\]\\]") for part in kept)


def _literal(text: str, special: str) -> str:
    """Text in which nothing is markup."""
    return re.sub(f"({special})", r"\\\1", text.replace("<", "&lt;"))


def _facts(cls: type[Method]) -> str:
    facts = cls.facts()
    file = Path(inspect.getfile(cls)).relative_to(ROOT).as_posix()
    rows = [("Paper", f"{facts['paper']}"), ("Year", facts["year"]), ("Modalities", ", ".join(facts["modalities"]))]
    if cls.aliases:
        rows.append(("Also called", ", ".join(cls.aliases)))
    rows += [(LABELS.get(k, k.replace("_", " ")), _words(k, facts[k])) for k in cls.fact_names]
    rows.append(("Class and file", f"`{cls.__name__}`, `{file}`"))
    return _table(("", ""), rows)


def _parameters(infos: list[ParamInfo]) -> str:
    rows = []
    for p in infos:
        kind = p.type.replace(" (optional)", "")
        source = p.source if p.source and p.source != "ours" else "–"
        rows.append((f"`{p.name}`", f"{kind}", f"`{plain(p.default)}`", p.range, p.help, source))
    return _table(("Name", "Type", "Default", "Range", "Meaning", "Default from"), rows)


def _words(name: str, value: Any) -> str:
    if name in ("reads", "may_read"):
        return ", ".join(PARTS[part] for part in value) or "nothing"
    if name == "needs_clean_fraction":
        return f"{100 * value:g} % of the training set" if value else "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) or "none" if isinstance(value, (list, tuple)) else str(value)


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(str(c)) for c in line) + " |" for line in lines)


def _cell(text: str) -> str:
    """A table's cell: one line without markup, code and links apart."""
    code = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(part if part.startswith("`") else _literal(part, r"[*|]") for part in code)


def _lead(cls: type[Method]) -> str:
    """The first sentence of the file's docstring, without the name before the colon."""
    title = " ".join(inspect.cleandoc(_docstring(cls)).split("\n\n")[0].split())
    return title.split(": ", 1)[-1].rstrip(".")


def _docstring(cls: type[Method]) -> str:
    return inspect.getdoc(sys.modules[cls.__module__]) or inspect.getdoc(cls) or ""


def _image_first(classes: list[type[Method]]) -> list[type[Method]]:
    return sorted(classes, key=lambda cls: "image" not in cls.modalities)


_pages = functools.cache(pages)


def on_config(config: Any) -> Any:
    """Put the generated pages, and the pages of results, into the navigation."""
    made = {
        "Attacks": sorted(p for p in _pages() if p.startswith("attacks/") and p != "attacks/index.md"),
        "Defenses": sorted(p for p in _pages() if p.startswith("defenses/") and p != "defenses/index.md"),
        "API reference": list(api_pages()),
        "Results": sorted(p.name for p in Path(config["docs_dir"]).glob("results-*.md")),
    }
    for entry in config["nav"]:
        for title, items in entry.items():
            if title in made:
                entry[title] = [*made[title], *items] if title == "Results" else [*items, *made[title]]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    for path, text in _pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Show roles of docstrings (``:func:`name```) as code, linked where the name is a full one."""
    return re.sub(r":(?:func|class|meth|attr|mod|data|option):<code>(~?)([^<]+)</code>", _role, html)


def _role(match: re.Match[str]) -> str:
    short, name = match.groups()
    code = f"<code>{name.rpartition('.')[2] if short else name}</code>"
    return f'<autoref identifier="{name}" optional>{code}</autoref>' if name.startswith("backdoorlab.") else code
