"""Fine-tuning: its recipe and its effect."""

from __future__ import annotations

import pytest
import torch

from backdoorlab.core.errors import BackdoorLabError
from backdoorlab.defenses import DefenderView, RepairDefense
from backdoorlab.defenses.common.finetuning import batch_for, finetuning_recipe
from backdoorlab.defenses.repair.ft import FineTuning
from backdoorlab.tasks import Task
from backdoorlab.testing import tiny_task
from backdoorlab.training import Context
from effect_tools import Numbers, blended, case, effects, least, most, repaired


def view_of(task: Task, *, known: bool, samples: int = 40) -> DefenderView:
    return DefenderView(
        model=task.build_model(Context()),
        clean=task.train[torch.arange(samples)],
        blueprint=task.blueprint if known else None,
    )


def test_optimiser_and_rate_are_those_of_the_training_where_it_is_known() -> None:
    task = tiny_task("image")
    recipe = FineTuning(epochs=7).recipe(view_of(task, known=True))
    trained = task.blueprint.recipe
    assert (recipe.optimizer, recipe.lr, recipe.clip) == (trained.optimizer, trained.lr, trained.clip)
    assert (recipe.epochs, recipe.schedule, recipe.min_steps) == (7, "cosine", 0)
    assert trained.lr != 0.01, "else this test could not fail"
    assert FineTuning(lr=0.03).recipe(view_of(task, known=True)).lr == 0.03


@pytest.mark.parametrize(("modality", "expected"), [("image", ("sgd", 0.01)), ("text", ("adamw", 0.001))])
def test_without_a_blueprint_the_rate_follows_the_modality(modality: str, expected: tuple[str, float]) -> None:
    recipe = FineTuning().recipe(view_of(tiny_task(modality), known=False))
    assert (recipe.optimizer, recipe.lr) == expected


def test_a_rate_of_ones_own_is_sgds_and_a_tenth_for_adamw() -> None:
    recipe = FineTuning(lr=0.02).recipe(view_of(tiny_task("text"), known=True))
    assert recipe.optimizer == "adamw" and recipe.lr == pytest.approx(0.002)


def test_few_samples_give_several_steps_an_epoch() -> None:
    assert [batch_for(256, n) for n in (5, 50, 144, 800, 2500)] == [16, 16, 18, 100, 256]
    assert batch_for(8, 2500) == 8


def test_a_blueprint_is_read_only_by_those_that_declare_it() -> None:
    view = view_of(tiny_task("image"), known=True).limited("other", ("model", "clean"))
    assert not view.has("blueprint")
    with pytest.raises(BackdoorLabError, match="declares only: model, clean"):
        view.blueprint  # noqa: B018
    recipe = finetuning_recipe(view, epochs=1, lr=None, batch_size=16, weight_decay=0.0)
    assert recipe.lr == 0.01, "what may not be read must not be used"
    assert view_of(tiny_task("image"), known=True).limited("ft", ("model",), ("blueprint",)).has("blueprint")


def test_an_unknown_part_that_may_be_read_is_refused_when_the_class_is_made() -> None:
    with pytest.raises(TypeError, match="no part 'roles'"):
        type("Wrong", (RepairDefense,), {"may_read": ("roles",)})


@case("defense/repair/ft", asr_lost=least(0.7), acc_lost=most(0.06), benign_lost=most(0.07))
def effect_of_ft(seed: int) -> Numbers:
    return repaired(seed, FineTuning(), harmless=True)


@case("defense/repair/ft/blended", asr_lost=least(0.2), acc_lost=most(0.07))
def effect_of_ft_on_blended(seed: int) -> Numbers:
    return repaired(seed, FineTuning(), backdoor=blended(seed))


test_effect = effects(__name__)
