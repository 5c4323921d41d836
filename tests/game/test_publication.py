"""What a published game says of itself; the rest of a publication is tested with a whole game in test_host."""

import pytest

from molehunt.calibration import Population, Reference
from molehunt.game.publication import certainty


def population(clean: int, planted: int) -> Population:
    models = [Reference(seed=i, attack=None if i < clean else "BadNets") for i in range(clean + planted)]
    return Population(task="mnist", network="badnets_cnn", models=tuple(models))


@pytest.mark.parametrize(
    ("clean", "planted", "says"),
    [
        (5, 0, "p lies between 0.29 and 0.76 whatever the defenses say: no model can be called found, and none clear."),
        (8, 0, "p lies between 0.29 and 0.81 whatever the defenses say: no model can be called clear."),
        (5, 2, "so no verdict can be surer than that many models allow."),
        (0, 0, "so no verdict can be surer than that many models allow."),
    ],
)
def test_it_says_how_sure_anybody_can_be(clean: int, planted: int, says: str) -> None:
    assert certainty(population(clean, planted)).endswith(says)
