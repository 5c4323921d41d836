"""Whether probabilities hold, whether fresh clean models score like the calibration's, and what bfloat16 shifts.

    python benchmarks/calibration.py reliability mnist5k badnets_cnn   # a shipped population, out of fold: a picture
    python benchmarks/calibration.py null KNOWN.json FRESH.json        # two files of scores of clean models
    python benchmarks/calibration.py fresh KNOWN.json FRESH.json       # the second's models, judged by the first
    python benchmarks/calibration.py formats --seeds 3                 # clean and backdoored networks in both formats

Figures go to results/calibration.json; `formats` keeps a row per network in results/calibration.jsonl and goes on.
"""

import argparse
import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch

from molehunt import calibration
from molehunt.attacks import BadNets
from molehunt.calibration import statistic
from molehunt.defenses import STRIP, Defense, NeuralCleanse
from molehunt.examination import divide, examine
from molehunt.figures import reliability_chart
from molehunt.findings import Finding, Outcome
from molehunt.fusion import fuse
from molehunt.networks import build
from molehunt.null_check import DIFFERENT, null_check
from molehunt.reliability import holding as reliable
from molehunt.reliability import out_of_fold
from molehunt.runner import inspect
from molehunt.suspect import Suspect
from molehunt.tasks import get_task
from molehunt.testing import auc
from molehunt.training import recipe_for, train
from record import Figure, append, rows, spread, todo, write

NAME = "calibration"
PICTURE = Path(__file__).parent.parent / "docs" / "reference"
BINS = 5
FORMATS = ("float32", "bfloat16")


def holding(task: str, network: str) -> None:
    """Judge every model of a shipped population out of fold; write a picture, print a table, keep the figures."""
    population = calibration.shipped(task, network)
    if population is None:
        raise SystemExit(f"no population is shipped for {network} on {task}")
    prior = len(population.planted) / len(population.models)
    judged = [(a.said.p, a.model.attack is not None) for a in out_of_fold(population, prior=prior) if a.said]
    p, truth = [a for a, _ in judged], [b for _, b in judged]
    bins = reliable(population, BINS)
    chart = reliability_chart(bins)
    path = PICTURE / f"reliability-{task}-{network}.png"
    path.write_bytes(chart.png)
    print(chart.alt)
    for b in bins:
        if b.mean is not None and b.share is not None:
            interval = f"{b.least:.3f} to {b.most:.3f}"
            print(f"| {b.low:g} to {b.high:g} | {b.count} | {b.mean:.3f} | {b.share:.3f} | {interval} |")
    command = f"python benchmarks/calibration.py reliability {task} {network}"
    note = f"{len(population.clean)} clean, {len(population.planted)} planted, out of fold by seed and attack family"
    brier = sum((q - y) ** 2 for q, y in judged) / len(judged)
    outside = sum(b.mean is not None and not b.least <= b.mean <= b.most for b in bins)
    write(
        NAME,
        {
            f"{task} {network}, distance of the mean probability from the share backdoored": Figure(
                value=abs(sum(p) - sum(truth)) / len(p), unit="share", goal=None, better="lower",
                command=command, note=note,
            ),
            f"{task} {network}, Brier score": Figure(
                value=brier, unit="", goal=None, better="lower", command=command,
                note=f"{note}; saying the prior to every model gives {prior * (1 - prior):.4f}",
            ),
            f"{task} {network}, ranges whose mean lies outside the 95 % interval of their share": Figure(
                value=outside, unit=f"of {sum(b.count > 0 for b in bins)}", goal=0, better="lower", command=command,
                note=note,
            ),
        },
    )  # fmt: skip


def null(known: Path, fresh: Path) -> None:
    """Compare two files of scores and keep the figures."""
    first, second = calibration.load(known), calibration.load(fresh)
    found = null_check(first, second)
    command = f"python benchmarks/calibration.py null {known.name} {fresh.name}"
    about = f"{first.task} {first.network}"
    for d in found.defenses:
        print(
            f"| {d.defense} | {d.calibration} | {d.fresh} | {d.distance:.3f} | {d.p_value:.3f} | {d.corrected:.3f} | "
            f"{d.alarms.count} ({d.alarms.low} to {d.alarms.high}) |"
        )
    for name, why in found.left_out.items():
        print(f"{name} was not checked, {why}")
    a = found.alarms
    print(f"combined: {a.count} of {a.models} at {found.level:.0%}, expected {a.low} to {a.high}")
    write(
        NAME,
        {
            f"{about}, fresh clean models, smallest p of the defenses (KS, Holm)": Figure(
                value=min(d.corrected for d in found.defenses), unit="", goal=DIFFERENT, better="higher",
                spread={"min": min(d.p_value for d in found.defenses), "max": max(d.p_value for d in found.defenses)},
                command=command, note="spread: p before the correction",
            ),
            # How far outside: a count below the interval is as wrong as one above it.
            f"{about}, fresh clean models, false positives at {found.level:.0%} outside of what is expected": Figure(
                value=max(a.low - a.count, a.count - a.high, 0) if a.possible else None, unit="models", goal=0,
                better="lower", spread=f"{a.count} of {a.models}, expected {a.low} to {a.high} (beta-binomial, 95 %)",
                command=command,
            ),
            f"{about}, defenses that could not be checked on fresh clean models": Figure(
                value=len(found.left_out), unit="defenses", goal=0, better="lower", command=command,
                note="; ".join(f"{name}: {why}" for name, why in found.left_out.items()),
            ),
        },
    )  # fmt: skip


DRAWS = 1_000


