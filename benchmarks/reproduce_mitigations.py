"""What the three mitigations of Neural Cleanse leave of a backdoor, with the trigger that Neural Cleanse recovers.

    python benchmarks/reproduce_mitigations.py run --attack badnets --models 10
    python benchmarks/reproduce_mitigations.py try --attack badnets --models 5 --set lr=0.01
    python benchmarks/reproduce_mitigations.py collect             results/rounds_3_4.json from the rows

Each model is trained on the task with its default recipe: *badnets*, a 3x3 square at a drawn place in a drawn color,
5 % of the rows, as in benchmarks/neural_cleanse.py; *blended*, uniform noise with an opacity of a fifth, 10 % of the
rows. Neural Cleanse searches it, and what it recovers goes to unlearning, neuron pruning and the activation filter,
as it would in a game. Of the weights that each hands back, the TRUE trigger's success and the accuracy are measured
on hidden test images. The stream of the filter is hidden test images, of which every second one that is not of the
target class carries the true trigger.

Where Neural Cleanse recovers nothing that works, there is nothing to mitigate: such a model counts with what it had.

`try` trains models of other seeds and measures on validation images: that is where settings of unlearning are chosen.
It appends to results/mitigations-develop.jsonl, `run` to results/mitigations.jsonl; a row that is there is not made
again.
"""

import argparse
import copy
import os
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from molehunt.attacks import Attack, Blended
from molehunt.defenses import Defense, NeuralCleanse
from molehunt.defenses.activation_filter import ActivationFilter
from molehunt.defenses.neuron_pruning import NeuronPruning
from molehunt.defenses.unlearning import Unlearning
from molehunt.findings import Candidate, Finding
from molehunt.game.answers import accuracy, asr, measure
from molehunt.game.attacker import parse_settings, train_model
from molehunt.runner import configuration, generator, inspect
from molehunt.suspect import Suspect
from molehunt.tasks import Images, Task, get_task
from molehunt.testing import auc
from molehunt.training import recipe_for
from molehunt.triggers import Target, Trigger
from neural_cleanse import draw
from record import Figure, append, machine, rows, spread, todo, write

NAME, DEVELOP, RESULT = "mitigations", "mitigations-develop", "rounds_3_4"
SEED = 21_000  # first of the reported models; those of `try` begin a hundred later. No other work uses these
STREAM = 2_000


def attack_of(kind: str, task: Task, seed: int) -> Attack:
    """The attack of one model."""
    if kind == "badnets":
        return draw(task, seed)
    target = int(torch.randint(task.num_classes, (1,), generator=generator(seed, "mitigations benchmark")))
    return Blended(target=target)


def judged(model: nn.Module, images: Images, trigger: Trigger, target: Target) -> dict[str, float]:
    """Accuracy, and success of the true trigger."""
    said = measure(model, images, trigger)
    assert said.stamped is not None
    return {"accuracy": accuracy(said.plain, said.y), "asr": asr(said.stamped, said.y, target)}


def loaded(model: nn.Module, state: Mapping[str, Tensor] | None) -> nn.Module:
    """The network with the weights that a repair hands back; as it was where it hands back none."""
    copied = copy.deepcopy(model)
    if state is not None:
        copied.load_state_dict(dict(state))
    return copied.eval()


def stream_of(images: Images, trigger: Trigger, target: int) -> tuple[Tensor, Tensor]:
    """Inputs (M, C, H, W), and which of them carry the trigger, bool (M,)."""
    x, y = images.x[:STREAM].clone(), images.y[:STREAM]
    carry = (torch.arange(len(y)) % 2 == 1) & (y != target)
    x[carry] = trigger(x[carry])
    return x, carry


