"""LIRA: against slow, independent implementations and closed forms; its options; its effect."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from attack_tools import pictures
from backdoorlab.attacks import attacks
from backdoorlab.attacks.common.generators import AlternatingStep, seeded
from backdoorlab.attacks.image.lira import LiraObjective, LiraTrigger
from backdoorlab.attacks.targets import TargetMap
from backdoorlab.core.errors import InputError
from backdoorlab.data.split import Dataset, Split
from backdoorlab.modalities.base import modality_of
from backdoorlab.models import Classifier
from backdoorlab.models.networks.generators import StrideNet
from backdoorlab.tasks import Task
from backdoorlab.training import Batch, Context, Descent, Recipe
from effect_tools import LOST, OBEYS, Numbers, case, effects, least, planted

STILL = Recipe(epochs=1, batch_size=8, lr=0.0, momentum=0.0, weight_decay=0.0, precision="fp32")
"""Leaves the victim's weights as they are, and its gradients to be looked at."""


def lira_step(stage: int, model: Classifier) -> tuple[Descent[Classifier], LiraObjective, torch.nn.Module]:
    live = seeded(lambda: StrideNet(1), 0, "live").train()
    still = seeded(lambda: StrideNet(1), 0, "still").eval().requires_grad_(False)
    scale, target_map = torch.tensor([0.2]).reshape(1, 1, 1), TargetMap("all-to-one", 3, 10)
    objective = LiraObjective(still, scale, target_map, 0.3, rounded=stage == 2)
    if stage == 2:
        return Descent(model, STILL, objective), objective, live
    loss = partial(objective.generator_loss, live)
    return AlternatingStep(model, STILL, objective, network=live, loss=loss, lr=1e-3), objective, live


@pytest.mark.parametrize("stage", [1, 2])
def test_lira_loss_of_the_victim(stage: int, digits_task: Task) -> None:
    """The victim's loss, gradient and batch statistics are those of its own loss alone, in either stage."""
    inputs, labels = digits_task.train.inputs[:8].float() / 255, digits_task.train.labels[:8]
    model, twin = (digits_task.build_model(Context()).train() for _ in range(2))
    step, objective, live = lira_step(stage, model)
    before = [p.detach().clone() for p in live.parameters()]
    loss = step(Batch((inputs,), labels, labels))
    with torch.no_grad():
        stamped = (inputs + objective.scale * objective.noise(inputs)).clamp(0, 1)
        if stage == 2:
            stamped = (stamped * 255).round() / 255
    logits = twin(torch.cat([inputs, stamped]))
    slow = 0.3 * F.cross_entropy(logits[:8], labels) + 0.7 * F.cross_entropy(logits[8:], torch.full((8,), 3))
    slow.backward()
    assert float(loss) == pytest.approx(float(slow.detach()), rel=1e-5)
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert a.requires_grad, name
        assert a.grad is not None, name
        assert torch.allclose(a.grad, b.grad, atol=1e-6), name
    for (name, c), d in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.allclose(c.float(), d.float(), atol=1e-6), name
    moved = any(not torch.equal(a, b) for a, b in zip(before, live.parameters(), strict=True))
    assert moved == (stage == 1)


def test_lira_generator_learns_to_fool_a_fixed_model(digits_task: Task, benign_digits: Classifier) -> None:
    step, objective, live = lira_step(1, copy.deepcopy(benign_digits))
    inputs, labels = digits_task.train.inputs[:64].float() / 255, digits_task.train.labels[:64]
    wanted = torch.full((64,), 3)

    def cost() -> float:
        with torch.no_grad():
            noise = live(inputs)
            return float(F.cross_entropy(benign_digits((inputs + objective.scale * noise).clamp(0, 1)), wanted))

    start = cost()
    for _ in range(30):
        step(Batch((inputs,), labels, labels))
    assert cost() < start - 1
    assert not torch.equal(objective.noise(inputs), live.eval()(inputs)), "the victim sees the copy of the last epoch"
    assert not objective.noise.training


def test_lira_trigger_stays_within_its_range() -> None:
    network = seeded(lambda: StrideNet(3), 0, "network")
    with torch.no_grad():
        network.up[-1].weight.mul_(100)  # type: ignore[operator, union-attr]
    scale = torch.tensor([3.0, 10.0, 0.0]).reshape(3, 1, 1)
    images = pictures((3, 29, 31), 70)
    moved = (LiraTrigger(network, scale, (3, 29, 31))(images).int() - images.int()).abs()
    assert moved.amax((0, 2, 3)).tolist() == [3, 10, 0]


def test_lira_refuses_small_images(digits_task: Task) -> None:
    split = Split(torch.zeros(20, 1, 16, 12, dtype=torch.uint8), torch.arange(20) % 2, ("a", "b"))
    data = Dataset("tiny", "image", split, split)
    task = Task(digits_task.spec, data, modality_of(data), digits_task.recipe)
    with pytest.raises(InputError, match="lira: images must be at least 16 px on each side, got 16x12"):
        attacks.get("lira", "image")().run(task, Context())


@case("attack/image/lira", asr=least(0.9), acc_lost=LOST, benign_asr=OBEYS)
def effect_of_lira(seed: int) -> Numbers:
    return planted(seed, "lira", poison_rate=0.1, strength=0.1)[1]


test_effect = effects(__name__)
