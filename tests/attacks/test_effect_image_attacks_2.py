"""Attacks that train surrogates, generators or with a loss of their own: each works on digits and does not show."""

from __future__ import annotations

import pytest

from backdoorlab.attacks import attacks
from backdoorlab.models import Classifier
from backdoorlab.training import Context, Task, predict

DIRTY, CLEAN_LABEL = 0.90, 0.80

LC = {"poison_rate": 0.08, "eps": 64.0, "step": 4.0, "steps": 40, "surrogate_eps": 32.0}
CASES = [
    # name, least ASR, least difference to a benign model's, settings
    ("trojannn", DIRTY, 0.8, {}),
    ("blind", DIRTY, 0.8, {}),
    ("input_aware", DIRTY, 0.8, {"poison_rate": 0.33, "density": 0.1, "generator_lr": 0.004}),
    ("lc", CLEAN_LABEL, 0.7, LC),
    ("narcissus", CLEAN_LABEL, 0.7, {"poison_rate": 0.09, "steps": 200, "factor_test": 6.0}),
    ("lira", DIRTY, 0.8, {"strength": 0.1}),
]
"""Settings that differ from the defaults: a generator needs more samples to learn from in 300 steps of 64; the faintest
noise of lira costs up to three points of clean accuracy in so short a training; digits are so easily told apart that 8
grey levels of perturbation do not hide one, and a noise of 16 grey levels has to be amplified more."""


@pytest.fixture(scope="module")
def shared() -> Context:
    """One cache, so that surrogates are trained once, as in a benchmark."""
    return Context()


@pytest.mark.parametrize(("name", "floor", "gain", "settings"), [pytest.param(*case, id=case[0]) for case in CASES])
def test_attack_works_and_does_not_show(
    name: str,
    floor: float,
    gain: float,
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
    assert untouched["asr"] < metrics["asr"] - gain, "the trigger alone must not make a benign model obey"
    if "cross_acc" in metrics:
        assert metrics["cross_acc"] >= metrics["acc"] - 0.2, "another image's trigger must not work"
