"""Pieces of DFST and COMBAT against slow, independent implementations and hand-made cases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.fft import dctn, idctn
from torch import Tensor
from torch.nn import functional as F

from backdoorlab.attacks import attacks
from backdoorlab.attacks.common.detoxify import (
    activations,
    compromised,
    inject,
    injector_loss,
    neuron_layers,
    observe,
    train_injector,
)
from backdoorlab.attacks.common.generators import Companion, seeded
from backdoorlab.attacks.common.pictures import read_folder
from backdoorlab.attacks.common.style import train_style
from backdoorlab.attacks.common.surrogate import clean_surrogate
from backdoorlab.attacks.image.combat import Combat, CombatObjective, CombatTrigger, NoiseNet, low_pass_matrix
from backdoorlab.attacks.image.dfst import Dfst, sunsets
from backdoorlab.core.errors import InputError
from backdoorlab.data.sources import DatasetSpec
from backdoorlab.data.split import BACKDOOR, COVER, Dataset, Split
from backdoorlab.modalities.base import modality_of
from backdoorlab.models import build_model
from backdoorlab.models.networks.style import MAX_SHIFT, PatchNet, StyleNet
from backdoorlab.tasks import Task, TaskSpec
from backdoorlab.training import Context, Recipe


def pictures(shape: tuple[int, ...], count: int = 6, seed: int = 0) -> Tensor:
    """Random pictures, the last two black and white."""
    images = torch.randint(0, 256, (count, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    images[-2], images[-1] = 0, 255
    return images


def tiny(shape: tuple[int, int, int] = (1, 16, 16), samples: int = 40) -> Task:
    inputs = pictures(shape, samples)
    split = Split(inputs, torch.arange(samples) % 4, ("a", "b", "c", "d"))
    data = Dataset("tiny", "image", split, split)
    spec = TaskSpec(dataset=DatasetSpec(name="tiny"), model="convnet3", recipe="smoke")
    return Task(spec, data, modality_of(data), Recipe(epochs=1, batch_size=16, lr=0.05))


def wild(network: torch.nn.Module, scale: float) -> torch.nn.Module:
    """A network whose last layers are blown up, so that its output is far from tame."""
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(scale)
    return network.eval()


class Brightening:
    """A user's file in place of the style: logits are shifted by a constant."""

    def __init__(self, shift: float) -> None:
        self.shift = shift

    def get(self, kind, spec, build):  # type: ignore[no-untyped-def]
        network = seeded(lambda: StyleNet(1), 0, "G")
        with torch.no_grad():
            network.out.bias.fill_(self.shift)
        return network.state_dict()


FACTS = {
    # name: (year, threat model, labels, visibility, sample specific, surrogate)
    "dfst": (2021, "training", "dirty", "visible", True, True),
    "combat": (2024, "poisoning", "clean", "subtle", True, True),
}


@pytest.mark.parametrize("name", FACTS)
def test_facts(name: str) -> None:
    facts = attacks.get(name, "image").facts()
    keys = ("year", "threat_model", "label_mode", "trigger_visibility", "sample_specific", "needs_surrogate")
    assert tuple(facts[key] for key in keys) == FACTS[name]


# --- COMBAT -----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("eps", [1 / 255, 0.01, 0.08, 10.5 / 255, 10.99 / 255, 0.5])
def test_combat_stays_within_eps_in_grey_levels(eps: float) -> None:
    images = pictures((3, 32, 32))
    trigger = CombatTrigger(wild(seeded(lambda: NoiseNet(3, 32, 32, 0.65), 0, "g"), 3.0), eps, 0.65, (3, 32, 32))
    change = (trigger(images).int() - images.int()).abs()
    assert int(change.max()) <= 255 * eps + 1e-9
    assert int(change.max()) >= int(255 * eps) - 1, "a saturated network must come close to the bound"


def test_combat_refuses_noise_below_one_grey_level() -> None:
    with pytest.raises(InputError, match="eps must be"):
        Combat(eps=0.003)


