"""What Neural Cleanse costs beside the official schedule, class by class in float32.

    python benchmarks/neural_cleanse_speed.py slice --state FOLDER      both sides in turns, seconds per image
    python benchmarks/neural_cleanse_speed.py sweeps --state FOLDER     where the official schedule stops; takes long
    python benchmarks/neural_cleanse_speed.py collect                   results/neural_cleanse.json, and the page

`slice`: ten classes of CIFAR-10, a `fast_cifar` with a BadNets square (trained once, kept in the folder `--state`; with
`--untrained` fresh weights, on which hardly a search ends early). *Ours* is a whole default run. *Official* is a loop
of our own: one class after the other, float32, no channels-last, batch norm as it is, weights frozen, the authors'
GTSRB schedule on 1 000 images; timed are two sweeps of 31 batches of 32 for each of two classes. What ten classes would
take is extrapolated from its seconds per image: to 1 000 sweeps, the most that the schedule allows, and to the sweeps
of `sweeps`. Seconds per image are of a forward and a backward pass; ours hold all else that a run does as well.

`sweeps` runs the official schedule on the same network by our batched code in the fastest number format, where each
class stops as it would alone. The median over classes stands for the float32 loop, which was not run to its end.
"""

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molehunt.attacks import BadNets
from molehunt.defenses import NeuralCleanse
from molehunt.defenses._inversion import Penalty, Schedule, random_start
from molehunt.defenses.neural_cleanse import OFFICIAL
from molehunt.findings import Finding
from molehunt.game.attacker import train_model
from molehunt.networks import Network, build
from molehunt.runner import configuration, generator, inspect
from molehunt.suspect import Suspect
from molehunt.tasks import Task, get_task
from molehunt.training import recipe_for
from pages import PAGES, put, span, written
from record import Figure, fill, machine, rows, spread, write

NAME, RESULT = "neural_cleanse-speed", "neural_cleanse"
PAGE, HEADING = PAGES / "neural_cleanse.md", "Speed"
HOW = """\
Ours beside a float32 loop of the official schedule, one class after the other, on a trained `fast_cifar`; medians over
repeats, smallest and largest. Of the loop a slice is timed, and what it would take in all is extrapolated. `python
benchmarks/neural_cleanse_speed.py slice --state FOLDER` makes the rows, `sweeps` finds where the official schedule
stops, and `collect` writes this section."""
SEED = 21_000
GOALS = "fast_cifar"  # the network that the goals are about
CLASSES, SWEEPS = (0, 1), 2  # of the official loop that are timed


def class_by_class(
    model: nn.Module, x: Tensor, rule: Schedule, classes: Sequence[int], sweeps: int, rng: torch.Generator
) -> dict[str, Any]:
    """Search classes one after the other, for so many sweeps each, as the official code does.

    Args:
        model: float32, frozen.
        x: images (N, C, H, W).
        rule: its batches and how lambda moves.
        classes: to search.
        sweeps: of `rule.updates` batches each.
        rng: draws starts and orders.

    Returns:
        `seconds`, `images` through the network forth and back, and for each class the `success` of its last sweep.
    """
    start, success = time.perf_counter(), []
    for target in classes:
        first = random_start(1, (int(x.shape[1]), int(x.shape[2]), int(x.shape[3])), rng)
        free = [(1.999998 * (value - 0.5)).atanh().requires_grad_() for value in first]
        optimizer = torch.optim.Adam(free, lr=rule.rate, betas=rule.betas)
        penalty, goal = Penalty(rule, 1), torch.full((rule.batch,), target)
        hits = 0.0
        for _ in range(sweeps):
            hits, norm = 0.0, 0.0
            order = torch.randperm(len(x), generator=rng)[: rule.updates * rule.batch]
            for some in torch.split(order, rule.batch):
                mask, pattern = (value.tanh() / 2 + 0.5 for value in free)
                out = model((1 - mask) * x[some] + mask * pattern)
                optimizer.zero_grad()
                torch.autograd.backward(F.cross_entropy(out, goal) + penalty.value[0] * mask.sum())
                optimizer.step()
                hits += float((out.argmax(1) == goal).float().mean()) / rule.updates
                norm += float(mask.detach().sum()) / rule.updates
            penalty.step(torch.tensor([hits]), torch.tensor([norm]))
        success.append(hits)
    images = len(classes) * sweeps * rule.updates * rule.batch
    return {"seconds": time.perf_counter() - start, "images": images, "success": success}


def conditions(suspect: Suspect) -> dict[str, Any]:
    """What a row must say about where it was made."""
    dtype = str(suspect.dtype).removeprefix("torch.")
    busy = round(os.getloadavg()[0], 2)
    return {"dtype": dtype, "threads": torch.get_num_threads(), "busy": busy, "machine": machine()}


