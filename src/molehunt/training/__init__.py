"""Training: one loop for attacks, reference models and repairs, and the recipes for it."""

from molehunt.training.batches import Stamp
from molehunt.training.objective import Objective
from molehunt.training.recipes import RECIPES, Recipe, recipe_for
from molehunt.training.trainer import Trained, accuracy, train

__all__ = ["RECIPES", "Objective", "Recipe", "Stamp", "Trained", "accuracy", "recipe_for", "train"]
