"""Each method has its effect: see effect_cases.py for what is measured and where the bounds come from."""

from __future__ import annotations

import pytest
from effect_cases import CASES, Case

SEED = 0

pytestmark = pytest.mark.effect


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=[pytest.mark.core_effect] if case.core else []) for case in CASES],
)
def test_effect(case: Case) -> None:
    if "diffusion" in case.name:
        pytest.importorskip("diffusers")
    numbers = case.measure(SEED)
    print(case.name, {name: round(value, 4) for name, value in numbers.items()})
    assert not case.broken(numbers), numbers
