"""The prune curve of the pruning-aware attack beside that of the plain one, and what fine-pruning leaves of both.

    python benchmarks/pruning_aware.py run --seeds 3       rows of results/pruning_aware.jsonl
    python benchmarks/pruning_aware.py picture             docs/reference/attacks/pruning_aware-curve.png
    python benchmarks/pruning_aware.py collect             results/rounds_1_2.json

MNIST, default network and recipe, the same 4x4 square on a tenth of the rows for both attacks. Channels of the last
block are cut one after the other, in the order in which the defender's clean images leave them asleep, and accuracy and
success of the trigger are measured on hidden images at every count. Fine-pruning and its halves have their defaults.
"""

import argparse
import copy
import os
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from molehunt.defenses import FinePruning
from molehunt.figures import INK, REST, SAID, chart
from molehunt.findings import Finding
from molehunt.game.answers import accuracy, asr, measure
from molehunt.game.attacker import make_attack, train_model
from molehunt.networks import Network
from molehunt.runner import generator, inspect
from molehunt.suspect import Suspect
from molehunt.tasks import Images, get_task
from molehunt.training import recipe_for
from molehunt.triggers import Target, Trigger
from record import Figure, fill, machine, rows, spread, write

NAME, TASK = "pruning_aware", "mnist"
ATTACKS: dict[str, dict[str, Any]] = {"badnets": {"size": 4}, "pruning_aware": {}}
PICTURE = Path(__file__).parent.parent / "docs/reference/attacks/pruning_aware-curve.png"
VERSIONS = ("before", "pruning alone", "fine-tuning alone", "fine-pruning")


def judged(model: Network, hidden: Images, trigger: Trigger, target: Target) -> tuple[float, float]:
    """Accuracy and ASR on hidden images."""
    told = measure(model.eval(), hidden, trigger)
    assert told.stamped is not None
    return accuracy(told.plain, told.y), asr(told.stamped, told.y, target)


def curve(model: Network, order: Tensor, hidden: Images, trigger: Trigger, target: Target) -> list[tuple[float, float]]:
    """Accuracy and ASR with the first 0, 1, ... all channels of the last block cut."""
    mask, points = torch.ones(len(order)), []
    handle = model.trunk.register_forward_hook(lambda _m, _i, out: out * mask.to(out).view(1, -1, 1, 1))
    try:
        for channel in [None, *order.tolist()]:
            if channel is not None:
                mask[channel] = 0.0
            points.append(judged(model, hidden, trigger, target))
    finally:
        handle.remove()
    return points


def one(key: dict[str, Any]) -> dict[str, Any]:
    """Train, prune and repair one model."""
    task, seed = get_task(TASK), int(key["seed"])
    attack = make_attack(key["attack"], ATTACKS[key["attack"]])
    rng = generator(seed, f"pruning-aware benchmark {key['attack']}")
    model, made = train_model(task, task.network, recipe_for(task.network, task), attack, rng=rng)
    assert made is not None
    clean, hidden = task.secret(seed)
    found = inspect(FinePruning(baselines=True), Suspect.of(model, task, clean=clean), seed=seed)
    if not isinstance(found, Finding) or found.repaired is None:
        raise RuntimeError(f"no repair: {found}")
    weights = {
        "before": None,
        "pruning alone": found.details["prune_only"],
        "fine-tuning alone": found.details["fine_tune_only"],
        "fine-pruning": found.repaired,
    }
    left = {}
    for version, state in weights.items():
        other = copy.deepcopy(model)
        if state is not None:
            other.load_state_dict(dict(state))
        left[version] = judged(other, hidden, made.trigger, made.target)
    order = torch.as_tensor(found.details["order"])
    return {
        **key,
        "left": left,
        "curve": curve(model, order, hidden, made.trigger, made.target),
        "pruned": found.details["pruned"],
        "channels": len(order),
        "threads": torch.get_num_threads(),
        "busy": round(os.getloadavg()[0], 2),
        "machine": machine(),
    }


def picture() -> None:
    """Draw both curves of the first seed."""
    shown = {row["attack"]: row for row in rows(NAME) if row["seed"] == 0}
    names = {"badnets": "BadNets", "pruning_aware": "pruning-aware"}

    def draw(axes: Axes) -> None:
        for attack, style in (("badnets", "--"), ("pruning_aware", "-")):
            points = shown[attack]["curve"]
            axes.plot([a for a, _ in points], style, color=REST, linewidth=2.0, label=f"accuracy, {names[attack]}")
            axes.plot([s for _, s in points], style, color=SAID, linewidth=2.0, label=f"ASR, {names[attack]}")
        axes.axvline(shown["pruning_aware"]["pruned"], color=INK, linewidth=1.2, linestyle=":",
                     label="fine-pruning stops, pruning-aware")  # fmt: skip
        axes.set_ylim(-0.02, 1.03)
        axes.set_xlabel("channels cut, dormant ones first")
        axes.set_ylabel("share of hidden images")

    aware, plain = shown["pruning_aware"], shown["badnets"]
    alt = (
        f"Accuracy and ASR by number of channels cut. Pruning-aware: at the stop, after {aware['pruned']} of "
        f"{aware['channels']}, {aware['curve'][aware['pruned']][0]:.0%} and {aware['curve'][aware['pruned']][1]:.0%}; "
        f"BadNets after {plain['pruned']}: {plain['curve'][plain['pruned']][0]:.0%} and "
        f"{plain['curve'][plain['pruned']][1]:.0%}."
    )
    drawn = chart(draw, alt)
    PICTURE.write_bytes(drawn.png)
    print(drawn.alt)


def collect() -> None:
    """Write results/rounds_1_2.json."""
    figures: dict[str, Figure] = {}
    for attack in ATTACKS:
        kept = [row for row in rows(NAME) if row["attack"] == attack]
        for version in VERSIONS:
            for place, what in enumerate(("accuracy", "ASR")):
                values = [row["left"][version][place] for row in kept]
                figures[f"pruning-aware on {TASK}: {attack}, {version}, {what}"] = Figure(
                    value=spread(values)["median"],
                    unit="share",
                    goal=None,
                    better="higher" if what == "accuracy" else "lower",
                    spread=spread(values),
                    seeds=[row["seed"] for row in kept],
                    command="python benchmarks/pruning_aware.py run",
                )
    print(write("rounds_1_2", figures).read_text())


def main() -> None:
    """Make rows, a picture, or the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "picture", "collect"])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.what == "picture":
        return picture()
    if arguments.what == "collect":
        return collect()
    keys = [{"attack": attack, "task": TASK, "seed": seed} for seed in range(arguments.seeds) for attack in ATTACKS]
    return fill(NAME, keys, one)


if __name__ == "__main__":
    main()
