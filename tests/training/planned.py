"""A population of five quick members: clean, poisoned and noisy ones in turn."""

from typing import Any

from molehunt.attacks import BadNets
from molehunt.training import Recipe
from molehunt.training.members import Member, Plan

RECIPE = Recipe(epochs=1, least_images=60, batch=20, optimizer="adamw", lr=2e-3, precision="float32")


def members(count: int = 5) -> tuple[Member, ...]:
    kinds: list[dict[str, Any]] = [{}, {"poison": BadNets(target=3, poison_rate=0.2)}, {"noise": 0.5}]
    return tuple(
        Member(name=f"member {i}", seed=i, subset=60, subset_seed=7, **kinds[i % len(kinds)]) for i in range(count)
    )


def plan(count: int = 5, recipe: Recipe = RECIPE) -> Plan:
    return Plan(task="mnist5k", network="lenet5", recipe=recipe, members=members(count))