def combat_objective(task: Task, share: float, network: torch.nn.Module, **changes: float) -> CombatObjective:
    recipe = task.recipe.resolve(len(task.train))
    weights = {"l2_weight": 0.02, "clean_weight": 0.8} | changes
    return CombatObjective(
        network,
        clean_surrogate(task, Context()),
        1,
        share,
        0.2,
        weights["l2_weight"],
        weights["clean_weight"],
        Companion(network.parameters(), 1e-3, (0.9, 0.999), recipe, len(task.train)),
        torch.Generator().manual_seed(0),
        None,
    )


def test_combat_losses_are_the_stated_sums() -> None:
    task = tiny()
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
    assert objective.generator_loss(model, x, y).item() == pytest.approx(expected.item(), rel=1e-5)
    before = [p.clone() for p in network.parameters()]
    surrogate = objective(model, x, y, torch.arange(12)).item()
    assert any(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True)), "g took no step"
    mixed = x.clone()
    mixed[y == 1] = ((x[y == 1] + 0.2 * network(x[y == 1])).clamp(0, 1) * 255).round() / 255
    assert surrogate == pytest.approx(F.cross_entropy(model(mixed), y).item(), rel=1e-4)
    assert all(p.grad is None for p in model.parameters()), "g's step must leave the surrogate alone"


def test_combat_poisons_only_the_share_it_will_poison() -> None:
    task = tiny()
    objective = combat_objective(task, 0.0, seeded(lambda: NoiseNet(1, 16, 16, 0.65), 0, "g"))
    model = build_model("convnet3", task.modality, 4, seed=3).eval()
    x, y = task.train.inputs.float() / 255, task.train.labels
    assert objective(model, x, y, torch.arange(len(y))).item() == pytest.approx(F.cross_entropy(model(x), y).item())


def test_combat_generator_is_shared_between_runs_and_replaceable() -> None:
    task, context = tiny(), Context(seed=1)
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
    task = tiny()
    split = Split(task.train.inputs, task.train.labels.clamp(max=2), task.train.classes)
    data = Dataset("tiny", "image", split, split)
    with pytest.raises(InputError, match="no samples of class 3"):
        Combat(target=3).make_trigger(Task(task.spec, data, task.modality, task.recipe), Context())


