"""AGPD: gradients against autograd sample by sample, dispersion and growth against slow loops, where growth ends."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorlab.core.errors import NotApplicable
from backdoorlab.core.seeding import isolated_rng
from backdoorlab.defenses import DefenderView
from backdoorlab.defenses.dataset.agpd import (
    Agpd,
    activation_gradients,
    dispersion,
    grow,
    jensen_shannon,
    last_near,
    layers_of,
    rates,
    smoothest,
)
from backdoorlab.models import Classifier
from backdoorlab.testing import tiny_task
from backdoorlab.training import Context
from effect_tools import PATCH, Numbers, benign, case, clean, effects, least, most, screened, task, victim


def test_gradients_are_those_of_the_labelled_logit_one_sample_at_a_time() -> None:
    model, data = benign(0), task(0).test[torch.arange(5)]
    layers = layers_of(model)
    assert [layer.name for layer in layers] == ["net.body.0", "net.body.4", "net.body.8"]
    found, predicted = activation_gradients(model, data, layers, batch_size=2)
    for i in range(5):
        held: dict[int, Tensor] = {}
        handles = [
            layer.module.register_forward_hook(lambda _m, _i, out, j=j, held=held: held.update({j: out}))
            for j, layer in enumerate(layers)
        ]
        logits = model(data.inputs[i : i + 1].float() / 255)
        for handle in handles:
            handle.remove()
        gradients = torch.autograd.grad(logits[0, int(data.labels[i])], [held[j] for j in range(3)])
        assert int(predicted[i]) == int(logits.argmax())
        for j in range(3):
            assert torch.allclose(found[j][i], gradients[j].mean((2, 3))[0], atol=1e-6)


@pytest.mark.parametrize("modality", ["text", "audio", "video"])
def test_every_modality_has_layers_with_gradients(modality: str) -> None:
    mine = tiny_task(modality)
    model, _ = mine.fit(mine.train, Context(1))
    layers = layers_of(model)
    found, _ = activation_gradients(model, mine.train[torch.arange(4)], layers, 256)
    assert [part.shape for part in found] == [(4, layer.count) for layer in layers]
    assert all(bool(torch.isfinite(part).all()) for part in found)
    assert any(bool(part.any()) for part in found)


def test_a_head_alone_has_no_layer_before_it() -> None:
    model = benign(0)
    with isolated_rng(0):
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 10))
    with pytest.raises(NotApplicable, match="no layer before"):
        layers_of(Classifier(net, model.modality, "linear", 10))


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def vectors(count: int = 30, poison: int = 0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Directions around one axis, the last ``poison`` of them around another; and the clean direction."""
    found = 0.2 * torch.randn(count, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found[:, 0] += 1
    found[count - poison :, 0] -= 1
    found[count - poison :, 1] += 1
    return found, found[: count - poison].mean(0)


def test_dispersion_equals_a_slow_loop() -> None:
    points, axis = vectors(12, 4)
    near = [cosine(v, axis) for v in points]
    seed = near.index(min(near))
    wanted = math.sqrt(sum((near[i] - cosine(points[i], points[seed])) ** 2 for i in range(12)) / 12)
    assert dispersion(points, axis) == (pytest.approx(wanted), seed)
    assert seed >= 8


def test_dispersion_does_not_grow_with_the_class() -> None:
    points, axis = vectors(12, 4)
    assert dispersion(points.repeat(5, 1), axis)[0] == pytest.approx(dispersion(points, axis)[0])


def test_rates_by_hand() -> None:
    points, axis = vectors(10, 3)
    members = torch.arange(10) >= 8
    centre = points[members].mean(0)
    wanted = [(1 - cosine(v, centre)) / (2 - cosine(v, centre) - cosine(v, axis)) for v in points]
    assert rates(points, members, axis).tolist() == pytest.approx(wanted)


def test_growth_equals_a_slow_loop() -> None:
    points, axis = vectors(25, 8)
    seed = dispersion(points, axis)[1]
    joined, inside, number = {seed: 0}, {seed}, 0
    while len(inside) < 25:
        number += 1
        centre = torch.stack([points[i] for i in sorted(inside)]).mean(0)
        rate = {
            i: (1 - cosine(points[i], centre)) / (2 - cosine(points[i], centre) - cosine(points[i], axis))
            for i in range(25)
            if i not in inside
        }
        low, high = min(rate.values()), max(rate.values())
        new = {i for i, r in rate.items() if (r - low) / max(high - low, 1e-12) <= 0.05}
        joined |= dict.fromkeys(new, number)
        inside |= new
    assert grow(points, seed, axis, 0.05).joined.tolist() == [joined[i] for i in range(25)]


def test_a_planted_direction_is_what_grows_until_the_middle() -> None:
    points, axis = vectors(90, 30)
    growth = grow(points, dispersion(points, axis)[1], axis, 0.05)
    members = growth.joined <= last_near(growth.closeness)
    assert members.nonzero().flatten().tolist() == list(range(60, 90))


def test_jensen_shannon_by_hand() -> None:
    a, b = torch.tensor([4.0, 0.0]), torch.tensor([1.0, 1.0])
    middle = (0.75, 0.25)
    wanted = 0.5 * math.log(1 / middle[0]) + 0.5 * (0.5 * math.log(0.5 / middle[0]) + 0.5 * math.log(0.5 / middle[1]))
    assert jensen_shannon(a, b) == pytest.approx(wanted)
    assert jensen_shannon(a, 3 * a) == 0


def test_the_smoothest_window_and_what_is_taken_without_a_whole_one() -> None:
    rough = [1.0, 2.0] * 5
    assert smoothest([*rough, *[0.5] * 10, *rough]) == 11
    assert smoothest([0.3, 0.2]) == 3, "fewer than ten rounds: the last one"
    assert smoothest([]) == 1
    assert last_near([0.1, 0.3, 0.6, 0.2]) == 2
    assert last_near([0.1]) == 1


def test_the_layer_is_that_with_the_largest_index() -> None:
    spread = torch.tensor([[0.1, 0.12, 0.11, 0.09, 0.2, 0.1], [0.1, 0.11, 0.12, 0.9, 0.1, 0.13]], dtype=torch.float64)
    assert Agpd().outliers(spread) == (1, [3])
    assert Agpd(threshold=1000.0).outliers(spread)[1] == []
    assert Agpd(threshold=1000.0, fallback=True).outliers(spread) == (1, [3]), "dispersion above 0.3"
    few = torch.full((2, 6), float("nan"), dtype=torch.float64)
    few[:, :3] = torch.tensor([[0.1, 0.2, 0.1], [0.3, 0.8, 0.2]], dtype=torch.float64)
    assert Agpd().outliers(few) == (1, [0, 1, 2]), "too few classes for an index: all are put through the filter"


def test_without_poison_nothing_is_flagged() -> None:
    view = DefenderView(model=benign(0), suspicious=task(0).train, clean=clean(0))
    assert not Agpd().apply(view, Context(0)).flags.any()


def test_classes_without_clean_samples_are_not_judged() -> None:
    backdoor, owned = victim(0, **PATCH), clean(0)
    data = backdoor.poison.apply(task(0).train).as_seen()
    outcome = Agpd().apply(
        DefenderView(model=backdoor.model, suspicious=data, clean=owned[owned.labels != 0]), Context(0)
    )
    assert bool((outcome.scores[data.labels == 0] == -2).all())
    with pytest.raises(NotApplicable, match="no class has clean samples"):
        wrong = F.one_hot(owned.labels, 10).roll(1, 1).argmax(1)  # no sample is classified as its label
        right = backdoor.model(owned.inputs.float() / 255).argmax(1) != wrong
        Agpd().apply(
            DefenderView(
                model=backdoor.model, suspicious=data, clean=type(owned)(owned.inputs, wrong, owned.classes)[right]
            ),
            Context(0),
        )


@case("defense/dataset/agpd", auroc=least(0.9), tpr=least(0.25), fpr=most(0.02))
def effect_of_agpd(seed: int) -> Numbers:
    return screened(seed, Agpd())


test_effect = effects(__name__)
