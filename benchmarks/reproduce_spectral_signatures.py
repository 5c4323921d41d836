"""How many poisoned samples spectral signatures find, and what training again without them leaves of the backdoor.

    python benchmarks/reproduce_spectral_signatures.py run --epsilon 0.05 --seed 0      CIFAR-10, airplane to bird
    python benchmarks/reproduce_spectral_signatures.py run --source all --epsilon 0.1   the case that it cannot solve
    python benchmarks/reproduce_spectral_signatures.py run --task mnist5k --source 0 --target 2 --size 4
    python benchmarks/reproduce_spectral_signatures.py time                             50 000 features, scores alone
    python benchmarks/reproduce_spectral_signatures.py collect       results/rounds_1_2.json from the rows

`run` trains one network on a poisoned set, hands that set to the defense and appends one row per pair of classes, share
and seed to results/spectral_signatures.jsonl; a row that is there already is not made again. With `--state` the first
training can be interrupted; training again, inside the defense, cannot. The test split measures.

Attack: as many images of the source as a share of the target class (of the whole training set, from all classes, with
`--source all`) get the trigger and the label of the target, on top of the images that the target has. The trigger is
one pixel at row 11 and column 16 with the color (101, 0, 25) of 255, as in the authors' code; on gray pictures, and
with a larger `--size`, a white square there. It is stamped on the set that is handed over; in training, after
augmentation.

The defense assumes the true share, as the paper does, at most one half; so it removes 1.5 times as many as there are
poisoned samples. What it would have found with its default share, and with the one that the largest gap gives, is
computed from the same scores. `time` measures the scores of random features beside one SVD per class in float32.
"""

import argparse
import copy
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molehunt.attacks import BadNets
from molehunt.defenses._spectra import class_spectra, coordinates, largest_gaps
from molehunt.defenses.spectral_signatures import SpectralSignatures, marked, removal_counts
from molehunt.findings import Finding
from molehunt.game.answers import accuracy, asr, measure
from molehunt.game.attacker import train_model
from molehunt.runner import generator, inspect
from molehunt.suspect import Suspect
from molehunt.tasks import Task, get_task
from molehunt.testing import auc
from molehunt.training import recipe_for
from molehunt.triggers import Patch, Target
from record import Figure, append, machine, rows, spread, todo, write

NAME = "spectral_signatures"
GOALS = {0.05: 0.77, 0.1: 0.98}  # share of the poisoned samples found, airplane to bird, by epsilon


def attack_of(task: Task, source: str, target: str, epsilon: float, size: int) -> tuple[BadNets, Target]:
    """Make the attack on a pair of classes, or on one class from all others, and say where it sends images."""
    for name in {source, target} - {"all"}:
        if name not in task.classes:
            raise SystemExit(f"{task.name} has no class {name!r}; it has {', '.join(task.classes)}")
    goal = task.classes.index(target)
    y = task.load("train").y
    pixel = size == 1 and task.shape[0] == 3
    color = (101 / 255, 0.0, 25 / 255) if pixel else "white"
    trigger = Patch.square(task.shape, size=size, color=color, at=(11, 16))
    if source == "all":
        return BadNets(target=goal, poison_rate=epsilon, trigger=trigger), Target(classes=goal)
    sources = (task.classes.index(source),)
    rate = round(epsilon * int((y == goal).sum())) / len(y)
    # Without covers, as in the paper: the trigger may work on other classes too, which is not measured.
    made = BadNets(target=goal, sources=sources, cover_rate=0.0, poison_rate=rate, trigger=trigger)
    return made, Target(classes=goal, sources=sources)


def found(gone: Tensor, poison: Tensor) -> dict[str, float]:
    """Share of the poisoned samples that are among the removed ones, and share of these that are poisoned."""
    hits = float((gone & poison).sum())
    return {"recall": hits / float(poison.sum()), "precision": hits / max(1.0, float(gone.sum()))}


