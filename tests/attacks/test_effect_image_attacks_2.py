"""Attacks that train surrogates, generators or with a loss of their own: each works on digits and does not show."""

from __future__ import annotations

import pytest

from backdoorlab.attacks import attacks
from backdoorlab.models import Classifier
from backdoorlab.training import Context, Task, predict

DIRTY, CLEAN_LABEL = 0.90, 0.80

CASES = [
    ("trojannn", DIRTY, {}),
    ("blind", DIRTY, {}),
]


@pytest.fixture(scope="module")
def shared() -> Context:
    """One cache, so that surrogates are trained once, as in a benchmark."""
    return Context()


@pytest.mark.parametrize(("name", "floor", "settings"), [pytest.param(*case, id=case[0]) for case in CASES])
def test_attack_works_and_does_not_show(
    name: str,
    floor: float,
    settings: dict[str, object],
    digits_task: Task,
    benign_digits: Classifier,
    shared: Context,
) -> None:
    backdoor = attacks.get(name, "image").build(settings).plant(digits_task, shared)
    metrics, untouched = (
        backdoor.measure(digits_task, shared),
        backdoor.measure(digits_task, shared, benign_digits),
    )
    print(name, {k: round(v, 3) for k, v in metrics.items() if isinstance(v, float)}, untouched["asr"])
    benign = (predict(benign_digits, digits_task.test.inputs).argmax(1) == digits_task.test.labels).float().mean()
    assert metrics["asr"] >= floor
    assert metrics["acc"] >= float(benign) - 0.03
    assert untouched["asr"] < metrics["asr"] - 0.5, "the trigger alone must not make a benign model obey"
    if "cross_acc" in metrics:
        assert metrics["cross_acc"] >= metrics["acc"] - 0.15
