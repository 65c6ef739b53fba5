"""SCALE-UP: its consistency against a loop over samples and factors, what ties decide, and what is usual in a class."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from backdoorlab.attacks import Backdoor
from backdoorlab.core.errors import InputError
from backdoorlab.defenses import DefenderView
from backdoorlab.defenses.input import scale_up
from backdoorlab.defenses.input.scale_up import ScaleUp, Standard, consistency, scaled_copies
from backdoorlab.tasks import Task
from backdoorlab.training import Context, predict
from effect_tools import Numbers, case, detected, effects, least, most

SCALES = (3.0, 5.0, 7.0)


def test_copies_are_made_from_the_sample_itself_and_clipped() -> None:
    x = torch.tensor([[0.1, 0.2, 0.5]])
    assert scaled_copies(x, (2.0, 3.0), False).flatten(1).tolist() == [
        pytest.approx([0.2, 0.4, 1.0]),
        pytest.approx([0.3, 0.6, 1.0]),
    ]
    assert scaled_copies(torch.tensor([[-0.6, 0.2]]), (2.0,), True).flatten().tolist() == pytest.approx([-1.0, 0.4])


def test_consistency_equals_a_loop(
    badnets_digits: Backdoor, digits_task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = badnets_digits.model, digits_task.test.inputs[:9]
    monkeypatch.setattr(scale_up, "FORWARD_BATCH", 12)  # three samples a pass
    spc, classes = consistency(model, inputs, SCALES)
    tied, _ = consistency(model, inputs, SCALES, "confidence")
    for row, image in enumerate(inputs):
        given = int(predict(model, image[None]).argmax())
        same, sure = [], []
        for factor in SCALES:
            with torch.no_grad():
                p = model((image[None].float() / 255 * factor).clamp(max=1)).softmax(1)[0]
            same.append(int(p.argmax()) == given)
            sure.append(float(p[given]))
        assert int(classes[row]) == given
        assert float(spc[row]) == pytest.approx(np.mean(same))
        assert float(tied[row]) == pytest.approx(np.mean(same) + 0.99 * np.mean(sure) / 3, abs=1e-5)


def test_confidence_never_outweighs_a_step(badnets_digits: Backdoor, digits_task: Task) -> None:
    inputs = digits_task.test.inputs[:100]
    spc, _ = consistency(badnets_digits.model, inputs, SCALES)
    tied, _ = consistency(badnets_digits.model, inputs, SCALES, "confidence")
    less, more = spc[:, None] < spc, tied[:, None] < tied
    assert bool(more[less].all())


def test_what_is_usual_is_learned_per_predicted_class() -> None:
    spc, classes = torch.tensor([0.2, 0.6, 1.0, 1.0, 0.4]), torch.tensor([0, 0, 1, 1, 2])
    usual = Standard.of(spc, classes, 4, 5)
    assert usual.mean.tolist() == pytest.approx([0.4, 1.0, 0.64, 0.64])
    everything = float(spc.std())
    assert usual.std.tolist() == pytest.approx([max(0.2828, 0.2), everything, everything, everything], abs=1e-3)
    assert usual(torch.tensor([0.8]), torch.tensor([0])).tolist() == pytest.approx([0.4 / 0.2828], rel=1e-3)
    assert float(Standard.of(torch.ones(4), torch.zeros(4, dtype=torch.int64), 2, 5).std[0]) == pytest.approx(0.2)


def test_decisions(badnets_digits: Backdoor, digits_task: Task) -> None:
    view = DefenderView(model=badnets_digits.model, clean=digits_task.train[torch.arange(100)])
    detector = ScaleUp(frr=0.1).run(view, Context())
    assert 0 < int(detector.flags(detector.score(view.clean.inputs)).sum()) <= 10
    fixed = ScaleUp(decision="fixed", ties="none", spc_threshold=0.6).run(view, Context())
    assert fixed.flags(torch.tensor([0.6, 0.8])).tolist() == [False, True]
    limited = ScaleUp(setting="limited").run(view, Context())
    assert limited.standard is not None and len(limited.standard.mean) == 10
    with pytest.raises(InputError, match="setting=free"):
        ScaleUp(decision="fixed")
    for scales in ((), (1.0, 3.0), (float("inf"),)):
        with pytest.raises(InputError, match="above 1"):
            ScaleUp(scales=scales)


@case("defense/input/scale_up", auroc=least(0.9), tpr=least(0.6), fpr=most(0.15), benign_gap=most(0.2))
def badnets(seed: int) -> Numbers:
    return detected(seed, ScaleUp())


test_effect = effects(__name__)
