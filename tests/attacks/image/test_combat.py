"""COMBAT: against slow, independent implementations and closed forms; its options; its effect."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn
from torch.nn import functional as F

from attack_tools import noise_task, pictures
from backdoorlab.attacks.common.generators import seeded
from backdoorlab.attacks.common.surrogate import clean_surrogate
from backdoorlab.attacks.image.combat import Combat, CombatObjective, CombatTrigger, NoiseNet, low_pass_matrix
from backdoorlab.core.errors import InputError
from backdoorlab.data.split import Dataset, Split
from backdoorlab.models import build_model
from backdoorlab.tasks import Task
from backdoorlab.training import Batch, Context
from effect_tools import LOST, Numbers, case, effects, least, most, planted


def wild(network: torch.nn.Module, scale: float) -> torch.nn.Module:
    """A network whose last layers are blown up, so that its output is far from tame."""
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(scale)
    return network.eval()


@pytest.mark.parametrize(("height", "width", "keep"), [(16, 16, 0.65), (29, 31, 0.65), (32, 32, 0.3), (16, 28, 1.0)])
def test_low_pass_is_what_scipy_keeps(height: int, width: int, keep: float) -> None:
    images = torch.randn(3, 2, height, width, generator=torch.Generator().manual_seed(1))
    coefficients = dctn(images.double().numpy(), axes=(-2, -1), norm="ortho")
    coefficients[..., int(keep * height + 1e-9) :, :] = 0
    coefficients[..., :, int(keep * width + 1e-9) :] = 0
    expected = idctn(coefficients, axes=(-2, -1), norm="ortho")
    found = low_pass_matrix(height, keep) @ images @ low_pass_matrix(width, keep).T
    assert np.allclose(found.numpy(), expected, atol=1e-5)


def test_noise_keeps_band_and_bound_even_where_the_low_pass_overshoots() -> None:
    network = wild(seeded(lambda: NoiseNet(3, 32, 32, 0.65), 0, "g"), 3.0)
    x = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    noise = network(x).detach()
    assert float(noise.abs().max()) <= 1
    unscaled = network.rows @ (2 * network.draw(x).detach() - 1) @ network.columns.T
    assert float(unscaled.abs().max()) > 1, "the case must be one in which something has to be scaled down"
    coefficients = dctn(noise.double().numpy(), axes=(-2, -1), norm="ortho")
    assert np.abs(coefficients[..., 20:, :]).max() < 1e-4
    assert np.abs(coefficients[..., :, 20:]).max() < 1e-4
    assert np.abs(coefficients).max() > 0.1


@pytest.mark.parametrize("eps", [1.0, 2.5, 20.4, 10.5, 10.99, 127.5])
def test_combat_stays_within_eps_in_grey_levels(eps: float) -> None:
    images = pictures((3, 32, 32))
    trigger = CombatTrigger(wild(seeded(lambda: NoiseNet(3, 32, 32, 0.65), 0, "g"), 3.0), eps, 0.65, (3, 32, 32))
    change = (trigger(images).int() - images.int()).abs()
    assert int(change.max()) <= eps
    assert int(change.max()) >= int(eps) - 1, "a saturated network must come close to the bound"


def test_combat_refuses_noise_below_one_grey_level() -> None:
    with pytest.raises(InputError, match="eps must be"):
        Combat(eps=0.7)


def combat_objective(task: Task, share: float, network: torch.nn.Module, **changes: float) -> CombatObjective:
    weights = {"l2_weight": 0.02, "clean_weight": 0.8} | changes
    return CombatObjective(
        network,
        clean_surrogate(task, Context()),
        1,
        share,
        51.0,
        weights["l2_weight"],
        weights["clean_weight"],
        torch.Generator().manual_seed(0),
        None,
    )


def test_combat_losses_are_the_stated_sums() -> None:
    task = noise_task()
    network = seeded(lambda: NoiseNet(1, 16, 16, 0.65), 0, "g").eval()
    objective = combat_objective(task, 1.0, network)
    model = build_model("convnet3", task.modality, 4, seed=3).eval()
    x, y = task.train.inputs[:12].float() / 255, task.train.labels[:12]
    stamped = ((x + 0.2 * network(x)).clamp(0, 1) * 255).round() / 255
    expected = (
        F.cross_entropy(model(stamped), torch.ones_like(y))
        + 0.02 * ((2 * stamped - 1) - (2 * x - 1)).square().mean()
        + 0.8 * F.cross_entropy(objective.clean(stamped), y)
    )
    batch = Batch((x,), y, torch.arange(12))
    assert objective.generator_loss(model, batch).item() == pytest.approx(expected.item(), rel=1e-5)
    surrogate = objective(model, x, y, torch.arange(12)).item()
    mixed = x.clone()
    mixed[y == 1] = ((x[y == 1] + 0.2 * network(x[y == 1])).clamp(0, 1) * 255).round() / 255
    assert surrogate == pytest.approx(F.cross_entropy(model(mixed), y).item(), rel=1e-4)


def test_combat_poisons_only_the_share_it_will_poison() -> None:
    task = noise_task()
    objective = combat_objective(task, 0.0, seeded(lambda: NoiseNet(1, 16, 16, 0.65), 0, "g"))
    model = build_model("convnet3", task.modality, 4, seed=3).eval()
    x, y = task.train.inputs.float() / 255, task.train.labels
    assert objective(model, x, y, torch.arange(len(y))).item() == pytest.approx(F.cross_entropy(model(x), y).item())


def test_combat_generator_is_shared_between_runs_and_replaceable() -> None:
    task, context = noise_task(), Context(seed=1)
    attack = Combat(poison_rate=0.1)
    first = attack.make_trigger(task, context)
    again = attack.make_trigger(task, context.child("another run"))
    images = task.test.inputs
    assert torch.equal(first(images), again(images))
    other = Combat(poison_rate=0.1, target=2).make_trigger(task, context)
    assert not torch.equal(first(images), other(images))

    class Mine:
        def get(self, kind, spec, build):  # type: ignore[no-untyped-def]
            return {"rows": torch.zeros(3)} if kind == "combat-generator" else build()

    with pytest.raises(InputError, match="asset combat-generator lacks the tensor"):
        attack.make_trigger(task, Context(assets=Mine()))


def test_combat_needs_samples_of_the_target_class() -> None:
    task = noise_task()
    split = Split(task.train.inputs, task.train.labels.clamp(max=2), task.train.classes)
    data = Dataset("tiny", "image", split, split)
    with pytest.raises(InputError, match="no samples of class 3"):
        Combat(target=3).make_trigger(Task(task.spec, data, task.modality, task.recipe), Context())


@case("attack/image/combat", asr=least(0.4), acc_lost=LOST, benign_asr=most(0.6), gain=least(0.1))
def effect_of_combat(seed: int) -> Numbers:
    return planted(
        seed, "combat", target=1, poison_rate=0.09, eps=102.0, generator_lr=0.002, epochs=2.0, clean_weight=3.0
    )[1]


test_effect = effects(__name__)
