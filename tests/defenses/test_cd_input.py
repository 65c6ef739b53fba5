"""CD as a detector of inputs: its score and thresholds from the shared masks, and its effect."""

from __future__ import annotations

import pytest
import torch

from backdoorlab.attacks import Backdoor
from backdoorlab.core.errors import InputError
from backdoorlab.defenses import DefenderView
from backdoorlab.defenses.input.cd import CognitiveDistillationInput
from backdoorlab.tasks import Task
from backdoorlab.training import Context
from effect_tools import Numbers, case, detected_shapes, effects, least, most


def test_the_score_is_the_negative_size_of_the_mask(badnets_digits: Backdoor, digits_task: Task) -> None:
    method, ctx = CognitiveDistillationInput(iterations=4), Context()
    clean = digits_task.train[torch.arange(40)]
    detector = method.run(DefenderView(model=badnets_digits.model, clean=clean), ctx)
    inputs = digits_task.test.inputs[:6]
    masks = method.masks(badnets_digits.model, inputs, ctx, "masks")
    assert torch.allclose(detector.score(inputs), -masks.abs().sum((1, 2, 3)), rtol=1e-5)
    assert torch.allclose(detector.score(inputs)[4:], detector.score(inputs[4:]), rtol=1e-3)
    assert int(detector.flags(detector.score(clean.inputs)).sum()) <= 2, "5 % of 40"
    assert len(detector.score(inputs[:0])) == 0


def test_the_papers_threshold_is_an_option(badnets_digits: Backdoor, digits_task: Task) -> None:
    clean = digits_task.train[torch.arange(30)]
    view = DefenderView(model=badnets_digits.model, clean=clean)
    detector = CognitiveDistillationInput(iterations=3, rule="gamma", gamma=1.5).run(view, Context())
    sizes = -detector.score(clean.inputs).double()
    assert -detector.threshold == pytest.approx(float(sizes.mean() - 1.5 * sizes.std(correction=0)))
    with pytest.raises(InputError, match="clean"):
        CognitiveDistillationInput().run(
            DefenderView(model=badnets_digits.model, clean=clean[torch.arange(0)]), Context()
        )


@case(
    "defense/input/cd",
    fragile="AUROC 0.91 in one draw, 0.66 in another",
    auroc=least(0.8),
    tpr=least(0.3),
    fpr=most(0.25),
)
def badnets(seed: int) -> Numbers:
    """Shapes: of a digit the strokes alone keep the output, which makes its mask as small as that of a patch."""
    return detected_shapes(seed, CognitiveDistillationInput(iterations=50), count=30)


test_effect = effects(__name__)
