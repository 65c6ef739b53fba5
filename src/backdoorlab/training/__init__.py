"""The one training loop, its recipes, the evaluation pass, and the context in which a stage runs."""

from backdoorlab.training.batches import Batch
from backdoorlab.training.blueprint import Blueprint
from backdoorlab.training.context import Context, Reporter
from backdoorlab.training.evaluate import predict, predict_features
from backdoorlab.training.log import FitLog
from backdoorlab.training.loop import Descent, Objective, cross_entropy, fit
from backdoorlab.training.recipes import Recipe, recipe_for, recipes
from backdoorlab.training.steps import Step, run_steps

__all__ = [
    "Batch",
    "Blueprint",
    "Context",
    "Descent",
    "FitLog",
    "Objective",
    "Recipe",
    "Reporter",
    "Step",
    "cross_entropy",
    "fit",
    "predict",
    "predict_features",
    "recipe_for",
    "recipes",
    "run_steps",
]