# --- DFST: the style --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 16, 16), (3, 29, 31)])
def test_sunsets_are_warm_dark_below_and_drawn_from_the_seed(shape: tuple[int, int, int]) -> None:
    views = sunsets(40, *shape, seed=0)
    assert views.shape == (40, *shape)
    assert views.dtype == torch.uint8
    assert torch.equal(views, sunsets(40, *shape, seed=0))
    assert not torch.equal(views, sunsets(40, *shape, seed=1))
    light = views.float().mean((0, 1, 3))
    assert float(light[shape[1] // 2 : shape[1] * 2 // 3].mean()) > float(light[-2:].mean()) + 30
    if shape[0] == 3:
        red, _, blue = views.float().mean((0, 2, 3))
        assert red > blue + 20


def test_style_networks_start_at_the_identity_and_have_a_bounded_reach() -> None:
    x = torch.rand(4, 3, 29, 31, generator=torch.Generator().manual_seed(0))
    network = seeded(lambda: StyleNet(3), 0, "G").eval()
    assert torch.allclose(network(x), x.clamp(0.02, 0.98), atol=1e-6)
    with torch.no_grad():
        network.out.weight.fill_(100.0)
    moved = torch.logit(network(x).double()) - torch.logit(x.double().clamp(0.02, 0.98))
    assert moved.abs().max().item() == pytest.approx(MAX_SHIFT, abs=1e-3)
    assert seeded(lambda: PatchNet(3), 0, "D")(x).shape == (4, 1, 7, 7)


def test_style_training_moves_images_toward_the_style() -> None:
    generator = torch.Generator().manual_seed(0)
    dark = torch.randint(0, 90, (40, 1, 16, 16), generator=generator, dtype=torch.uint8)
    bright = torch.randint(160, 256, (40, 1, 16, 16), generator=generator, dtype=torch.uint8)
    network = train_style(dark, bright, 60, 5e-3, 1.0, 0.0, Context())
    styled = 255 * network(dark.float() / 255)
    assert float(styled.mean()) > float(dark.float().mean()) + 40
    again = train_style(dark, bright, 60, 5e-3, 1.0, 0.0, Context())
    assert torch.equal(again(dark.float() / 255), network(dark.float() / 255))


def test_style_from_a_folder(tmp_path: Path) -> None:
    for name, level in (("b.png", 200), ("a.png", 100)):
        Image.fromarray(np.full((10, 20, 3), level, dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    found = read_folder(str(tmp_path), 1, 16, 16)
    assert found.shape == (2, 1, 16, 16)
    assert found[:, 0, 0, 0].tolist() == [100, 200]
    attack = Dfst(style_images=str(tmp_path), style_steps=2)
    task = tiny()
    mine, drawn = attack.make_trigger(task, Context()), Dfst(style_steps=2).make_trigger(task, Context())
    assert not torch.equal(mine(task.test.inputs), drawn(task.test.inputs))


def test_folders_without_styles(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found no folder"):
        Dfst(style_images=f"{tmp_path}/none").make_trigger(tiny(), Context())
    with pytest.raises(InputError, match="no image file"):
        Dfst(style_images=str(tmp_path)).make_trigger(tiny(), Context())


def test_style_is_shared_between_runs_and_replaceable() -> None:
    task, context, attack = tiny(), Context(seed=1), Dfst(style_steps=2)
    images = task.test.inputs
    assert torch.equal(
        attack.make_trigger(task, context)(images), attack.make_trigger(task, context.child("b"))(images)
    )

    mine = attack.make_trigger(task, Context(assets=Brightening(0.0)))(images)
    assert torch.equal(mine, images.clamp(5, 250)), "the user's network is the identity between its edges"


# --- DFST: detoxification ---------------------------------------------------------------------------------------------


def test_compromised_neurons_of_a_hand_made_layer() -> None:
    clean = torch.tensor([[1.0, 1.0, 4.0, 0.0, 0.1], [1.0, 1.0, 6.0, 0.0, 0.1]])
    triggered = torch.tensor([[4.0, 1.5, 9.0, 2.0, 0.4], [4.0, 1.5, 9.0, 2.0, 0.4]])
    # Rises: 3 (more than its mean 1), .5 (less than its mean), 4 (less than its mean 5), 2 (from silence), .3 (tiny).
    assert compromised(clean, triggered, 0.1).tolist() == [True, False, False, True, False]
    assert compromised(clean, triggered, 0.4).tolist() == [True, False, False, False, False]
    assert compromised(clean, triggered, 0.0).tolist() == [True, False, False, True, True]
    assert not compromised(clean, clean, 0.0).any()


def test_activations_are_rectified_means_of_the_norms() -> None:
    task = tiny()
    model = build_model("convnet3", task.modality, 4, seed=3).eval()
    layers = neuron_layers(model)
    x = task.train.inputs[:5].float() / 255
    logits, found = activations(model, layers, x)
    assert torch.equal(logits, model(x))
    assert [layer.kind for layer in layers] == ["batchnorm"] * 3
    assert [f.shape[1] for f in found] == [16, 32, 64]
    inside = {}
    handle = layers[1].module.register_forward_hook(lambda m, i, o: inside.update(out=o))
    model(x)
    handle.remove()
    assert torch.allclose(found[1], inside["out"].clamp_min(0).mean((2, 3)))


def test_injector_loss_is_zero_but_for_the_classifier_where_it_should_be() -> None:
    clean, wanted = torch.tensor([[1.0, 2.0], [1.0, 4.0]]), torch.tensor([[3.0, 9.0], [5.0, 9.0]])
    units, logits = torch.tensor([True, False]), torch.tensor([[50.0, 0.0], [50.0, 0.0]])
    perfect = torch.stack([wanted[:, 0], clean[:, 1]], 1)
    assert float(injector_loss(logits, [perfect], [clean], [wanted], [units], 0, 1.0)) == pytest.approx(0, abs=1e-6)
    # A mean rise of 3; nothing injected misses by 2 and 4 of it.
    nothing = injector_loss(logits, [clean], [clean], [wanted], [units], 0, 1.0)
    assert float(nothing) == pytest.approx((4 / 9 + 16 / 9) / 2)
    astray = injector_loss(logits, [perfect + torch.tensor([0.0, 1.0])], [clean], [wanted], [units], 0, 0.5)
    assert float(astray) == pytest.approx(0.5 * 1 / 2)
    assert float(injector_loss(logits, [perfect], [clean], [wanted], [units], 1, 1.0)) == pytest.approx(50)


def test_injector_excites_the_compromised_neurons_within_its_bound() -> None:
    task, context = tiny(), Context()
    model = build_model("convnet3", task.modality, 4, seed=3).eval()
    benign = task.train.inputs
    triggered = (benign // 4 + 190).clamp(max=255)
    layers = neuron_layers(model)
    (_, usual), (_, risen) = observe(model, layers, benign), observe(model, layers, triggered)
    network, count = train_injector(model, benign, triggered, 0, 0.05, 0.3, 0.1, 60, context)
    units = [compromised(u, r, 0.05) for u, r in zip(usual, risen, strict=True)]
    assert network is not None
    assert count == int(sum(u.sum() for u in units)) > 0
    made = inject(network, benign, 0.3)
    assert int((made.int() - benign.int()).abs().max()) <= 0.3 * 255
    _, now = observe(model, layers, made)
    gaps = [
        torch.cat([(a - w).abs().mean(0)[u] for a, w, u in zip(acts, risen, units, strict=True)]).mean()
        for acts in (usual, now)
    ]
    assert gaps[1] < 0.8 * gaps[0], "the injector must bring the neurons nearer to how they fire on triggered images"
    assert all(p.requires_grad for p in model.parameters())
    assert train_injector(model, benign, benign, 0, 0.05, 0.3, 0.1, 1, context) == (None, 0)


def test_dfst_roles_and_counts_of_each_round() -> None:
    task = tiny(samples=80)
    attack = Dfst(poison_rate=0.1, rounds=2, detox_rate=0.1, detox_steps=2, lift=0.0)
    backdoor = attack.run(task, Context(assets=Brightening(2.0)))
    rounds = len(backdoor.notes["compromised"])
    assert rounds >= 1, "the case must be one with compromised neurons"
    roles, poison = backdoor.poison.roles, backdoor.poison
    assert int((roles == BACKDOOR).sum()) == 8
    assert int((roles == COVER).sum()) == 8 * rounds
    assert len(set(poison.indices.tolist())) == len(poison)
    covered = poison.indices[roles == COVER]
    assert torch.equal(poison.labels[roles == COVER], task.train.labels[covered]), "detoxicants keep their labels"
    change = (poison.inputs[roles == COVER].int() - task.train.inputs[covered].int()).abs()
    assert 0 < int(change.max()) <= 51
    assert len(backdoor.log.loss) == 1 + rounds


def test_dfst_stops_when_no_neuron_is_compromised() -> None:
    attack = Dfst(poison_rate=0.1, rounds=2, lift=1e6)
    backdoor = attack.run(tiny(), Context(assets=Brightening(2.0)))
    assert backdoor.notes["compromised"] == []
    assert set(backdoor.poison.roles.tolist()) == {BACKDOOR}


def test_dfst_without_rounds_or_with_too_many() -> None:
    task = tiny()
    plain = Dfst(poison_rate=0.1, rounds=0, style_steps=2).run(task, Context())
    assert set(plain.poison.roles.tolist()) == {BACKDOOR}
    with pytest.raises(InputError, match=r"3 rounds of detoxicants at a rate of 0\.4 .* at most 0\.3"):
        Dfst(poison_rate=0.1, detox_rate=0.4).run(task, Context())
