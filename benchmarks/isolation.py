"""What an evaluation in a process of its own costs beyond the evaluation.

    python benchmarks/isolation.py

A defense that does nothing is asked about one network of each size, in the sandbox and in this process.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from molehunt import runner
from molehunt.engine import Run
from molehunt.findings import Finding
from molehunt.isolation import Sandbox
from molehunt.networks import build
from molehunt.suspect import Access, Suspect
from molehunt.tasks import TASKS, Images
from record import Figure, spread, write

REPEATS = 21


@dataclass(frozen=True)
class Nothing:
    """Answers at once."""

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset({Access.CLEAN}),)

    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        """Say nothing."""
        return Finding(defense="nothing", score=0.0)


def suspect(task: str, network: str) -> Suspect:
    """A network of random weights with 1 000 clean images, as in a game."""
    rng = torch.Generator().manual_seed(0)
    shape, classes = TASKS[task].shape, TASKS[task].num_classes
    clean = Images(torch.rand(1000, *shape, generator=rng), torch.randint(classes, (1000,), generator=rng))
    return Suspect.of(build(network, shape, classes, rng=rng), TASKS[task], clean=clean)


def main() -> None:
    """Measure and write."""
    # A class of __main__ has no name in another process.
    from isolation import Nothing

    torch.set_num_threads(1)
    figures = {}
    command = "python benchmarks/isolation.py"
    start = time.monotonic()
    with Sandbox(plugins=[Path(__file__).parent], threads=1) as sandbox:
        figures["start"] = Figure(
            value=round(time.monotonic() - start, 2),
            unit="s, once per command",
            goal=None,
            better="lower",
            command=command,
        )
        for task, network, goal in (
            ("mnist", "badnets_cnn", 0.3),
            ("cifar10", "fast_cifar", None),
            ("cifar10", "resnet18", None),
        ):
            asked = suspect(task, network)
            seconds: dict[str, list[float]] = {"sandbox": [], "here": []}
            for _ in range(REPEATS):
                for place, ask in (("sandbox", sandbox.inspect), ("here", runner.inspect)):
                    begin = time.monotonic()
                    outcome = ask(Nothing(), asked, seed=0)
                    seconds[place].append(time.monotonic() - begin)
                    assert isinstance(outcome, Finding), outcome
            more = [a - b for a, b in zip(seconds["sandbox"][1:], seconds["here"][1:], strict=True)]
            figures[f"overhead {network}"] = Figure(
                value=round(sorted(more)[len(more) // 2], 3),
                unit="s per evaluation",
                goal=goal,
                better="lower",
                spread={key: round(value, 3) for key, value in spread(more).items()},
                command=command,
                note=f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
            )
    print(write("isolation", figures))


if __name__ == "__main__":
    main()
