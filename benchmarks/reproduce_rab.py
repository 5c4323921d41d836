"""RAB: the exact K-NN vote against draws of the noise, and a vote of networks that tells poisoned sets from clean ones.

    python benchmarks/reproduce_rab.py knn                      MNIST 0 against 1: time, and agreement with draws
    python benchmarks/reproduce_rab.py bank --banks FOLDER      sets of the bank's evaluate partition under the vote
    python benchmarks/reproduce_rab.py collect                  results/rounds_3_4.json from the rows

`knn`: all 12 665 training pictures of the two digits, noise of standard deviation 1 on each of the 784 values, the
first test pictures. A row per number of neighbors: seconds per test picture, and on the first `--checked` of them the
probability of class 1 by 100 000 draws of all distances, each noncentral chi-square, beside the exact bracket.

`bank`: the first clean and backdoored mnist5k models of the evaluate partition, with the sets that they were trained
from, clean images as everywhere, and the default settings. A row per model: score, the mean share of votes against
poisoned rows and against the others, accuracy of the vote and of the judged model, success of the trigger on it and on
the network that is handed back.
"""

import argparse
import copy
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from molehunt import bank
from molehunt.bank.rows import backdoored, folder_of, poisoned, read_rows, regrow
from molehunt.defenses import RAB
from molehunt.defenses._nearest import vote_bounds
from molehunt.examination import divide
from molehunt.findings import Finding
from molehunt.game.answers import accuracy, asr, measure
from molehunt.runner import configuration, generator, inspect
from molehunt.suspect import Suspect
from molehunt.tasks import Split, get_task
from molehunt.testing import auc
from record import Figure, append, fill, machine, rows, spread, todo, write

NAME, RESULT = "rab", "rounds_3_4"
SIGMA, DRAWS, CHUNK = 1.0, 100_000, 200
TASK = "mnist5k"