def trained(task: Task, network: str, attack: BadNets, state: Path) -> Network:
    """The model that is searched, trained now or read from the folder."""
    state.mkdir(parents=True, exist_ok=True)
    rng, path = generator(SEED, f"{task.name} {network}"), state / f"{task.name.replace(' ', '-')}-{network}"
    return train_model(task, network, recipe_for(network, task), attack, rng=rng, checkpoint=path)[0]


@cache
def subject(network: str, untrained: bool, state: Path) -> Suspect:
    """Ten classes of CIFAR-10."""
    task = get_task("cifar10")
    model = build(network, task.shape, 10, mean=task.mean, std=task.std, rng=generator(SEED, network))
    if not untrained:
        model = trained(task, network, BadNets(target=0), state)
    return Suspect.of(model, task, clean=task.secret(SEED)[0])


def asked(defense: NeuralCleanse, suspect: Suspect, seed: int) -> Finding:
    """Run the defense, timed."""
    found = inspect(defense, suspect, name="neural_cleanse", seed=seed)
    if not isinstance(found, Finding) or found.cost is None:
        raise RuntimeError(f"expected a finding, got {found}")
    return found


def cost_of(found: Finding) -> dict[str, Any]:
    """Seconds and images of a run."""
    assert found.cost is not None
    return {"seconds": found.cost.seconds, "forward": found.cost.forward, "images": found.cost.backward}


def timed(suspect: Suspect, key: dict[str, Any]) -> dict[str, Any]:
    """Both sides once, the official one first."""
    assert suspect.clean is not None
    where, rng = conditions(suspect), generator(key["repeat"], "official")
    x = suspect.clean.x.contiguous()
    # The first pass of either kind prepares what later ones find ready.
    class_by_class(suspect.model, x, replace(OFFICIAL, updates=1), CLASSES[:1], 1, rng)
    suspect.logits(x)
    official = class_by_class(suspect.model, x, OFFICIAL, CLASSES, SWEEPS, rng)
    found = asked(NeuralCleanse(), suspect, SEED + key["repeat"])
    ours = {**cost_of(found), "success": found.details["success"], "steps": found.details["steps"]}
    return {**key, "official": official, "ours": ours, **where}


def stopping(suspect: Suspect, key: dict[str, Any]) -> dict[str, Any]:
    """After how many sweeps each class of the official schedule stops."""
    where = conditions(suspect)
    rule = replace(OFFICIAL, steps=key["most"])
    found = asked(replace(NeuralCleanse.official(), schedule=rule), suspect, SEED)
    told = {name: found.details[name] for name in ("steps", "norms", "success", "raw_index")}
    return {**key, **told, "guess": found.target, **cost_of(found), **where}


def sides(kept: Sequence[dict[str, Any]], sweeps: float) -> dict[str, list[float]]:
    """Per repeat: seconds per image of both sides, their ratio, seconds of ten classes, and that ratio."""
    images = 10 * sweeps * OFFICIAL.updates * OFFICIAL.batch
    theirs, ours = ([row[side]["seconds"] / row[side]["images"] for row in kept] for side in ("official", "ours"))
    whole = [one * images for one in theirs]
    seconds = [row["ours"]["seconds"] for row in kept]
    return {
        "official": theirs,
        "ours": ours,
        "ratio": [a / b for a, b in zip(theirs, ours, strict=True)],
        "official_seconds": whole,
        "seconds": seconds,
        "ratio_whole": [a / b for a, b in zip(whole, seconds, strict=True)],
    }


def kinds() -> dict[tuple[str, bool], tuple[list[dict[str, Any]], float | None]]:
    """Slices by network and whether it is untrained, and the median number of sweeps where it was measured."""
    settings, found = configuration(NeuralCleanse()), {}
    for network, untrained in dict.fromkeys((r["network"], r["untrained"]) for r in rows(NAME) if "network" in r):
        mine = [r for r in rows(NAME) if (r.get("network"), r.get("untrained")) == (network, untrained)]
        slices = [r for r in mine if r["what"] == "slice" and r["settings"] == settings]
        stops = [r for r in mine if r["what"] == "sweeps" and r["most"] == OFFICIAL.steps]
        if slices:
            found[network, untrained] = slices, statistics.median(stops[-1]["steps"]) if stops else None
    return found


def told(values: Sequence[float], digits: int) -> str:
    """A median, with its range where there is one."""
    middle = f"{statistics.median(values):.{digits}f}"
    return f"{middle} ({span(list(values), digits)})" if len(values) > 1 else middle


