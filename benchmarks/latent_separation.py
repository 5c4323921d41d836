"""Whether poisoned rows lie apart from clean ones in the features, attack by attack.

    python benchmarks/latent_separation.py run --attack adap_blend --seed 0
    python benchmarks/latent_separation.py run --attack badnets --rate 0.02 --seed 0
    python benchmarks/latent_separation.py collect          results/latent_separation.json from the rows

`run` trains the default network of MNIST on a poisoned set, scores this set with spectral signatures and appends one
row to results/latent_separation.jsonl; a row that is there already is not made again. Poisoned rows are those with a
changed label; covers, which keep theirs, count as clean. The recall is the share of them among the 15 % of their class
with the highest scores. It cannot exceed `ceiling`, as there may be more poison in the class than that; the AUC within
the class has no such bound. So attacks are compared at one and the same rate. Accuracy and ASR are those of the
validation split.
"""

import argparse
import os
import statistics
from typing import Any

import torch

from molehunt.attacks import ATTACKS
from molehunt.defenses.spectral_signatures import SpectralSignatures, marked
from molehunt.findings import Finding
from molehunt.game.answers import accuracy, asr, measure, share
from molehunt.game.attacker import describe, make_attack, train_model
from molehunt.runner import generator, inspect
from molehunt.suspect import Suspect
from molehunt.tasks import get_task
from molehunt.testing import auc
from molehunt.training import recipe_for
from record import Figure, fill, machine, rows, spread, write

NAME = "latent_separation"
PORTION = 0.15
"""Share of a class with the highest scores that is looked at."""


def one(key: dict[str, Any]) -> dict[str, Any]:
    """Train on a poisoned set, score its rows, and answer the row of the benchmark."""
    task = get_task(key["task"])
    attack = make_attack(key["attack"], {} if key["rate"] is None else {"poison_rate": key["rate"]})
    busy = os.getloadavg()[0]
    model, made = train_model(
        task,
        key["network"],
        recipe_for(key["network"], task),
        attack,
        rng=generator(key["seed"], f"attack benchmark {key['attack']} {key['network']}"),
    )
    assert made is not None
    training, clean = made.stamped(), task.load("train")
    poison = training.y != clean.y
    suspect = Suspect.of(model.eval(), task, training=training)
    said = inspect(SpectralSignatures(retrain=False), suspect, name=NAME, seed=key["seed"])
    if not isinstance(said, Finding) or said.sample_scores is None:
        raise RuntimeError(f"spectral signatures gave no scores: {said}")
    sizes = torch.bincount(training.y, minlength=task.num_classes)
    counts = (PORTION * sizes).round().long()
    top = marked(said.sample_scores, training.y, counts)
    goals = torch.unique(training.y[poison])
    inside = torch.isin(training.y, goals)
    within = [auc(said.sample_scores[training.y == k], poison[training.y == k]) for k in goals]
    most = sum(min(int(counts[k]), int((poison & (training.y == k)).sum())) for k in goals)
    answers = measure(model, task.load("validation"), made.trigger)
    assert answers.stamped is not None
    settings = describe(attack)
    del settings["attack"]
    return {
        **key,
        "settings": settings,
        "poison": share(poison),
        "covers": share(made.altered & ~poison),
        "share_of_class": share(poison[inside]),
        "recall": share(top[poison]),
        "ceiling": most / int(poison.sum()),
        "auc": statistics.fmean(within),
        "variance_share": [round(float(said.details["variance_share"][k]), 4) for k in goals],
        "accuracy": accuracy(answers.plain, answers.y),
        "asr": asr(answers.stamped, answers.y, made.target),
        "threads": torch.get_num_threads(),
        "busy": round(busy, 2),
        "machine": machine(),
    }


def collect() -> None:
    """Write results/latent_separation.json, and print the lines of the table in the pages."""
    kept, figures = rows(NAME), {}
    for attack, rate, task in dict.fromkeys((r["attack"], r["rate"], r["task"]) for r in kept):
        found = [r for r in kept if (r["attack"], r["rate"], r["task"]) == (attack, rate, task)]
        percent = f"{100 * found[0]['poison']:.0f} %"
        cells = []
        for field in ("accuracy", "asr", "recall", "ceiling", "auc"):
            seen = spread([r[field] for r in found])
            low, middle, high = (f"{100 * seen[k]:.1f}" for k in ("min", "median", "max"))
            cells.append(middle if field == "ceiling" else f"{middle} ({low} to {high})")
            figures[f"{attack} at {percent} on {task}, {field}"] = Figure(
                value=seen["median"],
                unit="share",
                goal=None,
                better="higher" if field in {"accuracy", "asr"} else "lower",  # for the attacker
                spread=seen,
                seeds=[r["seed"] for r in found],
                command=f"python benchmarks/latent_separation.py run --attack {attack} --task {task}"
                + ("" if rate is None else f" --rate {rate}"),
            )
        print(f"| `{attack}` | {percent} | {len(found)} | {' | '.join(cells)} |")
    write(NAME, figures)


def main() -> None:
    """Make one row, or collect them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "collect"])
    parser.add_argument("--attack", choices=ATTACKS, default="badnets")
    parser.add_argument("--rate", type=float, help="poison rate; default: the attack's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--task", default="mnist")
    arguments = parser.parse_args()
    if arguments.what == "collect":
        return collect()
    network = get_task(arguments.task).network
    key = {"attack": arguments.attack, "rate": arguments.rate, "task": arguments.task, "network": network}
    return fill(NAME, [{**key, "seed": arguments.seed}], one)


if __name__ == "__main__":
    main()