def one(key: dict[str, Any], settings: dict[str, Any], develop: bool) -> dict[str, Any]:
    """Train one model, recover its trigger, mitigate, and answer its row."""
    task, seed = get_task(key["task"]), int(key["seed"])
    attack = attack_of(key["attack"], task, seed)
    start, busy = time.monotonic(), round(os.getloadavg()[0], 2)
    rng = generator(seed, f"mitigations {key['attack']} {task.network}")
    model, made = train_model(task, task.network, recipe_for(task.network, task), attack, rng=rng)
    assert made is not None
    trained = time.monotonic() - start
    clean, hidden = task.secret(seed)
    hidden = task.load("validation") if develop else hidden
    assert isinstance(made.target.classes, int)
    target = made.target.classes
    search = inspect(NeuralCleanse(), Suspect.of(model, task, clean=clean), seed=seed)
    if not isinstance(search, Finding):
        raise RuntimeError(f"expected a finding, got {search}")
    candidates: tuple[Candidate, ...] = ()
    if search.trigger is not None and search.target is not None:
        candidates = (Candidate(trigger=search.trigger, target=search.target, defense="neural_cleanse"),)
    stream, carry = stream_of(hidden, made.trigger, target)
    suspect = Suspect.of(model, task, clean=clean, inputs=stream, candidates=candidates)
    row: dict[str, Any] = {
        **key,
        "network": task.network,
        "settings": settings,
        "target": target,
        "guess": search.target,
        "score": search.score,
        "before": judged(model, hidden, made.trigger, made.target),
        "trained_seconds": trained,
    }
    repairs: dict[str, Defense] = {"unlearning": Unlearning(**settings), "neuron_pruning": NeuronPruning()}
    for name, defense in repairs.items():
        found = inspect(defense, suspect, name=name, seed=seed)
        if not isinstance(found, Finding) or found.cost is None:
            raise RuntimeError(f"expected a finding, got {found}")
        row[name] = {
            **judged(loaded(model, found.repaired), hidden, made.trigger, made.target),
            "triggers": found.details["triggers"],
            "warnings": found.details["warnings"],
            "seconds": found.cost.seconds,
            "configuration": configuration(defense),
        }
        row[name] |= {k: found.details[k] for k in ("pruned", "lr") if k in found.details}
    found = inspect(ActivationFilter(), suspect, name="activation_filter", seed=seed)
    if not isinstance(found, Finding) or found.cost is None:
        raise RuntimeError(f"expected a finding, got {found}")
    if found.input_scores is not None:
        rejected = found.input_scores > found.details["threshold"]
        row["activation_filter"] = {
            "auc": auc(found.input_scores, carry),
            "let_through": float((~rejected[carry]).double().mean()),
            "false_alarms": float(rejected[~carry].double().mean()),
            "seconds": found.cost.seconds,
        }
    return {**row, "threads": torch.get_num_threads(), "busy": busy, "machine": machine()}


def collect() -> None:
    """Write the figures into results/rounds_3_4.json."""
    figures: dict[str, Figure] = {}
    today = {
        name: configuration(kind()) for name, kind in (("unlearning", Unlearning), ("neuron_pruning", NeuronPruning))
    }
    # Of one setting, and that is today's: a median over two would be of neither.
    kept = [r for r in rows(NAME) if all(r[name]["configuration"] == now for name, now in today.items())]
    for task, attack in dict.fromkeys((r["task"], r["attack"]) for r in kept):
        found = [r for r in kept if (r["task"], r["attack"]) == (task, attack)]
        filtered = [r["activation_filter"] for r in found if "activation_filter" in r]
        made: list[tuple[str, list[float], str, Any]] = [
            ("ASR before", [r["before"]["asr"] for r in found], "share", "lower"),
            ("accuracy before", [r["before"]["accuracy"] for r in found], "share", "higher"),
        ]
        for name in ("unlearning", "neuron_pruning"):
            made += [
                (f"{name}, ASR after", [r[name]["asr"] for r in found], "share", "lower"),
                (
                    f"{name}, accuracy lost",
                    [r["before"]["accuracy"] - r[name]["accuracy"] for r in found],
                    "share",
                    "lower",
                ),
                (f"{name}, time", [r[name]["seconds"] for r in found if r[name]["triggers"]], "s", "lower"),
            ]
        if filtered:
            made += [
                ("activation_filter, AUC", [f["auc"] for f in filtered], "share", "higher"),
                (
                    "activation_filter, stamped inputs let through",
                    [f["let_through"] for f in filtered],
                    "share",
                    "lower",
                ),
                ("activation_filter, clean inputs rejected", [f["false_alarms"] for f in filtered], "share", "lower"),
            ]
        for what, values, unit, better in made:
            figures[f"mitigations on {task}, {attack}, {what}"] = Figure(
                value=spread(values)["median"],
                unit=unit,
                goal=None,
                better=better,
                spread=spread(values),
                seeds=[r["seed"] for r in found],
                command=f"python benchmarks/reproduce_mitigations.py run --task {task} --attack {attack}",
                note=f"{len(filtered)} of {len(found)} models with a trigger that works"
                if what.startswith("activation")
                else "",
            )
    print(write(RESULT, figures).read_text())


def main() -> None:
    """Make rows, or collect them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "try", "collect"])
    parser.add_argument("--task", default="mnist")
    parser.add_argument("--attack", choices=["badnets", "blended"], default="badnets")
    parser.add_argument("--models", type=int, default=10)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="of unlearning; try only")
    arguments = parser.parse_args()
    if arguments.what == "collect":
        return collect()
    develop = arguments.what == "try"
    if arguments.set and not develop:
        parser.error("--set changes a defense, so its figure would not be that of the defaults; use try")
    settings = parse_settings(arguments.set)
    torch.set_num_threads(1)
    first = SEED + (100 if develop else 0)
    keys = [
        {"task": arguments.task, "attack": arguments.attack, "seed": first + number}
        for number in range(arguments.models)
    ]
    name = DEVELOP if develop else NAME
    for key in todo(name, [{**key, "settings": settings} for key in keys]):
        row = one({k: v for k, v in key.items() if k != "settings"}, settings, develop)
        append(name, row)
        shown = ("before", "unlearning", "neuron_pruning", "activation_filter")
        print(
            key, {k: {a: b for a, b in row[k].items() if a != "configuration"} for k in shown if k in row}, flush=True
        )
    return None


if __name__ == "__main__":
    main()
