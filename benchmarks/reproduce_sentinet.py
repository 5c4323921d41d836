"""How well SentiNet tells stamped inputs from clean ones, by its own regions on maps of several sizes and the true one.

    python benchmarks/reproduce_sentinet.py run --task mnist --seed 0
    python benchmarks/reproduce_sentinet.py run --task cifar10 --seed 0 --state FOLDER
    python benchmarks/reproduce_sentinet.py try --task cifar10 --network narrow_cifar --seed 100 --state FOLDER
    python benchmarks/reproduce_sentinet.py candidates --state FOLDER
    python benchmarks/reproduce_sentinet.py collect             results/rounds_3_4.json from the rows

`run` makes or reads the model that benchmarks/training.py makes of BadNets and the same seed (with its `--state` a
training that is finished there is only read). The stream is clean test images and as many others that carry the
trigger, none of the target class and all of them sent there; overlays, parabola and threshold are of the defender's
part of the test split. One row per model is appended to results/sentinet.jsonl: for every smallest side of the map
(`SIDES`) the AUC, the share of clean inputs flagged and of stamped ones, and the seconds; and the AUC where the region
of every input, clean or stamped, is the trigger's own. A failure of saliency is then no failure of the test.

`try` does the same on the validation split, for choosing the side, and appends to results/sentinet-develop.jsonl.

`candidates` asks what a score of recovered triggers should be. ABS and Neural Cleanse look for triggers in the mnist5k
models of the bank's develop partition, which must be built (`--banks`); their answers are kept in `--state`. A row per
model has Fooled and AvgConf of each recovered trigger, and its residual over a parabola of clean images' own regions,
less the threshold of a stream.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molehunt import bank, findings
from molehunt.bank.code import place_of
from molehunt.bank.rows import backdoored, folder_of, read_rows, regrow
from molehunt.defenses import DEFENSES
from molehunt.defenses._saliency import finest_map
from molehunt.defenses._transplant import Boundary, conformal_threshold, sharpness_of, transplant
from molehunt.defenses.sentinet import LOOKED_AT, SentiNet
from molehunt.examination import candidates, divide
from molehunt.findings import Finding
from molehunt.game.answers import accuracy, asr, measure
from molehunt.runner import generator, inspect
from molehunt.suspect import Suspect
from molehunt.tasks import Images, get_task
from molehunt.testing import auc
from molehunt.triggers import Patch, Target
from record import Figure, append, machine, rows, spread, todo, write
from training import again

NAME, DEVELOP = "sentinet", "sentinet-develop"
SIDES = (1, 3, 7, 15)
TARGET = Target(classes=0)


def stream_of(suspect: Suspect, hidden: Images, trigger: Patch, inputs: int) -> tuple[Tensor, Tensor]:
    """Clean inputs and as many stamped ones, and which are stamped."""
    answers = measure(suspect.model, hidden, trigger)
    assert answers.stamped is not None
    works = (TARGET.counts(answers.y) & (answers.stamped == TARGET.goal(answers.y))).nonzero().squeeze(1)
    carry = works[:inputs]
    other = torch.ones(len(hidden.y), dtype=torch.bool)
    other[carry] = False
    plain = other.nonzero().squeeze(1)[: len(carry)]
    x = torch.cat([hidden.x[plain], trigger(hidden.x[carry])])
    return x, torch.arange(len(x)) >= len(plain)


def with_the_true_region(suspect: Suspect, x: Tensor, mask: Tensor, found: Finding, seed: int) -> Tensor:
    """Residuals (N,) with one region for all inputs, by the parabola that the defense fitted."""
    assert suspect.clean is not None
    defense, rng = SentiNet(), generator(seed, "sentinet true region")
    overlays = suspect.clean.x[defense.split(len(suspect.clean.y), rng)[0]]
    inert, sharpness = defense.filling(overlays, rng), sharpness_of(suspect.logits(overlays))
    boundary = Boundary(**found.details["parabola"])
    residuals = []
    for part in torch.split(x, 8):
        region = mask.bool().expand(len(part), 1, -1, -1)
        effect = transplant(
            suspect, part, region, suspect.logits(part).argmax(1), overlays, inert, defense.batch, sharpness=sharpness
        )
        residuals.append((effect.fooled - boundary.height(effect.confidence)).squeeze(1))
    return torch.cat(residuals)


def run(key: dict[str, Any], state: Path | None, *, develop: bool) -> dict[str, Any]:
    """Make or read one backdoored model and answer its row."""
    task, seed = get_task(key["task"]), int(key["seed"])
    model, poisoned = again(task, key["network"], "badnets", seed, state)
    assert isinstance(poisoned.trigger, Patch)
    if develop:
        images, size = task.load("validation"), len(task.secret(seed)[0].y)
        order = torch.randperm(len(images.y), generator=torch.Generator().manual_seed(seed))
        clean, hidden = (Images(images.x[some], images.y[some]) for some in (order[:size], order[size:]))
    else:
        clean, hidden = task.secret(seed)
    plain = Suspect.of(model, task, clean=clean)
    answers = measure(plain.model, hidden, poisoned.trigger)
    assert answers.stamped is not None
    x, stamped = stream_of(plain, hidden, poisoned.trigger, int(key["inputs"]))
    suspect = Suspect.of(model, task, clean=clean, inputs=x)
    maps: dict[str, Any] = {}
    last: Finding | None = None
    for side in SIDES:
        start = time.monotonic()
        found = inspect(SentiNet(side=side), suspect, name="sentinet", seed=seed)
        if not isinstance(found, Finding) or found.input_scores is None:
            raise RuntimeError(f"SentiNet gave no scores: {found}")
        last = found
        flagged = found.input_scores > found.details["threshold"]
        maps[str(side)] = {
            "map": found.details["map"],
            "size": found.details["map_size"],
            "auc": auc(found.input_scores, stamped),
            "frr": float(flagged[~stamped].double().mean()),
            "far": float((~flagged[stamped]).double().mean()),
            "target": found.target,
            "seconds": time.monotonic() - start,
        }
    assert last is not None, "there are sides"
    true = with_the_true_region(suspect, x.to(suspect.device), poisoned.trigger.mask.to(suspect.device), last, seed)
    return {
        **key,
        "split": "validation" if develop else "test",
        "accuracy": accuracy(answers.plain, answers.y),
        "asr": asr(answers.stamped, answers.y, TARGET),
        "maps": maps,
        "true_region_auc": auc(true, stamped),
        "dtype": str(suspect.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "busy": round(os.getloadavg()[0], 2),
        "machine": machine(),
    }


def on_candidates(banks: Path, state: Path) -> None:
    """Append a row per develop model: what the statistics of the triggers are that were recovered from it."""
    task = get_task("mnist5k")
    listed, folder = bank.entries(task.name, task.network, "develop"), folder_of(banks, task.name, task.network)
    there = {row.name: row for row in read_rows(listed, folder)}
    works, defense = backdoored(there.values()), SentiNet()
    state.mkdir(parents=True, exist_ok=True)
    named = {e.name: e for e in listed if e.name in there and (not e.planted or e.name in works)}
    for key in todo(DEVELOP, [{"bank": task.name, "model": name} for name in named]):
        entry = named[key["model"]]
        suspect = Suspect.of(regrow(entry, there[entry.name]), task, clean=divide(task.secret(entry.seed)[0])[0])
        found: dict[str, findings.Outcome] = {}
        for name in ("abs", "neural_cleanse"):
            # Of these weights, by this code: else the answers of another bank would be taken for this one's.
            path = state / f"{entry.name}-{there[entry.name].weights[:12]}-{place_of(name, DEFENSES[name])}.json"
            if path.exists():
                found[name] = findings.load(path)  # type: ignore[assignment]  # written below: an outcome
                continue
            found[name] = inspect(DEFENSES[name](), suspect, name=name, seed=entry.seed)
            if not isinstance(found[name], Finding):
                raise RuntimeError(f"{name} found nothing to judge: {found[name]}")
            findings.save(found[name], path)
        asked = replace(suspect, candidates=candidates(found))
        told = inspect(defense, asked, name="sentinet", seed=entry.seed)
        if not isinstance(told, Finding):
            raise RuntimeError(f"SentiNet gave no score: {told}")
        boundary, threshold = parabola(defense, asked, entry.seed)
        each = [
            {**one, "residual": one["fooled"] - float(boundary.height(torch.tensor([one["confidence"]]))) - threshold}
            for one in told.details["candidates"]
        ]
        seconds = None if told.cost is None else told.cost.seconds
        row = {**key, "hidden": entry.kind if entry.planted else None, "candidates": each, "seconds": seconds}
        append(DEVELOP, {**row, "score": told.score, "threads": torch.get_num_threads(), "machine": machine()})
        print(entry.name, entry.kind, round(told.score or 0.0, 3), flush=True)
    kept = [row for row in rows(DEVELOP) if "bank" in row]
    for name, scores in statistics_of(kept).items():
        print(f"{name}: AUC {auc(torch.tensor(scores), torch.tensor([r['hidden'] is not None for r in kept])):.3f}")


def parabola(defense: SentiNet, suspect: Suspect, seed: int) -> tuple[Boundary, float]:
    """The curve of clean images' own regions and the threshold of others, as for a stream and by the same draws."""
    assert suspect.clean is not None
    rng = generator(seed, "sentinet")
    pasted, fitted, held = defense.split(len(suspect.clean.y), rng)
    overlays = suspect.clean.x[pasted]
    inert, sharpness = defense.filling(overlays, rng), sharpness_of(suspect.logits(overlays))
    path, _ = finest_map(suspect, defense.side, overlays[:LOOKED_AT])

    def look(x: Tensor) -> tuple[Tensor, Tensor]:
        seen = [defense.seen(suspect, path, part, overlays, inert, sharpness) for part in torch.split(x, defense.step)]
        return torch.cat([s.confidence for s in seen]), torch.cat([s.fooled for s in seen])

    confidence, fooled = look(suspect.clean.x[fitted])
    boundary = Boundary.fit(confidence.flatten(), fooled.flatten())
    confidence, fooled = look(suspect.clean.x[held])
    residuals = (fooled - boundary.height(confidence)).amax(1)
    return boundary, conformal_threshold(residuals, defense.rejection)[0]