def run(key: dict[str, Any], state: Path | None) -> None:
    """Poison, train, ask the defense, measure, and append the row."""
    if not list(todo(NAME, [key])):
        print("this row is there already")
        return
    task, network = get_task(key["task"]), key["network"]
    attack, target = attack_of(task, key["source"], key["target"], key["epsilon"], key["size"])
    name = "-".join(str(key[k]).replace(" ", "_") for k in ("task", "network", "source", "target", "epsilon", "seed"))
    start = time.monotonic()
    model, poisoned = train_model(
        task,
        network,
        recipe_for(network, task),
        attack,
        rng=generator(key["seed"], f"spectral signatures {network}"),
        checkpoint=state / f"{name}.pt" if state else None,
    )
    trained = time.monotonic() - start
    assert poisoned is not None
    training, poison = poisoned.stamped(), poisoned.altered
    goal = task.classes.index(key["target"])
    in_target = training.y == goal
    share = float(poison.sum()) / float(in_target.sum())
    defense = SpectralSignatures(epsilon=min(0.5, share), score=key["score"])
    suspect = Suspect.of(model.eval(), task, training=training)
    busy = os.getloadavg()[0]
    said = inspect(defense, suspect, name=NAME, seed=key["seed"])
    if not isinstance(said, Finding) or said.sample_scores is None or said.class_scores is None:
        raise RuntimeError(f"spectral signatures gave no scores: {said}")
    assert said.cost is not None
    assert said.repaired is not None, said.details["warnings"]
    scores, sizes = said.sample_scores, torch.tensor(said.details["sizes"])
    gone = torch.zeros(len(poison), dtype=torch.bool)
    gone[said.details["removed"]] = True
    gaps = largest_gaps(scores, training.y, task.num_classes) / sizes
    others = {"default": torch.full(sizes.shape, 0.05), "gap": gaps}
    again = copy.deepcopy(model)
    again.load_state_dict(dict(said.repaired))
    test = task.load("test")
    before, after = (measure(m.eval(), test, poisoned.trigger) for m in (model, again))
    assert before.stamped is not None
    assert after.stamped is not None
    row = {
        **key,
        "poisoned": int(poison.sum()),
        "share": share,
        "removed": int(gone.sum()),
        "left": int((poison & ~gone).sum()),
        **found(gone & in_target, poison),
        "auc": auc(scores[in_target], poison[in_target]),
        "auc_everywhere": auc(scores, poison),
        "others": {
            k: found(marked(scores, training.y, removal_counts(sizes, e)) & in_target, poison)
            for k, e in others.items()
        },
        "class_scores": [round(v, 4) for v in said.class_scores.tolist()],
        "target_is_highest": int(said.class_scores.argmax()) == goal,
        "variance_share": [round(v, 4) for v in said.details["variance_share"].tolist()],
        "directions": said.details.get("directions"),
        "warned_of_target": any(text.startswith(f"class {goal}:") for text in said.details["warnings"]),
        "accuracy": accuracy(before.plain, before.y),
        "asr": asr(before.stamped, before.y, target),
        "natural_rate": asr(after.plain, after.y, target),
        "accuracy_after": accuracy(after.plain, after.y),
        "asr_after": asr(after.stamped, after.y, target),
        "seconds": said.cost.seconds,
        "trained_seconds": trained,
        "dtype": str(suspect.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "busy": round(busy, 2),
        "machine": machine(),
    }
    append(NAME, row)
    print({k: v for k, v in row.items() if k != "machine"}, flush=True)


def peers(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Squared centered coordinates (N,) by one full SVD per class in float32, as public code takes it."""
    scores = torch.zeros(len(labels))
    for k in range(classes):
        rows = (labels == k).nonzero().squeeze(1)
        centered = features[rows] - features[rows].mean(0)
        scores[rows] = (centered @ torch.linalg.svd(centered, full_matrices=False).Vh[0]).square()
    return scores


def clock(samples: int, width: int, repeats: int, seed: int) -> None:
    """Time the scores of random features of ten classes, beside one SVD per class, in turn; append the row."""
    key = {"what": "time", "samples": samples, "width": width, "threads": torch.get_num_threads(), "seed": seed}
    if not list(todo(NAME, [key])):
        print("this row is there already")
        return
    rng = torch.Generator().manual_seed(seed)
    # Falling variances, and every class around a mean of its own; with equal ones the leading axis would be chance.
    scales = torch.arange(1, width + 1).float().rsqrt()
    labels = torch.arange(samples) % 10
    features = torch.randn(samples, width, generator=rng) * scales + torch.randn(10, width, generator=rng)[labels]
    busy, ours, theirs = os.getloadavg()[0], [], []
    for _ in range(repeats):
        start = time.perf_counter()
        spectra = class_spectra(features, labels, 10)
        scores = coordinates(features, labels, spectra)[:, 0].square()
        marked(scores, labels, removal_counts(spectra.sizes, torch.full((10,), 0.05)))
        ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        other = peers(features, labels, 10)
        theirs.append(time.perf_counter() - start)
    row = {
        **key,
        "ours": ours,
        "svd": theirs,
        "off": float((scores - other).abs().max() / scores.max()),
        "busy": round(busy, 2),
        "machine": machine(),
    }
    append(NAME, row)
    print({k: v for k, v in row.items() if k != "machine"}, flush=True)


def collect() -> None:
    """Write results/rounds_1_2.json."""
    kept, figures = rows(NAME), {}
    ran = [r for r in kept if "source" in r]
    fields = ("task", "network", "source", "target", "epsilon", "score", "size")
    for group in dict.fromkeys(tuple(r[f] for f in fields) for r in ran):
        mine = [r for r in ran if tuple(r[f] for f in fields) == group]
        task, network, source, target, epsilon, score, size = group
        paper = (task, source, target, score, size) == ("cifar10", "airplane", "bird", "squared", 1)
        made: list[tuple[str, list[float], float | None, Any]] = [
            ("share of poison found", [r["recall"] for r in mine], GOALS.get(epsilon) if paper else None, "higher"),
            ("AUC within the target class", [r["auc"] for r in mine], None, "higher"),
            ("accuracy before", [r["accuracy"] for r in mine], None, "higher"),
            ("ASR before", [r["asr"] for r in mine], None, "higher"),
            ("ASR after", [r["asr_after"] for r in mine], 0.02 if paper else None, "lower"),
            ("natural rate after", [r["natural_rate"] for r in mine], None, "lower"),
            (
                "accuracy lost",
                [r["accuracy"] - r["accuracy_after"] for r in mine],
                0.003 if paper else None,
                "lower",
            ),
            ("target has the highest class score", [float(r["target_is_highest"]) for r in mine], None, "higher"),
        ]
        for what, values, goal, better in made:
            figures[f"{task}, {network}, {source} to {target}, {epsilon:g}, {score}, {size} px, {what}"] = Figure(
                value=spread(values)["median"],
                unit="share",
                goal=goal,
                better=better,
                spread=spread(values),
                seeds=[r["seed"] for r in mine],
                command=f"python benchmarks/reproduce_spectral_signatures.py run --task {task} --network {network} "
                f"--source '{source}' --target '{target}' --epsilon {epsilon:g} --score {score} --size {size}",
                note=f"{mine[0]['dtype']}; load before each run {[r['busy'] for r in mine]}",
            )
    for row in (r for r in kept if r.get("what") == "time"):
        what = f"{row['samples']} x {row['width']}, {row['threads']} threads"
        ours, theirs = statistics.median(row["ours"]), statistics.median(row["svd"])
        for name, value, unit, goal, better, over in (
            ("scores, time", ours, "s", None, "lower", spread(row["ours"])),
            ("one SVD per class, time", theirs, "s", None, "lower", spread(row["svd"])),
            ("scores, times as fast as one SVD per class", theirs / ours, "x", 15.0, "higher", None),
            ("scores, largest difference to it", row["off"], "share of the largest", 1e-3, "lower", None),
        ):
            figures[f"{what}, {name}"] = Figure(
                value=value,
                unit=unit,
                goal=goal,
                better=better,  # type: ignore[arg-type]  # one of the two words, from the table above
                spread=over,
                seeds=[row["seed"]],
                command=f"python benchmarks/reproduce_spectral_signatures.py time --width {row['width']}",
                note=f"load before {row['busy']}",
            )
    print(write("rounds_1_2", figures).read_text())


def main() -> None:
    """Run one model, take the time, or collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "time", "collect"])
    parser.add_argument("--task", default="cifar10")
    parser.add_argument("--network", help="the task's own by default")
    parser.add_argument("--source", default="airplane", help='name of a class, or "all"')
    parser.add_argument("--target", default="bird", help="name of a class")
    parser.add_argument("--epsilon", type=float, default=0.05, help="share of the class, or of all images, poisoned")
    parser.add_argument("--size", type=int, default=1, help="side of the trigger in pixels")
    parser.add_argument("--score", choices=["squared", "quantum"], default="squared")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, help="folder for the state of the first training")
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    a = parser.parse_args()
    if a.what == "collect":
        collect()
    elif a.what == "time":
        clock(a.samples, a.width, a.repeats, a.seed)
    else:
        network = a.network or get_task(a.task).network
        key = {"task": a.task, "network": network, "source": a.source, "target": a.target, "epsilon": a.epsilon}
        run({**key, "size": a.size, "score": a.score, "seed": a.seed}, a.state)


if __name__ == "__main__":
    main()
