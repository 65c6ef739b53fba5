"""Clean-label attacks by colliding features and by a universal perturbation: each works on digits and does not show."""

from __future__ import annotations

import pytest

from backdoorlab.attacks import attacks
from backdoorlab.models import Classifier
from backdoorlab.training import Context, Task, predict

CLEAN_LABEL = 0.80

CASES = [
    # name, least ASR, settings
    ("fc", CLEAN_LABEL, {"poison_rate": 0.09, "size": 8, "steps": 200}),
    ("htba", CLEAN_LABEL, {"poison_rate": 0.09, "size": 10, "eps": 48, "steps": 300}),
    ("tuap", CLEAN_LABEL, {"target": 1, "poison_rate": 0.09, "eps": 76.0}),
]
"""Settings that differ from the defaults were chosen on another split of the digits and other seeds. Averaged features
of 16 px hardly notice a patch of a quarter of the side, wherever it lies, so that it is larger here; 76 grey levels is
what the perturbation is given on MNIST. Nearly the whole target class is poisoned: it holds a tenth of the samples."""


@pytest.fixture(scope="module")
def shared() -> Context:
    """One cache, so that the surrogate is trained once, as in a benchmark."""
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
    metrics = backdoor.measure(digits_task, shared)
    untouched = backdoor.measure(digits_task, shared, benign_digits)
    print(name, {k: round(v, 3) for k, v in metrics.items() if isinstance(v, float)}, untouched["asr"])
    benign = (predict(benign_digits, digits_task.test.inputs).argmax(1) == digits_task.test.labels).float().mean()
    assert metrics["asr"] >= floor
    assert metrics["acc"] >= float(benign) - 0.03
    assert untouched["asr"] < metrics["asr"] - 0.6, "the trigger alone must not make a benign model obey"