def statistics_of(kept: list[dict[str, Any]]) -> dict[str, list[float]]:
    """What could be the score of a model, the largest over its recovered triggers, by name; a score per row."""
    ways: dict[str, Callable[[dict[str, Any]], float]] = {
        "the smaller of Fooled and AvgConf": lambda one: min(one["fooled"], one["confidence"]),
        "their product": lambda one: one["fooled"] * one["confidence"],
        "Fooled": lambda one: one["fooled"],
        "AvgConf": lambda one: one["confidence"],
        "residual over the parabola, less the threshold": lambda one: one["residual"],
    }
    return {
        name: [max([way(one) for one in row["candidates"]], default=-1.0) for row in kept] for name, way in ways.items()
    }


def collect() -> None:
    """Write results/rounds_3_4.json."""
    kept, figures = rows(NAME), {}
    for task, network in dict.fromkeys((r["task"], r["network"]) for r in kept):
        found = [r for r in kept if (r["task"], r["network"]) == (task, network)]
        made = {"AUC with the true region": ([r["true_region_auc"] for r in found], 0.95)}
        for side in SIDES:
            made[f"AUC, maps of side {side} or more"] = ([r["maps"][str(side)]["auc"] for r in found], 0.85)
        for what, (values, goal) in made.items():
            figures[f"SentiNet on {task}, {network}, {what}"] = Figure(
                value=spread(values)["median"],
                unit="AUC",
                goal=goal,
                better="higher",
                spread=spread(values),
                seeds=[r["seed"] for r in found],
                command=f"python benchmarks/reproduce_sentinet.py run --task {task} --network {network}",
            )
    print(write("rounds_3_4", figures).read_text())


