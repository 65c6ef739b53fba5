"""I-BAU: its hypergradient against finite differences, its perturbation, and its effect."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backdoorlab.attacks import Backdoor
from backdoorlab.core.errors import NotApplicable
from backdoorlab.data.split import Split
from backdoorlab.defenses import DefenderView, defenses
from backdoorlab.defenses.common.perturbation import scaled_norm, shifted, valid_range, within_norm
from backdoorlab.defenses.repair.ibau import ImplicitUnlearning, Universal, hypergradient
from backdoorlab.modalities.audio import AudioModality
from backdoorlab.models import build_model
from backdoorlab.tasks import Task
from backdoorlab.testing import tiny_task
from backdoorlab.training import Context
from backdoorlab.training.batches import Batch
from effect_tools import Numbers, blended, case, effects, least, most, repaired

WEIGHTS = torch.tensor([0.7, -0.4, 0.3], dtype=torch.float64)
PULL = torch.tensor([[1.0, 0.2, -0.3], [0.1, 0.8, 0.5]], dtype=torch.float64)


def inner(delta: Tensor, w: Tensor) -> Tensor:
    """Strictly convex in delta, with a minimum that has no closed form."""
    return (delta**2).sum() + 0.1 * (delta**4).sum() + (delta * (PULL @ torch.tanh(w))).sum()


def outer(delta: Tensor, w: Tensor) -> Tensor:
    return (torch.sin(delta).sum() + 1) ** 2 + (delta[0] * w[1]) + (w**3).sum()


def minimum(w: Tensor) -> Tensor:
    delta = torch.zeros(2, dtype=torch.float64)
    for _ in range(500):
        delta = delta.detach().requires_grad_()
        (slope,) = torch.autograd.grad(inner(delta, w), delta)
        delta = delta - 0.2 * slope
    return delta.detach()


def test_the_hypergradient_is_that_of_the_outer_loss_at_the_inner_minimum() -> None:
    w = WEIGHTS.clone().requires_grad_()
    (found,) = hypergradient(
        lambda d: inner(d, w), lambda d: outer(d, w), minimum(WEIGHTS), [w], lr=0.2, iterations=200
    )
    steps = 1e-5 * torch.eye(3, dtype=torch.float64)
    expected = [
        float(outer(minimum(WEIGHTS + e), WEIGHTS + e) - outer(minimum(WEIGHTS - e), WEIGHTS - e)) / 2e-5 for e in steps
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-7)
    (direct,) = torch.autograd.grad(outer(minimum(WEIGHTS), w), w)
    assert float((found - direct).norm()) > 0.1, "else the implicit part would not be tested"


def test_a_series_that_does_not_converge_ends_at_its_smallest_term() -> None:
    """Inner losses that are concave in delta have no minimum; five terms would drown the direct gradient."""
    w = WEIGHTS.clone().requires_grad_()
    start = torch.tensor([0.3, -0.2], dtype=torch.float64)
    gradients = [
        hypergradient(lambda d: -inner(d, w), lambda d: outer(d, w), start, [w], lr=0.2, iterations=n)[0]
        for n in (1, 5)
    ]
    torch.testing.assert_close(*gradients)


def test_unused_parameters_get_a_gradient_of_zero() -> None:
    unused = torch.ones(2, dtype=torch.float64, requires_grad=True)
    w = WEIGHTS.clone().requires_grad_()
    found = hypergradient(
        lambda d: inner(d, w), lambda d: outer(d, w), minimum(WEIGHTS), [w, unused], lr=0.2, iterations=3
    )
    assert torch.equal(found[1], torch.zeros(2, dtype=torch.float64))


def test_perturbed_inputs_stay_valid_and_bounds_follow_the_size_of_the_input() -> None:
    inputs = torch.tensor([[0.1, 0.9], [0.5, 0.5]])
    torch.testing.assert_close(
        shifted(inputs, torch.tensor([-0.3, 0.3]), (0.0, 1.0)), torch.tensor([[0.0, 1.0], [0.2, 0.8]])
    )
    assert scaled_norm(3.0, torch.zeros(3, 32, 32)) == pytest.approx(3.0)
    assert scaled_norm(3.0, torch.zeros(3, 64, 64)) == pytest.approx(6.0)
    bounded = within_norm(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 1.0)
    torch.testing.assert_close(bounded, torch.tensor([[0.6, 0.8], [0.3, 0.4]]))


def test_the_search_raises_the_loss(badnets_digits: Backdoor, digits_task: Task) -> None:
    model, method = badnets_digits.model, ImplicitUnlearning()
    inputs = model.modality.prepare(digits_task.train.inputs[:64])
    batch = Batch((inputs,), digits_task.train.labels[:64], torch.arange(64))
    universal = Universal(method, model, inputs[:1])
    losses = [float(universal(batch)) for _ in range(6)]
    assert losses[-1] < losses[0] - 0.05
    assert universal.delta.shape == inputs[:1].shape and torch.isfinite(universal.delta).all()
    assert all(p.requires_grad for p in model.parameters())


def test_recurrent_layers_have_second_derivatives() -> None:
    model = build_model("audio_lstm", AudioModality(8000, 2000), 2)
    clips = torch.randint(-3000, 3000, (8, 2000), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    clean = Split(clips, torch.arange(8) % 2, ("a", "b"))
    method = ImplicitUnlearning(rounds=1, batch_size=8)
    repaired_model = method.apply(DefenderView(model=model, clean=clean), Context()).model  # type: ignore[union-attr]
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), repaired_model.parameters(), strict=True))


def test_discrete_inputs_are_refused_with_a_reason() -> None:
    task = tiny_task("text")
    with pytest.raises(NotApplicable, match=r"ibau adds perturbations to inputs; those of a text model are discrete"):
        valid_range("ibau", task.build_model(Context()))
    assert "text" not in defenses.get("ibau", "image").modalities


@case("defense/repair/ibau", asr_lost=least(0.25), acc_lost=most(0.1), benign_lost=most(0.07))
def effect_of_ibau(seed: int) -> Numbers:
    return repaired(seed, ImplicitUnlearning(), harmless=True)


@case("defense/repair/ibau/blended", asr_lost=least(0.4), acc_lost=most(0.1))
def effect_of_ibau_on_blended(seed: int) -> Numbers:
    return repaired(seed, ImplicitUnlearning(), backdoor=blended(seed))


test_effect = effects(__name__)
