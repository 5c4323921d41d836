"""Training: one loop for attacks, reference models and repairs, and the recipes for it."""

from molehunt.training.batches import Stamp
from molehunt.training.recipes import RECIPES, Recipe, recipe_for
from molehunt.training.trainer import Trained, accuracy, train

__all__ = ["RECIPES", "Recipe", "Stamp", "Trained", "accuracy", "recipe_for", "train"]
