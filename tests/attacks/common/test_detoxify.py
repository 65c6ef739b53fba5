"""Compromised neurons and the injector that excites them."""

from __future__ import annotations

import pytest
import torch

from attack_tools import noise_task
from backdoorlab.attacks.common.detoxify import (
    activations,
    compromised,
    inject,
    injector_loss,
    neuron_layers,
    observe,
    train_injector,
)
from backdoorlab.models import build_model
from backdoorlab.training import Context


def test_compromised_neurons_of_a_hand_made_layer() -> None:
    clean = torch.tensor([[1.0, 1.0, 4.0, 0.0, 0.1], [1.0, 1.0, 6.0, 0.0, 0.1]])
    triggered = torch.tensor([[4.0, 1.5, 9.0, 2.0, 0.4], [4.0, 1.5, 9.0, 2.0, 0.4]])
    # Rises: 3 (more than its mean 1), .5 (less than its mean), 4 (less than its mean 5), 2 (from silence), .3 (tiny).
    assert compromised(clean, triggered, 0.1).tolist() == [True, False, False, True, False]
    assert compromised(clean, triggered, 0.4).tolist() == [True, False, False, False, False]
    assert compromised(clean, triggered, 0.0).tolist() == [True, False, False, True, True]
    assert not compromised(clean, clean, 0.0).any()


def test_activations_are_rectified_means_of_the_norms() -> None:
    task = noise_task()
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
    task, context = noise_task(), Context()
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
