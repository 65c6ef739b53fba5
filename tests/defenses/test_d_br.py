"""D-BR: the order of ascent and descent, the cap, what stays as it is, and the effect."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from backdoorlab.core.errors import InputError
from backdoorlab.defenses.repair.d_br import Alternating, BackdoorRemoval, UnlearnStep
from backdoorlab.defenses.view import DefenderView
from backdoorlab.models import build_model
from backdoorlab.testing import tiny_task
from backdoorlab.training import Context, Recipe, predict
from backdoorlab.training.batches import Shuffled
from contract_tools import tiny_model
from effect_tools import Numbers, case, effects, least, most, repaired

PLAIN = Recipe(lr=0.01, momentum=0, weight_decay=0)


def shuffled(first: int, last: int, batch: int) -> Shuffled:
    task = tiny_task()
    rows = torch.arange(first, last)
    return Shuffled(task.train[rows], task.modality, batch, torch.Generator().manual_seed(0), augment=False)


def losses(model: torch.nn.Module, batch_of: Shuffled) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        everything = batch_of.at(torch.arange(len(batch_of.labels)))
        return F.cross_entropy(model(everything.inputs), everything.labels, reduction="none")


def test_an_epoch_ascends_on_the_suspected_then_descends_on_the_trusted() -> None:
    batches = Alternating(shuffled(0, 10, 4), shuffled(10, 30, 5))
    assert len(batches) == 2 + 4
    assert [ascend for ascend, _ in batches] == [True] * 2 + [False] * 4
    assert [len(batch) for _, batch in batches] == [4] * 2 + [5] * 4


def test_ascent_raises_the_loss_and_leaves_running_statistics_alone() -> None:
    model, source = copy.deepcopy(tiny_model("image")), shuffled(0, 16, 16)
    before, buffers = losses(model, source), {name: b.clone() for name, b in model.named_buffers()}
    UnlearnStep(model, PLAIN, math.inf)((True, source.at(torch.arange(16))))
    assert float(losses(model, source).mean()) > float(before.mean())
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())


def test_descent_lowers_the_loss() -> None:
    model, source = copy.deepcopy(tiny_model("image")), shuffled(0, 16, 16)
    step = UnlearnStep(model, dataclasses.replace(PLAIN, lr=0.1), 1.0)
    seen = [float(step((False, source.at(torch.arange(16))))) for _ in range(10)]
    assert seen[-1] < seen[0] - 0.1


def test_above_the_cap_nothing_is_ascended() -> None:
    model, source = copy.deepcopy(tiny_model("image")), shuffled(0, 16, 16)
    weights = copy.deepcopy(model.state_dict())
    UnlearnStep(model, PLAIN, float(losses(model, source).min()) / 2)((True, source.at(torch.arange(16))))
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_model_of_other_classes_is_refused() -> None:
    task = tiny_task()
    other = build_model("convnet3", task.modality, 7)
    with pytest.raises(InputError, match="7 classes, the samples have 10"):
        BackdoorRemoval().apply(DefenderView(model=other, suspicious=task.train, blueprint=task.blueprint), Context())


def test_where_all_are_trusted_nothing_is_unlearned() -> None:
    task = tiny_task()
    few = torch.stack([(task.train.labels == k).nonzero()[0, 0] for k in range(10)])
    ctx, model = Context(), tiny_model("image")
    view = DefenderView(model=model, suspicious=task.train[few], blueprint=task.blueprint)
    mended = BackdoorRemoval().run(view, ctx)
    assert ctx.warnings == ["d_br: all 10 samples are trusted, so that nothing is unlearned"]
    assert torch.equal(predict(mended, task.test.inputs), predict(model, task.test.inputs))


@case("defense/repair/d_br", asr_lost=least(0.5), acc_lost=most(0.4))
def effect_of_d_br(seed: int) -> Numbers:
    """At a tenth of the training's rate: the published hundredth needs the reference recipe's number of steps."""
    return repaired(seed, BackdoorRemoval(lr=0.1))


test_effect = effects(__name__)
