"""Hyper-parameters of attacks as users read them: sources of defaults, help lines, and one unit for a name."""

from __future__ import annotations

import pytest

from backdoorlab.attacks import Attack, attacks
from backdoorlab.core.method import ParamInfo

CLASSES = sorted(attacks, key=lambda cls: (cls.name, cls.modalities))
OF_EACH = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: f"{cls.name}-{cls.modalities[0]}")

UNITS = {
    "alpha_test": "blend ratio",
    "alpha_train": "blend ratio",
    "batch_size": "images|pictures",
    "color": "grey level",
    "cover_rate": "size of the training set",
    "delta_test": "grey levels",
    "delta_train": "grey levels",
    "eps": "grey levels",
    "offset": "pixels",
    "poison_rate": "size of the training set",
    "position": "corner|clip",
    "rgb": "from 0 to 255",
    "step": "grey levels",
}
"""Words of which the help of a name holds one wherever the name occurs."""


@OF_EACH
def test_every_default_has_a_source(cls: type[Attack]) -> None:
    assert [parameter.name for parameter in cls.parameters() if not parameter.source] == []


@OF_EACH
def test_a_help_line_needs_no_other(cls: type[Attack]) -> None:
    def alone(parameter: ParamInfo) -> bool:
        text = parameter.help
        refers = any(phrase in text for phrase in ("see above", "see below", "the same at", "likewise", "as there"))
        return len(text.split()) > 1 and not refers

    assert [parameter.name for parameter in cls.parameters() if not alone(parameter)] == []


@OF_EACH
def test_a_name_has_one_unit(cls: type[Attack]) -> None:
    helps = {parameter.name: parameter.help for parameter in cls.parameters()}
    for name, words in UNITS.items():
        assert any(word in helps.get(name, word) for word in words.split("|")), f"{name}: {helps[name]}"


def test_color_is_spelt_in_one_way() -> None:
    texts = [f"{p.name} {p.help}" for cls in CLASSES for p in cls.parameters()]
    assert [text for text in texts if "colour" in text.lower()] == []