def main() -> None:
    """Make one row, or collect them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "try", "candidates", "collect"])
    parser.add_argument("--task", choices=["mnist", "cifar10"], default="mnist")
    parser.add_argument("--network", help="default: fast_cifar on cifar10, else the task's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inputs", type=int, default=200, help="stamped inputs, and as many clean ones")
    parser.add_argument("--state", type=Path, help="folder of finished trainings of benchmarks/training.py, or answers")
    parser.add_argument("--banks", type=Path, default=Path("runs/bank"), help="of candidates: folder of banks")
    arguments = parser.parse_args()
    if arguments.what == "collect":
        return collect()
    if arguments.what == "candidates":
        torch.set_num_threads(1)
        return on_candidates(arguments.banks, arguments.state or Path("runs/sentinet"))
    develop = arguments.what == "try"
    own = "fast_cifar" if arguments.task == "cifar10" else get_task(arguments.task).network
    key = {"task": arguments.task, "network": arguments.network or own, "seed": arguments.seed}
    name = DEVELOP if develop else NAME
    for wanted in todo(name, [{**key, "inputs": arguments.inputs}]):
        row = run(wanted, arguments.state, develop=develop)
        append(name, row)
        print({k: v for k, v in row.items() if k != "machine"}, flush=True)
    return None


if __name__ == "__main__":
    main()
