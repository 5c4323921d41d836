"""How often the example teams of `molehunt play` pass every gate, on the validation split.

    python benchmarks/teams.py --task mnist5k --seeds 8

Each seed is one game's worth of attackers: other targets, sources, poison and weights. The gates are those of `molehunt
check`, against the same five clean models. Every model appends a row to results/teams.jsonl; one that is there already,
of the same settings, is not made again.
"""

import argparse
import hashlib
import json
from typing import Any

import torch

from molehunt.game.answers import accuracy, asr, measure
from molehunt.game.attacker import Team, describe, sealed, teams, train_model
from molehunt.game.check import check
from molehunt.game.rules import Limits
from molehunt.networks import Network
from molehunt.runner import generator
from molehunt.tasks import Task, get_task
from molehunt.training import recipe_for
from record import append, machine, rows

NAME = "teams"


def stamp(team: Team, task: Task) -> str | None:
    """Name a trigger by what it does to a gray picture: a patch's description does not hold its pixels."""
    trigger = getattr(team.attack, "trigger", None)
    if trigger is None:
        return None
    return hashlib.sha256(trigger(torch.full((1, *task.shape), 0.5)).numpy().tobytes()).hexdigest()[:12]


def clean_models(task: Task) -> list[Network]:
    """Train the clean models that the gates compare with."""
    recipe = recipe_for(task.network, task)
    seeds = range(Limits().references)
    return [
        train_model(task, task.network, recipe, None, rng=generator(seed, "teams benchmark, clean"))[0].eval()
        for seed in seeds
    ]


def main() -> None:
    """Train the teams that have no row yet and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="mnist5k")
    parser.add_argument("--seeds", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task = get_task(arguments.task)
    recipe, images = recipe_for(task.network, task), task.load("validation")
    wanted: list[tuple[int, Team, dict[str, object]]] = []
    for seed in range(arguments.seeds):
        for team in teams(task, 7, generator(seed, "teams benchmark")):
            if team.attack is not None:
                # Through JSON, as the row will come back: tuples become lists.
                said = json.loads(json.dumps(describe(team.attack)))
                key = {"task": task.name, "team": team.name, "seed": seed, "attack": said, "stamp": stamp(team, task)}
                key["recipe"] = recipe.to_json()
                wanted.append((seed, team, key))
    done = rows(NAME)
    left = [w for w in wanted if not any(all(r[k] == v for k, v in w[2].items()) for r in done)]
    clean = clean_models(task) if left else []
    for seed, team, key in left:
        assert team.attack is not None
        model, made = train_model(
            task, task.network, recipe, team.attack, rng=generator(seed, f"teams benchmark {team.name}")
        )
        assert made is not None
        answers = measure(model.eval(), images, made.trigger)
        assert answers.stamped is not None
        gates = check(model, sealed(team.attack, made), clean, images, shape=task.shape)
        row: dict[str, Any] = {
            **key,
            "accuracy": accuracy(answers.plain, answers.y),
            "asr": asr(answers.stamped, answers.y, made.target),
            "missed": {g.name: g.message for g in gates if not g.passed},
            "machine": machine(),
        }
        append(NAME, row)
        print(team.name, seed, round(row["accuracy"], 4), round(row["asr"], 4), row["missed"], flush=True)
    finished = rows(NAME)
    for name in dict.fromkeys(team.name for _, team, _ in wanted):
        keys = [key for _, team, key in wanted if team.name == name]
        found = [r for key in keys for r in finished if all(r[k] == v for k, v in key.items())]
        print(f"{name}: {sum(not r['missed'] for r in found)} of {len(found)} pass every gate")


if __name__ == "__main__":
    main()
