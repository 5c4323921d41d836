"""Benchmarks draw from seeds what they drew when their rows were measured."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from molehunt.attacks import Attack, BadNets, Blended
from molehunt.runner import generator
from molehunt.tasks import TASKS, Task
from molehunt.triggers import Patch

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Import a benchmark by its name, as if it were run from its folder."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    # Their names are everyday words; nobody else shall find them.
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == FOLDER:
            del sys.modules[name]


def square_mask(task: Task, size: int, rng: torch.Generator) -> Tensor:
    _, height, width = task.shape
    top = int(torch.randint(height - size + 1, (1,), generator=rng))
    left = int(torch.randint(width - size + 1, (1,), generator=rng))
    mask = torch.zeros(1, height, width)
    mask[:, top : top + size, left : left + size] = 1.0
    return mask


@pytest.mark.parametrize("task", [TASKS["mnist"], TASKS["cifar10"]], ids=lambda task: task.name)
@pytest.mark.parametrize("number", range(9))
def test_the_planted_models_of_a_population(task: Task, number: int, script: Callable[[str], Any]) -> None:
    rng = generator(40_000 + number, "population attack")
    target = int(torch.randint(task.num_classes, (1,), generator=rng))
    mask = square_mask(task, int(torch.randint(2, 6, (1,), generator=rng)), rng)
    pattern = torch.rand(task.shape, generator=rng).round() * mask
    drawn: Attack = script("populations").attack(task, number)
    if number % 3 == 1:
        assert isinstance(drawn, Blended)
        assert drawn.target == target
        return
    assert isinstance(drawn, BadNets)
    assert drawn.target == (target if number % 3 == 0 else "all")
    assert isinstance(drawn.trigger, Patch)
    assert torch.equal(drawn.trigger.mask, mask)
    assert torch.equal(drawn.trigger.pattern, pattern)


@pytest.mark.parametrize("seed", range(20_000, 20_010))
def test_the_models_on_which_neural_cleanse_is_measured(seed: int, script: Callable[[str], Any]) -> None:
    task, rng = TASKS["cifar10"], generator(seed, "neural cleanse benchmark")
    mask = square_mask(task, 3, rng)
    color = torch.rand(3, 1, 1, generator=rng)
    target = int(torch.randint(10, (1,), generator=rng))
    drawn = script("neural_cleanse").draw(task, seed)
    assert (drawn.target, drawn.poison_rate) == (target, 0.05)
    assert torch.equal(drawn.trigger.mask, mask)
    assert torch.equal(drawn.trigger.pattern, color * mask)
