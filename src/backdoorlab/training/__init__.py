"""The one training loop, its recipes, the evaluation pass, and the context in which a stage runs."""

from backdoorlab.training.blueprint import Blueprint
from backdoorlab.training.context import Context, Reporter
from backdoorlab.training.evaluate import predict, predict_features
from backdoorlab.training.loop import FitLog, Objective, cross_entropy, fit
from backdoorlab.training.recipes import Recipe, recipe_for, recipes

__all__ = [
    "Blueprint",
    "Context",
    "FitLog",
    "Objective",
    "Recipe",
    "Reporter",
    "cross_entropy",
    "fit",
    "predict",
    "predict_features",
    "recipe_for",
    "recipes",
]
