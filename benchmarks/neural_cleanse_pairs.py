"""Neural Cleanse on 43 classes, in full and in its low-cost mode: seconds, and whether the target is named.

    python benchmarks/neural_cleanse_pairs.py run --state FOLDER
    python benchmarks/neural_cleanse_pairs.py collect              results/neural_cleanse.json, and the page

Pictures are two digits of MNIST side by side, 28x56, and the classes are the numbers 0 to 42: a task that is there for
its number of classes alone. A `badnets_cnn` with a white 4x4 square, target 33, is trained in seconds, kept in the
folder `--state`, and searched by default settings and with `shortlist=10`, in turns. A row per search: seconds, images
through the network, score and class named.
"""

import argparse
import os
import statistics
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from molehunt.attacks import BadNets
from molehunt.defenses import NeuralCleanse
from molehunt.game.answers import accuracy, asr, measure
from molehunt.runner import configuration, generator
from molehunt.suspect import Suspect
from molehunt.tasks import Images, Split, get_task
from molehunt.testing import PlantedTask
from molehunt.triggers import Patch, Target
from neural_cleanse_speed import asked, conditions, cost_of, told, trained
from pages import PAGES, put, written
from record import Figure, fill, rows, spread, write

NAME, RESULT = "neural_cleanse-pairs", "neural_cleanse"
PAGE, HEADING = PAGES / "neural_cleanse.md", "Forty-three classes"
HOW = """\
Pictures of two digits side by side, 28x56, a `badnets_cnn` with a white 4x4 square: a task for the time alone. Medians
over repeats, smallest and largest. `python benchmarks/neural_cleanse_pairs.py run --state FOLDER` makes the rows,
`collect` this section."""
SEED = 22_000
CLASSES, TARGET, SHORTLIST = 43, 33, 10
PER_CLASS: dict[Split, int] = {"train": 300, "validation": 30, "test": 60}


@cache
def pairs() -> PlantedTask:
    """Two digits side by side: the classes are the numbers 0 to 42, drawn anew from each part of MNIST."""
    known, splits = get_task("mnist"), dict[str, Images]()
    y = torch.arange(CLASSES)
    for split, count in PER_CLASS.items():
        images, rng = known.load(split), generator(SEED, f"pairs {split}")
        places = [(images.y == digit).nonzero().squeeze(1) for digit in range(10)]
        halves = []
        for digits in (y // 10, y % 10):
            chosen = [places[k][torch.randint(len(places[k]), (count,), generator=rng)] for k in digits.tolist()]
            halves.append(images.x[torch.cat(chosen)])
        splits[split] = Images(torch.cat(halves, dim=3), y.repeat_interleave(count))
    return PlantedTask(
        name="pairs of digits",
        shape=(1, 28, 56),
        classes=tuple(map(str, y.tolist())),
        augment=known.augment,
        network="badnets_cnn",
        mean=known.mean,
        std=known.std,
        splits=splits,
    )


@cache
def subject(state: Path) -> tuple[Suspect, dict[str, Any]]:
    """The model of 43 classes, and how good it and its backdoor are."""
    task = pairs()
    square = Patch.square(task.shape, size=4, color="white")
    model = trained(task, task.network, BadNets(target=TARGET, trigger=square), state)
    clean, hidden = task.secret(SEED)
    said = measure(model, hidden, square)
    assert said.stamped is not None
    rate = asr(said.stamped, said.y, Target(classes=TARGET))
    told = {"target": TARGET, "accuracy": accuracy(said.plain, said.y), "asr": rate}
    return Suspect.of(model, task, clean=clean), told


def searched(state: Path, key: dict[str, Any]) -> dict[str, Any]:
    """One search of the 43 classes."""
    suspect, told = subject(state)
    where = conditions(suspect)
    found = asked(NeuralCleanse(shortlist=key["shortlist"]), suspect, SEED + key["repeat"])
    guess = {"score": found.score, "guess": found.target, "searched": len(found.details["searched"])}
    return {**key, **told, **guess, **cost_of(found), **where}


def modes() -> dict[int | None, list[dict[str, Any]]]:
    """Searches of 43 classes by today's defaults: in full, and on a shortlist."""
    found: dict[int | None, list[dict[str, Any]]] = {}
    for row in rows(NAME):
        if row["settings"] == configuration(NeuralCleanse()):
            found.setdefault(row["shortlist"], []).append(row)
    return found


def table() -> str:
    """The section of the page."""
    lines = []
    for shortlist, mine in sorted(modes().items(), key=lambda one: one[0] or 0):
        hits = sum(row["guess"] == row["target"] for row in mine)
        mode = f"`shortlist={shortlist}`" if shortlist else "in full"
        images = told([float(row["images"]) for row in mine], 0)
        seconds, where = told([row["seconds"] for row in mine], 1), f"{mine[-1]['threads']}, {mine[-1]['dtype']}"
        lines.append(f"| {mode} | {seconds} | {images} | {hits} of {len(mine)} | {where} |")
    head = ["| search | seconds | images forth and back | target named | threads |", f"|{'---|' * 5}"]
    return written(["\n".join([*head, *lines])] if lines else [], HOW)


def collect() -> None:
    """Write the figures, and the table into the page."""
    figures: dict[str, Figure] = {}
    for shortlist, mine in modes().items():
        mode = f"a shortlist of {shortlist}" if shortlist else "in full"
        figures[f"Neural Cleanse, 43 classes of digit pairs, badnets_cnn, {mode}"] = Figure(
            value=statistics.median(row["seconds"] for row in mine),
            unit="s",
            goal=None,
            better="lower",
            spread=spread(row["seconds"] for row in mine),
            command="python benchmarks/neural_cleanse_pairs.py run",
            note=f"{mine[-1]['images']} images forth and back; {mine[-1]['threads']} threads, {mine[-1]['dtype']}",
        )
    print(write(RESULT, figures).read_text())
    put(PAGE, HEADING, table(), before="Known limits")


def main() -> None:
    """Make rows, or collect them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "collect"])
    parser.add_argument("--state", type=Path, default=Path("runs/neural_cleanse_pairs"), help="folder of the model")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.what == "collect":
        return collect()
    settings, turns = (
        configuration(NeuralCleanse()),
        [(r, s) for r in range(arguments.repeats) for s in (None, SHORTLIST)],
    )
    keys = [{"shortlist": shortlist, "repeat": repeat, "settings": settings} for repeat, shortlist in turns]
    return fill(NAME, keys, partial(searched, arguments.state))


if __name__ == "__main__":
    main()
