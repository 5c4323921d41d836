"""How many networks train in one block, and in how many processes: found out by a short measurement."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from molehunt.engine import Engine, Local, Processes
from molehunt.networks import Network, build
from molehunt.tasks import Images
from molehunt.training.recipes import Recipe
from molehunt.training.together import train_together
from molehunt.training.trainer import train

Shape = tuple[int, int, int]
BLOCKS = (1, 2, 4, 8)
BLOCKS_GPU = (1, 8, 32, 128)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a population trains. It decides how fast, and with it the last bits of every weight.

    Attributes:
        block: networks that train together; 1 is the plain loop.
        processes: processes that each train blocks.
        threads: torch threads of each process.
    """

    block: int = 1
    processes: int = 1
    threads: int = 1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"a layout needs at least 1 for {name}, got {value}")

    def engine(self) -> Engine:
        """Make the engine that it asks for."""
        return Processes(self.processes, self.threads) if self.processes > 1 else Local()

    @classmethod
    def read(cls, path: Path) -> "Layout":
        """Read what `write` wrote.

        Raises:
            ValueError: the file holds no layout.
        """
        try:
            found = json.loads(path.read_text())
            return cls(**{name: int(found[name]) for name in ("block", "processes", "threads")})
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no layout ({error}); delete it to measure again") from error

    def write(self, path: Path, rates: dict[str, float] | None = None) -> None:
        """Write it, with the measured rates, if any, for people to read."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps({**asdict(self), "images_per_second": rates or {}}, indent=1) + "\n")
        partial.replace(path)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One short training to be timed: what `rate` is given."""

    network: str
    shape: Shape
    classes: int
    recipe: Recipe
    block: int
    threads: int
    seconds: float


def rate(trial: Trial) -> float:
    """Return training images per second of this process, on random pictures; two warm-up rounds are not counted."""
    before = torch.get_num_threads()
    torch.set_num_threads(trial.threads)
    try:
        _train(trial, 1)
        start = time.perf_counter()
        _train(trial, 4)
        # One long round, not many short ones: building the networks must not weigh on what their steps cost.
        steps = max(4, int(4 * trial.seconds / (time.perf_counter() - start)))
        start = time.perf_counter()
        images = _train(trial, steps)
        return images / (time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)


def _train(trial: Trial, steps: int) -> int:
    rng = torch.Generator().manual_seed(0)
    count = trial.recipe.batch
    x = torch.rand(count, *trial.shape, generator=rng)
    images = Images(x, torch.randint(trial.classes, (count,), generator=rng))
    recipe = Recipe.from_json({**trial.recipe.to_json(), "epochs": steps, "least_images": 0})
    networks: list[Network] = [
        build(trial.network, trial.shape, trial.classes, rng=torch.Generator().manual_seed(seed))
        for seed in range(trial.block)
    ]
    rngs = [torch.Generator().manual_seed(seed) for seed in range(trial.block)]
    if trial.block == 1:
        return train(networks[0], images, recipe, rng=rngs[0]).images
    return sum(one.images for one in train_together(networks, [images] * trial.block, recipe, rngs=rngs))


def measure(
    network: str,
    shape: Shape,
    classes: int,
    recipe: Recipe,
    *,
    seconds: float = 1.5,
    cores: int | None = None,
    blocks: Sequence[int] | None = None,
) -> tuple[Layout, dict[str, float]]:
    """Time every layout that makes sense on this machine and return the fastest.

    On a CPU: one process with all cores, and one process of one thread per core, each at several block sizes; on a
    GPU one process at larger blocks.

    Args:
        network: a name that `build` takes.
        shape: (C, H, W) of the pictures.
        classes: number of classes.
        recipe: its batch size, optimizer and augmentation count; its length does not.
        seconds: time for each layout.
        cores: cores to use; all of this machine.
        blocks: sizes to try.

    Returns:
        The layout, and training images per second of the whole machine for each one tried, by its name.
    """
    gpu = torch.cuda.is_available()
    cores = cores or len(os.sched_getaffinity(0))
    blocks = blocks or (BLOCKS_GPU if gpu else BLOCKS)
    places = [(1, 1 if gpu else cores)] + ([(cores, 1)] if cores > 1 and not gpu else [])
    rates: dict[Layout, float] = {}
    for processes, threads in places:
        trials = [
            Trial(
                network=network, shape=shape, classes=classes, recipe=recipe,
                block=block, threads=threads, seconds=seconds,
            )
            for block in blocks
        ]  # fmt: skip
        engine = Layout(processes=processes, threads=threads).engine()
        # Every process times the same trials at the same moment, so that they get in each other's way as they would.
        for shares in zip(*_dealt(engine, trials, processes), strict=True):
            layout = Layout(block=shares[0][0], processes=processes, threads=threads)
            rates[layout] = sum(value for _, value in shares)
    best = max(rates, key=lambda layout: rates[layout])
    named = {f"{one.block} x {one.processes} x {one.threads}": round(value, 1) for one, value in rates.items()}
    return best, named


def _dealt(engine: Engine, trials: list[Trial], processes: int) -> Iterator[list[tuple[int, float]]]:
    yield from engine.map(_all_rates, [trials] * processes)


def _all_rates(trials: list[Trial]) -> list[tuple[int, float]]:
    return [(trial.block, rate(trial)) for trial in trials]
