"""Why attacks that work on the weights board miss on the data board: eight bits, shifted pictures, or neither.

    python benchmarks/data_board.py run         trains the networks that are missing, one row each
    python benchmarks/data_board.py collect     prints the lines of the tables in the pages

On the data board pictures are stamped and rounded to eight bits before the host's training shifts them; on the weights
board the attacker stamps the shifted picture. Each network here is trained on the set that the attack makes for the
data board, with rounding and with shifts each switched on and off, and all else, the order of the rows and the victim's
weights too, the same; "weights" is the weights board at the same rates. The draw "attacks" is the one of the row of
benchmarks/attacks.py on the data board. Figures are of the validation split.
"""

import argparse
from dataclasses import replace
from typing import Any

import torch

from attacks import FITTING
from molehunt.attacks import poison
from molehunt.game.answers import accuracy, asr, measure
from molehunt.game.attacker import make_attack, train_model
from molehunt.runner import generator
from molehunt.tasks import Images, get_task
from molehunt.training import recipe_for
from record import fill, machine, rows, spread

NAME = "data_board"
ATTACKS = ("issba", "wanet", "bpp")
SEEDS = (0, 1, 2, "attacks")
VERSIONS = {
    "weights": "weights board",
    "plain": "stamped first, neither rounded nor shifted",
    "rounded": "stamped first, rounded",
    "shifted": "stamped first, shifted",
    "both": "stamped first, rounded and shifted, as on the data board",
}


def one(key: dict[str, Any]) -> dict[str, Any]:
    """Train one backdoored model and answer its row."""
    task = get_task("mnist")
    public, held_out, version = task.load("train"), task.load("validation"), key["version"]
    recipe = recipe_for(task.network, task)
    attack = make_attack(key["attack"], FITTING.get(key["attack"], {}))
    named = key["seed"] == "attacks"
    rng = generator(
        0 if named else key["seed"],
        f"attack benchmark {key['attack']} {task.network} data" if named else f"data board {key['attack']}",
    )
    if version in {"plain", "rounded"}:
        recipe = replace(recipe, augment="none")
    if version == "weights":
        model, made = train_model(task, task.network, recipe, attack, rng=rng)
    else:
        made = poison(attack, public, task, rng)
        x, y = made.stamped()
        images = Images((255 * x).round() / 255 if version in {"rounded", "both"} else x, y)
        model, _ = train_model(task, task.network, recipe, None, rng=rng, images=images)
    assert made is not None
    said = measure(model.eval(), held_out, made.trigger)
    assert said.stamped is not None
    return {
        **key,
        "task": task.name,
        "network": task.network,
        "split": "validation",
        "accuracy": accuracy(said.plain, said.y),
        "asr": asr(said.stamped, said.y, made.target),
        "machine": machine(),
    }


def lines(attack: str, kept: list[dict[str, Any]]) -> list[str]:
    """The lines of one attack's table."""
    shown = []
    for version, told in VERSIONS.items():
        found = [row for row in kept if (row["attack"], row["version"]) == (attack, version)]
        if found:
            spreads = [spread([100 * row[name] for row in found]) for name in ("accuracy", "asr")]
            cells = [f"{s['median']:.1f} ({s['min']:.1f} to {s['max']:.1f})" for s in spreads]
            shown.append(f"| {told} | {len(found)} | {' | '.join(cells)} |")
    return shown


def main() -> None:
    """Make the rows that are missing, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "collect"])
    if parser.parse_args().what == "collect":
        for attack in ATTACKS:
            print(f"{attack}\n" + "\n".join(lines(attack, rows(NAME))))
        return
    torch.set_num_threads(1)
    keys = [{"attack": a, "version": v, "seed": s} for a in ATTACKS for s in SEEDS for v in VERSIONS]
    fill(NAME, keys, one)


if __name__ == "__main__":
    main()
