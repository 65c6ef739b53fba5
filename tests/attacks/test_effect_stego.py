"""Hidden messages and hidden ink: the networks pass their gates on digits, and victims obey them unseen."""

from __future__ import annotations

import pytest

from backdoorlab.attacks import attacks
from backdoorlab.models import Classifier
from backdoorlab.training import Context, Task, predict

CASES = [
    # case, attack, settings, must the pair of networks pass its gates?
    ("ssba", "ssba", {"steps": 400, "image_weight": 20.0}, True),
    ("poisonink", "poisonink", {"steps": 400}, False),
    ("poisonink-edge", "poisonink", {"variant": "edge", "opacity": 0.3}, True),
    ("poisonink-paired", "poisonink", {"variant": "edge", "opacity": 0.3, "mode": "paired", "poison_rate": 0.2}, True),
]
"""In so few steps the ink is visible (28 dB) and its colour only half revealed, which the victim does not need; that
the card says so is what is tested. SSBA's settings were chosen on another split of the digits."""


@pytest.mark.parametrize(("name", "settings", "gates"), [pytest.param(*case[1:], id=case[0]) for case in CASES])
def test_hidden_trigger_works_and_does_not_show(
    name: str, settings: dict[str, object], gates: bool, digits_task: Task, benign_digits: Classifier
) -> None:
    ctx = Context()
    backdoor = attacks.get(name, "image").build(settings).plant(digits_task, ctx)
    metrics, untouched = backdoor.measure(digits_task, ctx), backdoor.measure(digits_task, ctx, benign_digits)
    print(name, {k: round(v, 3) for k, v in metrics.items() if isinstance(v, float)}, untouched["asr"], backdoor.notes)
    benign = (predict(benign_digits, digits_task.test.inputs).argmax(1) == digits_task.test.labels).float().mean()
    assert metrics["asr"] >= 0.90
    assert metrics["acc"] >= float(benign) - 0.03
    assert untouched["asr"] < 0.1, "the trigger alone must not make a benign model obey"
    assert bool(backdoor.notes.get("gates_missed")) != gates