def interval(scores: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """AUC with the range of 95 % of bootstrap draws, of clean and of planted models apart."""
    rng = torch.Generator().manual_seed(0)
    groups = [truth.nonzero().squeeze(1), (~truth).nonzero().squeeze(1)]
    drawn = []
    for _ in range(DRAWS):
        some = torch.cat([g[torch.randint(len(g), (len(g),), generator=rng)] for g in groups])
        drawn.append(auc(scores[some], truth[some]))
    low, high = torch.tensor(drawn).quantile(torch.tensor([0.025, 0.975])).tolist()
    return {"min": low, "median": auc(scores, truth), "max": high}


def fresh(known: Path, file: Path) -> None:
    """Judge models that a calibration has never seen, at even odds, and keep the figures."""
    first, second = calibration.load(known), calibration.load(file)
    models = [*second.clean, *second.planted]
    truth = torch.tensor([model.attack is not None for model in models])
    command = f"python benchmarks/calibration.py fresh {known.name} {file.name}"
    note = (
        f"{len(second.clean)} clean, {len(second.planted)} planted that pass the gates; spread: 95 % of bootstrap draws"
    )
    scored = [{k: v for k, v in model.scores.items() if v is not None and k in first.defenses} for model in models]
    told = torch.tensor([fuse(scores, first, prior=0.5).p for scores in scored], dtype=torch.float64)
    columns = {
        name: torch.tensor([scores[name] for scores in scored])
        for name in first.defenses
        if all(name in scores for scores in scored)
    }
    figures = {}
    for name, scores in {**columns, "all fused": told}.items():
        found = interval(scores, truth)
        print(f"| {name} | {found['median']:.3f} | {found['min']:.3f} to {found['max']:.3f} |")
        figures[f"{first.task} {first.network}, fresh models, AUC of {name}"] = Figure(
            value=found["median"], unit="AUC", goal=None, better="higher", spread=found, command=command, note=note
        )
    brier = float((told - truth.double()).square().mean())
    print(f"Brier {brier:.3f}")
    figures[f"{first.task} {first.network}, fresh models, Brier score"] = Figure(
        value=brier, unit="", goal=0.25, better="lower", command=command, note="at even odds; 0.25 is who says 0.5"
    )
    for model, p in sorted(zip(models, told.tolist(), strict=True), key=lambda pair: (pair[0].attack or "", pair[1])):
        print(f"{model.attack or 'clean'}: {p:.2f}")
    write(NAME, figures)


def ask(seed: int, name: str, defense: Defense, suspect: Suspect) -> Outcome:
    """Run one defense in this process."""
    return inspect(defense, suspect, name=name, seed=seed)


def formats(seeds: int) -> None:
    """Score small networks in both number formats."""
    task = get_task("mnist5k")
    images = task.load("train")
    recipe = dataclasses.replace(recipe_for("badnets_cnn", task), epochs=10)
    defenses: dict[str, Defense] = {"neural_cleanse": NeuralCleanse(), "strip": STRIP()}
    wanted = [{"seed": seed, "backdoored": hidden} for seed in range(seeds) for hidden in (False, True)]
    for key in todo(NAME, wanted):
        rng = torch.Generator().manual_seed(41_000 + key["seed"])
        model = build("badnets_cnn", task.shape, task.num_classes, mean=task.mean, std=task.std, rng=rng)
        if key["backdoored"]:
            poisoned = BadNets(target=key["seed"] % task.num_classes, size=5, poison_rate=0.05)(images, task, rng)
            train(model, poisoned.images, recipe, rng=rng, stamp=poisoned.stamp)
        else:
            train(model, images, recipe, rng=rng)
        clean, _ = task.secret(key["seed"])
        row: dict[str, Any] = dict(key)
        for name in FORMATS:
            suspect = Suspect.of(model, task, clean=divide(clean)[0], dtype=getattr(torch, name))
            outcomes = examine(suspect, defenses, partial(ask, key["seed"]))
            row[name] = {n: statistic(o) for n, o in outcomes if isinstance(o, Finding)}
        append(NAME, row)
        print(row, flush=True)
    kept = [row for row in rows(NAME) if row["seed"] < seeds]
    command = f"python benchmarks/calibration.py formats --seeds {seeds}"
    ratios = [
        math.exp(abs(math.log(row["bfloat16"]["neural_cleanse"] / row["float32"]["neural_cleanse"]))) for row in kept
    ]
    shifts = [abs(row["bfloat16"]["strip"] - row["float32"]["strip"]) for row in kept]
    note = "badnets_cnn on mnist5k, half of them backdoored; the same weights, seed and clean images in both formats"
    write(
        NAME,
        {
            "Neural Cleanse's index, larger over smaller of bfloat16 and float32": Figure(
                value=max(ratios), unit="ratio", goal=1.5, better="lower", spread=spread(ratios),
                seeds=list(range(seeds)), command=command, note=note,
            ),
            "STRIP's score, bfloat16 less float32": Figure(
                value=max(shifts), unit="share", goal=0.02, better="lower", spread=spread(shifts),
                seeds=list(range(seeds)), command=command, note=note,
            ),
        },
    )  # fmt: skip


def main() -> None:
    """Do one of the four."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["reliability", "null", "fresh", "formats"])
    parser.add_argument("names", nargs="*", help="of reliability: task and network; else: two files")
    parser.add_argument("--seeds", type=int, default=3, help="of formats")
    arguments = parser.parse_args()
    if arguments.what == "formats":
        formats(arguments.seeds)
        return
    if len(arguments.names) != 2:
        parser.error(f"{arguments.what} takes two names, got {arguments.names}")
    first, second = arguments.names
    if arguments.what == "reliability":
        holding(first, second)
    else:
        {"null": null, "fresh": fresh}[arguments.what](Path(first), Path(second))


if __name__ == "__main__":
    main()
