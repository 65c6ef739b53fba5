"""MCR: the path between two models, the choice of a point on it, and its effect."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from backdoorlab.attacks import Backdoor
from backdoorlab.data.sources import balanced_subset
from backdoorlab.data.split import Split
from backdoorlab.defenses import DefenderView
from backdoorlab.defenses.repair import mcr
from backdoorlab.defenses.repair.mcr import ModeConnectivityRepair, along, shares, weights_of
from backdoorlab.models import Classifier
from backdoorlab.tasks import Task
from backdoorlab.training import Context
from effect_tools import Numbers, blended, case, effects, least, most, repaired


def three(seed: int = 0) -> tuple[dict[str, Tensor], ...]:
    draw = torch.Generator().manual_seed(seed)
    return tuple({"a": torch.randn(2, 3, generator=draw), "b": torch.randn(4, generator=draw)} for _ in range(3))


@pytest.mark.parametrize("curve", ["bezier", "polygon"])
def test_the_path_begins_and_ends_at_the_two_models(curve: str) -> None:
    start, bend, end = three()
    for t, expected in ((0.0, start), (1.0, end)):
        for name, value in along(start, bend, end, t, curve).items():
            torch.testing.assert_close(value, expected[name])
    for t in (0.1, 0.5, 0.8):
        assert float(sum(torch.as_tensor(s) for s in shares(t, curve))) == pytest.approx(1)


def test_points_between_the_ends_by_hand() -> None:
    start, bend, end = three()
    point = along(start, bend, end, 0.25, "bezier")["a"]
    torch.testing.assert_close(point, 0.5625 * start["a"] + 0.375 * bend["a"] + 0.0625 * end["a"])
    torch.testing.assert_close(along(start, bend, end, 0.5, "polygon")["b"], bend["b"])
    torch.testing.assert_close(along(start, bend, end, 0.25, "polygon")["b"], (start["b"] + bend["b"]) / 2)
    torch.testing.assert_close(along(start, bend, end, 0.75, "polygon")["b"], (bend["b"] + end["b"]) / 2)


def test_the_gradient_by_the_bend_is_its_share_of_that_by_the_weights() -> None:
    start, bend, end = three()
    bend["a"].requires_grad_()
    (along(start, bend, end, 0.3, "bezier")["a"] ** 2).sum().backward()
    at = along(start, bend, end, 0.3, "bezier")["a"].detach()
    torch.testing.assert_close(bend["a"].grad, 2 * 0.3 * 0.7 * 2 * at)


@pytest.fixture(scope="module")
def clean(digits_task: Task) -> Split:
    return balanced_subset(digits_task.train, 60, 0, "digits training set")


def test_statistics_are_those_of_the_clean_samples_at_the_point(badnets_digits: Backdoor, clean: Split) -> None:
    model = badnets_digits.model
    weights = weights_of(model)
    found = ModeConnectivityRepair().at(model, weights, weights, weights, 0.4, clean)
    for name, value in found.named_parameters():
        torch.testing.assert_close(value.detach(), weights[name])
    seen: list[Tensor] = []
    norm = next(m for m in found.modules() if isinstance(m, _BatchNorm))
    handle = norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        found(found.modality.prepare(clean.inputs))
    handle.remove()
    torch.testing.assert_close(norm.running_mean, seen[0].mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    old = next(m for m in model.modules() if isinstance(m, _BatchNorm)).running_mean
    assert not torch.allclose(norm.running_mean, old, rtol=1e-3), "else nothing was estimated anew"


def test_the_furthest_point_that_clean_samples_allow_is_taken(
    badnets_digits: Backdoor, clean: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right answers of 60: 60 up to t = 0.6, then fewer."""
    model, weights = badnets_digits.model, weights_of(badnets_digits.model)
    right = {0.7: 59, 0.8: 57, 0.9: 30}
    monkeypatch.setattr(ModeConnectivityRepair, "at", lambda self, *args: args[4])

    def answers(t: float, inputs: Tensor) -> Tensor:
        said = clean.labels.clone()
        said[right.get(t, 60) :] = (said[right.get(t, 60) :] + 1) % 10
        return torch.nn.functional.one_hot(said, 10).float()

    monkeypatch.setattr(mcr, "predict", answers)

    def chosen(tolerance: float) -> float:
        return ModeConnectivityRepair(tolerance=tolerance).choose(model, weights, weights, weights, clean, clean)

    assert [chosen(0.0), chosen(0.02), chosen(0.05), chosen(0.5)] == [0.7, 0.7, 0.8, 0.9]


def test_at_the_beginning_of_the_path_lies_the_suspicious_model(badnets_digits: Backdoor, clean: Split) -> None:
    view = DefenderView(model=badnets_digits.model, clean=clean)
    method = ModeConnectivityRepair(epochs=1, curve_epochs=1, batch_size=24, t=0.0)
    repaired_model: Classifier = method.apply(view, Context()).model  # type: ignore[union-attr]
    for mine, theirs in zip(repaired_model.parameters(), badnets_digits.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


@case("defense/repair/mcr", asr_lost=least(0.7), acc_lost=most(0.07), benign_lost=most(0.08))
def effect_of_mcr(seed: int) -> Numbers:
    return repaired(seed, ModeConnectivityRepair(), harmless=True)


@case("defense/repair/mcr/blended", asr_lost=least(0.3), acc_lost=most(0.07))
def effect_of_mcr_on_blended(seed: int) -> Numbers:
    return repaired(seed, ModeConnectivityRepair(), backdoor=blended(seed))


test_effect = effects(__name__)