def digits(split: Split) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Pictures (n, 784) of zeros and ones in float64, and their digits."""
    images = get_task("mnist").load(split)
    x, y = images.x, images.y
    if split == "train":  # both public parts: what the paper calls the training set
        more = get_task("mnist").load("validation")
        x, y = torch.cat([x, more.x]), torch.cat([y, more.y])
    two = y <= 1
    return x[two].flatten(1).double().numpy(), y[two].numpy()


def drawn(x: np.ndarray[Any, Any], train: np.ndarray[Any, Any], y: np.ndarray[Any, Any], k: int, seed: int) -> float:
    """Share of draws of the noise in which the k nearest points vote for class 1."""
    rng = np.random.default_rng(seed)
    root = np.sqrt(((train - x) ** 2).sum(1)) / SIGMA
    won = 0
    for _ in range(DRAWS // CHUNK):
        distance = (root + rng.standard_normal((CHUNK, len(root)))) ** 2
        distance += rng.chisquare(train.shape[1] - 1, (CHUNK, len(root)))
        first = distance.argmin(1)[:, None] if k == 1 else np.argpartition(distance, k, axis=1)[:, :k]
        won += int((2 * y[first].sum(1) > k).sum())
    return won / DRAWS


def knn(inputs: int, checked: int) -> None:
    """Make a row per number of neighbors."""
    train, y = digits("train")
    test, truth = digits("test")
    for key in todo(NAME, [{"what": "knn", "neighbors": k, "inputs": inputs, "checked": checked} for k in (1, 3)]):
        k, seconds, right, widths, checks = int(key["neighbors"]), [], 0, [], []
        busy = round(os.getloadavg()[0], 2)
        for number in range(inputs):
            start = time.monotonic()
            bounds = vote_bounds(test[number], train, y, 2, SIGMA, neighbors=k)
            seconds.append(time.monotonic() - start)
            right += int(bounds.low.argmax() == truth[number])
            widths.append(float(bounds.high[1] - bounds.low[1]))
            if number < checked:
                share = drawn(test[number], train, y, k, number)
                error = max((share * (1 - share) / DRAWS) ** 0.5, 1 / DRAWS)
                low, high = float(bounds.low[1]), float(bounds.high[1])
                beyond = max(low - share, share - high, 0.0) / error
                checks.append({"drawn": share, "low": low, "high": high, "standard_errors_outside": beyond})
        row = {**key, "training": len(y), "sigma": SIGMA, "seconds": spread(seconds), "right": right / inputs}
        row |= {"width": spread(widths), "checks": checks, "threads": torch.get_num_threads(), "busy": busy}
        append(NAME, {**row, "machine": machine()})
        print(row, flush=True)


def judged(key: dict[str, Any], banks: Path) -> dict[str, Any]:
    """Let RAB judge one model of the bank by the set that it was trained from."""
    task = get_task(TASK)
    (entry,) = [e for e in bank.entries(TASK, task.network, "evaluate") if e.name == key["model"]]
    (row,) = read_rows((entry,), folder_of(banks, TASK, task.network))
    made = poisoned(entry)
    training = task.load("train") if made is None else made.stamped()
    model = regrow(entry, row)
    suspect = Suspect.of(model, task, clean=divide(task.secret(entry.seed)[0])[0], training=training)
    found = inspect(RAB(), suspect, name="rab", seed=entry.seed)
    if not isinstance(found, Finding) or found.sample_scores is None or found.repaired is None:
        raise RuntimeError(f"RAB gave no answer: {found}")
    student = copy.deepcopy(suspect.model).cpu()
    student.load_state_dict(dict(found.repaired))
    trigger = None if made is None else made.trigger
    before, after = (measure(one, task.load("test"), trigger) for one in (model, student))
    told: dict[str, Any] = {"hidden": row.kind if row.planted else None, "score": found.score}
    told |= {"radius": found.radius, "vote_accuracy": found.details["accuracy"]}
    told["accuracy"] = [accuracy(a.plain, a.y) for a in (before, after)]
    if made is not None and before.stamped is not None and after.stamped is not None:
        told["asr"] = [asr(a.stamped, a.y, made.target) for a in (before, after) if a.stamped is not None]
        told["against"] = [float(found.sample_scores[some].mean()) for some in (made.altered, ~made.altered)]
    return {
        **key,
        **told,
        "seconds": None if found.cost is None else found.cost.seconds,
        "threads": torch.get_num_threads(),
        "busy": round(os.getloadavg()[0], 2),
        "machine": machine(),
    }


def on_bank(banks: Path, most: int) -> None:
    """Make a row per model whose backdoor works, or that is clean."""
    task = get_task(TASK)
    listed = bank.entries(TASK, task.network, "evaluate")
    there = {row.name: row for row in read_rows(listed, folder_of(banks, TASK, task.network))}
    works = backdoored(there.values())
    clean = [e.name for e in listed if e.name in there and not e.planted][:most]
    planted = [e.name for e in listed if e.name in works][:most]
    told = configuration(RAB())
    keys = [{"what": "bank", "model": name, "settings": told} for name in [*clean, *planted]]
    fill(NAME, keys, lambda key: judged(key, banks))


def collect() -> None:
    """Write results/rounds_3_4.json."""
    figures: dict[str, Figure] = {}
    for row in (row for row in rows(NAME) if row["what"] == "knn"):
        worst = max((check["standard_errors_outside"] for check in row["checks"]), default=None)
        figures[f"RAB, exact {row['neighbors']}-NN, MNIST 0/1, {row['training']} points, time per input"] = Figure(
            value=row["seconds"]["median"],
            unit="s",
            goal=0.5 if row["neighbors"] == 1 else None,
            better="lower",
            spread=row["seconds"],
            command="python benchmarks/reproduce_rab.py knn",
            note=f"{row['threads']} thread, load {row['busy']}; on {row['checked']} inputs {DRAWS} draws lie at most "
            f"{worst:.2f} standard errors outside the bracket, whose median width is {row['width']['median']:.1e}",
        )
    kept = [row for row in rows(NAME) if row["what"] == "bank"]
    if kept:
        truth = torch.tensor([row["hidden"] is not None for row in kept])
        scores = torch.tensor([row["score"] for row in kept], dtype=torch.float64)
        rng, drawn_ = generator(0, "rab interval"), []
        groups = [truth.nonzero().squeeze(1), (~truth).nonzero().squeeze(1)]
        for _ in range(2_000):
            some = torch.cat([g[torch.randint(len(g), (len(g),), generator=rng)] for g in groups])
            drawn_.append(auc(scores[some], truth[some]))
        ends = torch.tensor(drawn_).double().quantile(torch.tensor([0.025, 0.975]).double()).tolist()
        figures["RAB on sets of the bank, mnist5k, AUC"] = Figure(
            value=auc(scores, truth),
            unit="share",
            goal=None,
            better="higher",
            spread=ends,
            command="python benchmarks/reproduce_rab.py bank",
            note=f"{int((~truth).sum())} clean and {int(truth.sum())} poisoned sets",
        )
    print(write(RESULT, figures).read_text())


def main() -> None:
    """Make rows, or collect them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["knn", "bank", "collect"])
    parser.add_argument("--inputs", type=int, default=20, help="test pictures that are timed")
    parser.add_argument("--checked", type=int, default=3, help="of them, how many are compared with draws")
    parser.add_argument("--banks", type=Path, default=Path("runs/bank"), help="folder of banks")
    parser.add_argument("--most", type=int, default=20, help="clean models, and backdoored ones")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.what == "collect":
        return collect()
    if arguments.what == "knn":
        return knn(arguments.inputs, arguments.checked)
    return on_bank(arguments.banks, arguments.most)


if __name__ == "__main__":
    main()
