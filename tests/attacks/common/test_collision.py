"""What feature collisions share: pairs, places, victims with a new head."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from attack_tools import GREY, ODD, bright_task, generator, pictures
from backdoorlab.attacks.common.collision import CollisionAttack, greedy_pairs, retrain_head
from backdoorlab.attacks.common.surrogate import clean_surrogate
from backdoorlab.attacks.image.fc import Fc
from backdoorlab.attacks.image.htba import Htba
from backdoorlab.attacks.poisoning import PoisoningAttack
from backdoorlab.attacks.triggers.patch import PlacedPatchTrigger, corners_from, paste_at
from backdoorlab.core.errors import InputError
from backdoorlab.modalities.filters import expect_images
from backdoorlab.models.anatomy import head
from backdoorlab.training import Context

SHARED = Context()
"""One cache, so that each surrogate is trained once."""


def slow_pairs(distances: Tensor) -> list[int]:
    """Sort all pairs, take the closest whose two ends are free."""
    rows, columns = distances.shape
    order = sorted((float(distances[i, j]), i, j) for i in range(rows) for j in range(columns))
    found: dict[int, int] = {}
    for _, i, j in order:
        if i not in found and j not in found.values():
            found[i] = j
    return [found[i] for i in range(rows)]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 7), (40, 40), (5, 9)])
@pytest.mark.parametrize("ties", [False, True])
def test_pairing_is_the_greedy_one(rows: int, columns: int, ties: bool) -> None:
    for seed in range(5):
        distances = torch.rand(rows, columns, generator=generator(seed))
        distances = (4 * distances).round() if ties else distances
        before = distances.clone()
        found = greedy_pairs(distances)
        assert found.tolist() == slow_pairs(distances)
        assert len(set(found.tolist())) == rows
        assert torch.equal(distances, before)


def test_pairing_of_equal_features() -> None:
    assert greedy_pairs(torch.zeros(4, 4)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("shape", [GREY, ODD])
def test_patch_is_pasted_inside_at_its_place(shape: tuple[int, int, int]) -> None:
    images, patch = pictures(shape, 12), pictures((shape[0], 5, 5), 3)[0]
    share = torch.rand(len(images), 2, generator=generator())
    share[0], share[1] = 0.0, 1 - 2**-24
    corners = corners_from(share, images, patch)
    assert corners[0].tolist() == [0, 0]
    assert corners[1].tolist() == [shape[1] - 5, shape[2] - 5]
    wanted = images.clone()
    for image, (top, left) in zip(wanted, corners.tolist(), strict=True):
        image[:, top : top + 5, left : left + 5] = patch
    assert torch.equal(paste_at(images, patch, corners), wanted)


def test_all_places_are_used() -> None:
    images, patch = torch.zeros(600, 1, 8, 9, dtype=torch.uint8), torch.full((1, 7, 7), 255, dtype=torch.uint8)
    stamped = expect_images(PlacedPatchTrigger(patch, 3)(images))
    assert (stamped.flatten(1) == 255).sum(1).unique().tolist() == [49]
    counts = torch.unique(stamped, dim=0, return_counts=True)[1]
    assert len(counts) == 2 * 3
    assert int(counts.min()) > 60
    assert not torch.equal(expect_images(PlacedPatchTrigger(patch, 4)(images)), stamped)


def test_patch_that_does_not_fit() -> None:
    trigger = PlacedPatchTrigger(torch.zeros(3, 9, 9, dtype=torch.uint8), 0)
    for shape in ((2, 3, 8, 20), (2, 1, 20, 20)):
        with pytest.raises(InputError, match="3 channels and at least 9x9"):
            trigger(torch.zeros(shape, dtype=torch.uint8))
    for attack in (Htba(size=17, poison_rate=0.1), Fc(size=17, poison_rate=0.1)):
        with pytest.raises(InputError, match=f"{attack.name}: .* at most 16"):
            attack.make_trigger(bright_task(), Context())


def test_only_the_head_is_retrained() -> None:
    task, context = bright_task(), SHARED
    model, known = clean_surrogate(task, context), clean_surrogate(task, context)
    log = retrain_head(model, task.train, 1e-3, context, "test")
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, known.state_dict()[name])}
    last = {name for name, module in model.named_modules() if module is head(model)}.pop()
    assert changed == {f"{last}.weight", f"{last}.bias"}
    assert all(p.requires_grad for p in model.parameters())
    assert not model.training
    assert log.loss[-1] < log.loss[0]


@pytest.mark.parametrize("attack", [Htba(poison_rate=0.1, steps=3), Fc(poison_rate=0.1, steps=3)], ids=lambda a: a.name)
def test_victim_from_scratch_is_another_network(attack: PoisoningAttack) -> None:
    task, context = bright_task(), SHARED
    tuned = attack.run(task, context)
    fresh = dataclasses.replace(attack, victim="scratch").run(task, context)  # type: ignore[call-arg]
    assert torch.equal(tuned.poison.inputs, fresh.poison.inputs)  # type: ignore[arg-type]
    weight = next(iter(clean_surrogate(task, context).state_dict()))
    assert torch.equal(tuned.model.state_dict()[weight], clean_surrogate(task, context).state_dict()[weight])
    assert not torch.equal(fresh.model.state_dict()[weight], tuned.model.state_dict()[weight])
    assert (tuned.notes["victim"], fresh.notes["victim"]) == ("finetune", "scratch")


@pytest.mark.parametrize("attack", [Htba(poison_rate=0.1, steps=3), Fc(poison_rate=0.1, steps=3)], ids=lambda a: a.name)
def test_decay_of_the_new_head_is_the_recipes_unless_given(attack: CollisionAttack) -> None:
    task = bright_task()
    heads = [
        head(dataclasses.replace(attack, head_decay=decay).run(task, SHARED).model).weight.detach()
        for decay in (None, task.recipe.weight_decay, 0.0, 10.0)
    ]
    assert torch.equal(heads[0], heads[1])
    norms = [float(weight.norm()) for weight in heads]
    assert norms[3] < norms[0] < norms[2]