def table() -> str:
    """The section of the page."""
    lines = []
    for (network, untrained), (kept, stop) in kinds().items():
        found, name = sides(kept, OFFICIAL.steps), f"`{network}`{', untrained' if untrained else ''}"
        per_image = " / ".join(told([1e3 * value for value in found[side]], 2) for side in ("official", "ours"))
        where = f"{kept[-1]['threads']} threads, {kept[-1]['dtype']}, load {span([row['busy'] for row in kept], 1)}"
        cells = [("ms per image: official / ours", "", per_image, where)]
        cells += [("times as fast per image", "3", told(found["ratio"], 2), "")]
        cells += [("seconds of ten classes", "45", told(found["seconds"], 1), "")]
        for sweeps, word in ((OFFICIAL.steps, "at most"), (stop, "median of `sweeps`")):
            if sweeps is not None:
                whole = told(sides(kept, sweeps)["ratio_whole"], 0)
                cells += [(f"times as fast as {sweeps:g} sweeps ({word}), extrapolated", "20", whole, "")]
        for what, goal, value, settings in cells:
            lines.append(f"| {name}, {what} | {goal if network == GOALS else ''} | {value} | {settings} |")
    head = ["| figure | goal | ours | settings |", "|---|---|---|---|"]
    return written(["\n".join([*head, *lines])] if lines else [], HOW)


def figures_of(network: str, untrained: bool, kept: list[dict[str, Any]], stop: float | None) -> dict[str, Figure]:
    """What slices say of one network."""
    made: dict[str, Figure] = {}
    command = f"python benchmarks/neural_cleanse_speed.py slice --network {network}{' --untrained' * untrained}"
    note = f"{kept[-1]['threads']} threads, {kept[-1]['dtype']}, load {[row['busy'] for row in kept]}"

    def add(what: str, values: list[float], unit: str, goal: float | None = None, more: str = "") -> None:
        made[f"Neural Cleanse, {network}{', untrained' * untrained}, {what}"] = Figure(
            value=statistics.median(values),
            unit=unit,
            goal=goal if network == GOALS else None,
            better="lower" if unit == "s" else "higher",
            spread=spread(values),
            command=command,
            note=note + more,
        )

    found = sides(kept, OFFICIAL.steps)
    slice_ = f"; a slice of {len(CLASSES)} classes x {SWEEPS} sweeps"
    add("seconds per image", found["ours"], "s", more="; a whole run, by images forth and back")
    add("seconds per image of the official loop", found["official"], "s", more=slice_)
    add("times as fast per image as the official loop", found["ratio"], "times", 3, slice_)
    add("ten classes, end to end", found["seconds"], "s", 45)
    for sweeps, word in ((OFFICIAL.steps, f"up to {OFFICIAL.steps} sweeps"), (stop, "the sweeps it stops after")):
        if sweeps is not None:
            said = f"; extrapolated from {slice_[2:]} to 10 classes x {sweeps:g} sweeps"
            whole = sides(kept, sweeps)
            add(f"seconds of the official loop, {word}", whole["official_seconds"], "s", None, said)
            add(f"times as fast end to end, {word}", whole["ratio_whole"], "times", 20, said)
    return made


def collect() -> None:
    """Write the figures, and the table into the page."""
    figures: dict[str, Figure] = {}
    for (network, untrained), (kept, stop) in kinds().items():
        figures |= figures_of(network, untrained, kept, stop)
    print(write(RESULT, figures).read_text())
    put(PAGE, HEADING, table(), before="Known limits")


def main() -> None:
    """Make rows, or collect them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["slice", "sweeps", "collect"])
    parser.add_argument("--state", type=Path, default=Path("runs/neural_cleanse_speed"), help="folder of the models")
    parser.add_argument("--network", default=GOALS, help="network of CIFAR-10")
    parser.add_argument("--untrained", action="store_true", help="fresh weights")
    parser.add_argument("--repeats", type=int, default=3, help="of slice")
    parser.add_argument("--most", type=int, default=OFFICIAL.steps, help="of sweeps: sweeps at most")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.what == "collect":
        return collect()
    about = {"network": arguments.network, "untrained": arguments.untrained}
    suspect = partial(subject, **about, state=arguments.state)
    if arguments.what == "sweeps":
        keys = [{"what": "sweeps", **about, "most": arguments.most}]
        return fill(NAME, keys, lambda key: stopping(suspect(), key))
    settings = configuration(NeuralCleanse())
    keys = [{"what": "slice", **about, "repeat": r, "settings": settings} for r in range(arguments.repeats)]
    return fill(NAME, keys, lambda key: timed(suspect(), key))


if __name__ == "__main__":
    main()
