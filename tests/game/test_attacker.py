"""The attacker's side: the example teams keep the rules on every task, and what records say of an attack is true."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from molehunt.attacks import ATTACKS, BadNets, poison
from molehunt.game.attacker import Team, describe, make_attack, teams
from molehunt.game.budget import budget
from molehunt.game.rules import BOARDS, Board, Limits
from molehunt.game.training_set import TrainingSet
from molehunt.tasks import TASKS, Images, Task


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_described_attack_goes_by_its_name_and_lists_every_setting(name: str) -> None:
    words = describe(make_attack(name, {}))
    assert words.pop("attack") == name
    assert words.keys() == {f.name for f in fields(ATTACKS[name])}  # type: ignore[arg-type]  # attacks are dataclasses


PAIR = replace(TASKS["mnist"], name="folder:pair", classes=("cat", "dog"))
"""The fewest classes that a folder may have."""


def training_split(task: Task, count: int) -> Images:
    """Random pictures; of many classes the commonest has ten times as many as the rarest, as with traffic signs."""
    most = 1.0 if task.num_classes > 2 else 0.0
    common = torch.logspace(0, most, task.num_classes)[torch.randperm(task.num_classes, generator=rng(1))]
    y = torch.multinomial(common, count, replacement=True, generator=rng(2))
    return Images(torch.rand(count, *task.shape, generator=rng(3)), y)


def drawn(task: Task, clean: Images, board: Board, seed: int, count: int = 7) -> tuple[Team, ...]:
    with pytest.MonkeyPatch.context() as patch:
        # No data is fetched: what is drawn may depend on nothing but the labels.
        patch.setattr(Task, "load", lambda *_: clean)
        return teams(task, count, rng(seed), board)


@pytest.mark.parametrize("board", BOARDS)
@pytest.mark.parametrize("task", [*TASKS.values(), PAIR], ids=lambda task: task.name)
def test_every_team_keeps_the_rules_on_every_task(task: Task, board: Board) -> None:
    # A count of which a twentieth is rounded up, so that twice of it would be more than a tenth.
    clean = training_split(task, 1030)
    for seed in range(3):
        found = drawn(task, clean, board, seed)
        assert [team.name for team in found if team.attack is None] == ["Honest Abe", "Plain Jane"]
        for team in found:
            if team.attack is None:
                continue
            made = poison(team.attack, clean, task, rng(seed))
            print_ = made.trigger.footprint()
            assert budget(print_, task.shape).passed, f"{team.name} shows too much: {print_}"
            assert bool(made.altered.any())
            if board == "data":
                handed = TrainingSet.of(made, clean, rng(seed))
                assert handed.changes(clean).altered <= Limits().rows(len(clean.y))


def test_teams_come_again_with_other_names_and_targets() -> None:
    task = TASKS["cifar10"]
    found = drawn(task, training_split(task, 1000), "weights", 0, count=16)
    assert len({team.name for team in found}) == 16
    assert found[7].name == "Yellow Square 2"
    assert found[14].name == "Yellow Square 3"


def test_a_double_agent_has_two_sources_of_ten_and_more_where_classes_are_rare() -> None:
    def sources(name: str, board: Board) -> Any:
        task = TASKS[name]
        y = torch.arange(4300) % task.num_classes
        attack = drawn(task, Images(torch.zeros(4300, 1), y), board, 5)[5].attack
        assert isinstance(attack, BadNets)
        return attack.sources

    assert len(sources("cifar10", "weights")) == 2
    assert len(sources("cifar10", "data")) == 2
    assert len(sources("gtsrb", "weights")) == 7, "three in twenty rows are of them, and two of the three get poisoned"
    assert len(sources("gtsrb", "data")) == 4


def test_no_team_is_refused() -> None:
    with pytest.raises(ValueError, match="a game needs at least one team, got 0"):
        teams(TASKS["mnist5k"], 0, rng())
