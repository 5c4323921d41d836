"""How many random starts Neural Cleanse needs: one long search per model, of which fewer starts are parts.

    python benchmarks/neural_cleanse_starts.py run --task cifar10 --network narrow_cifar --banks FOLDER
    python benchmarks/neural_cleanse_starts.py show

Models of the bank's develop partition. Every class is searched from ten random starts, with the default schedule, and
the patch of each start is confirmed on held-out images, as the defense does. A row holds norm and success of all of
them; what the defense would have said with fewer starts is read from the first so many. `show` prints, by number of
starts, the AUC of the score and how often the smallest patch names the target of a backdoored model.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch

from molehunt import bank
from molehunt.bank.rows import backdoored, folder_of, poisoned, read_rows, regrow
from molehunt.defenses import NeuralCleanse
from molehunt.defenses._inversion import invert, random_start, schedule_batches
from molehunt.defenses._statistics import smallness
from molehunt.defenses.neural_cleanse import _success
from molehunt.examination import divide
from molehunt.runner import generator
from molehunt.suspect import Suspect
from molehunt.tasks import Images, get_task
from molehunt.testing import auc
from molehunt.triggers import Patch
from record import append, machine, rows, todo

NAME, STARTS = "neural_cleanse-starts", 10


def searched(key: dict[str, Any], banks: Path) -> dict[str, Any]:
    """Search one model from all starts."""
    task = get_task(key["task"])
    listed = bank.entries(key["task"], key["network"], "develop")
    (entry,) = [e for e in listed if e.name == key["model"]]
    there = {row.name: row for row in read_rows(listed, folder_of(banks, key["task"], key["network"]))}
    row = there[entry.name]
    defense = NeuralCleanse(restarts=STARTS)
    suspect = Suspect.of(regrow(entry, row), task, clean=divide(task.secret(entry.seed)[0])[0])
    clean = suspect.clean
    assert clean is not None
    rng, start = generator(entry.seed, "starts"), time.monotonic()
    order = torch.randperm(len(clean.y), generator=rng)
    kept = max(1, round(defense.holdout * len(order)))
    held = Images(clean.x[order[:kept]], clean.y[order[:kept]])
    x, classes = clean.x[order[kept:]], task.num_classes
    begin = random_start(STARTS * classes, task.shape, rng, defense.start)
    batches = schedule_batches(len(x), defense.schedule, rng)
    targets = torch.arange(classes).repeat(STARTS)
    ends = invert(suspect.forward, x, targets, begin, batches, defense.schedule, limit=defense.limit)
    norms = ends.mask.double().sum(dim=(1, 2, 3))
    success = [
        _success(suspect, held, Patch(mask=ends.mask[i], pattern=ends.pattern[i]), int(targets[i])) if works else 0.0
        for i, works in enumerate(ends.works.tolist())
    ]
    made = poisoned(entry)
    return {
        **key,
        "hidden": row.kind if row.planted else None,
        "works": entry.name in backdoored(there.values()),
        # Classes that stamped images are sent to, with their shares.
        "mix": None if made is None else made.target.mix(classes).tolist(),
        "norms": norms.view(STARTS, classes).tolist(),
        "success": torch.tensor(success).view(STARTS, classes).tolist(),
        "seconds": time.monotonic() - start,
        "threads": torch.get_num_threads(),
        "busy": round(os.getloadavg()[0], 2),
        "machine": machine(),
    }


def told(row: dict[str, Any], starts: int) -> tuple[float, int]:
    """Score and class of the smallest patch, had there been so many starts."""
    norms = torch.tensor(row["norms"], dtype=torch.float64)[:starts]
    works = torch.tensor(row["success"])[:starts] >= NeuralCleanse().confirm
    best = torch.where(works, norms, torch.inf).min(0).values
    found = best.isfinite()
    if int(found.sum()) < 2:
        return 0.0, int(best.argmin())
    best[~found] = best[found].max()
    return float(smallness(best.log(), NeuralCleanse().floor).max()), int(best.argmin())


def show() -> None:
    """Print what so many starts give."""
    kept = rows(NAME)
    for task, network in dict.fromkeys((row["task"], row["network"]) for row in kept):
        mine = [row for row in kept if (row["task"], row["network"]) == (task, network)]
        clean = [row for row in mine if row["hidden"] is None]
        planted = [row for row in mine if row["hidden"] is not None and row["works"]]
        patches = [row for row in planted if row["hidden"] in {"badnets", "tact"}]
        print(f"{task}, {network}: {len(clean)} clean, {len(planted)} backdoored, {len(patches)} of them by patches")
        for starts in (1, 2, 3, 4, 6, 8, 10):
            line = f"{starts:2} starts"
            for what, some in (("all", planted), ("patches", patches)):
                scores = torch.tensor([told(row, starts)[0] for row in [*clean, *some]], dtype=torch.float64)
                right = [row["mix"][told(row, starts)[1]] > 0 for row in some]
                line += f"; {what}: AUC {auc(scores, torch.arange(len(scores)) >= len(clean)):.3f}, "
                line += f"right class {sum(right)} of {len(right)}"
            print(line)


def main() -> None:
    """Make rows, or print what they say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "show"])
    parser.add_argument("--task", default="cifar10")
    parser.add_argument("--network", help="default: the task's own")
    parser.add_argument("--banks", type=Path, default=Path("runs/bank"), help="folder of banks")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.what == "show":
        return show()
    network = arguments.network or get_task(arguments.task).network
    there = read_rows(
        bank.entries(arguments.task, network, "develop"), folder_of(arguments.banks, arguments.task, network)
    )
    keys = [{"task": arguments.task, "network": network, "model": row.name} for row in there]
    for key in todo(NAME, keys):
        row = searched(key, arguments.banks)
        append(NAME, row)
        print(
            {k: row[k] for k in ("model", "hidden", "seconds")},
            [told(row, n) for n in (1, 3, 10)],
            row["mix"],
            flush=True,
        )
    return None


if __name__ == "__main__":
    main()
