"""Score clean and backdoored reference models: figures of Neural Cleanse's page.

They came with the package before there was the model bank; benchmarks/bank.py makes what comes with it now.

    python benchmarks/populations.py mnist5k --clean 59 --planted 15

One row per model is appended to results/population-TASK-NETWORK.jsonl, so an interrupted run goes on. The models
are made again from their seeds; no weights are kept. None of them is ever judged by the figures that we report.
"""

import argparse
import queue
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from molehunt.attacks import Attack, BadNets, Blended, poison
from molehunt.calibration import settings, statistic
from molehunt.checkpoints import assemble, layout_of, read_safetensors
from molehunt.defenses import DEFENSES
from molehunt.engine import Processes
from molehunt.examination import divide, examine
from molehunt.findings import Finding
from molehunt.game.answers import accuracy, asr, measure
from molehunt.game.entries import Job, Settings, run
from molehunt.isolation import Sandbox
from molehunt.runner import configuration, generator
from molehunt.suspect import Suspect
from molehunt.tasks import get_task
from molehunt.triggers import Patch
from record import append, rows

SCORED = ("neural_cleanse", "strip")  # pure repairs have no score
SEED = 40_000  # far from the seeds of games and of every other benchmark


def attack(task: Any, number: int) -> Attack:
    """Draw the backdoor of a planted reference: a patch anywhere, a blend, or a map of all classes."""
    rng = generator(SEED + number, "population attack")
    target = int(torch.randint(task.num_classes, (1,), generator=rng))
    _, height, width = task.shape
    size = int(torch.randint(2, 6, (1,), generator=rng))
    top = int(torch.randint(height - size + 1, (1,), generator=rng))
    left = int(torch.randint(width - size + 1, (1,), generator=rng))
    mask = Patch.square(task.shape, size=size, color="white", at=(top, left)).mask
    patch = Patch(mask=mask, pattern=torch.rand(task.shape, generator=rng).round() * mask)
    kind = number % 3
    if kind == 0:
        return BadNets(target=target, trigger=patch)
    return Blended(target=target) if kind == 1 else BadNets(target="all", trigger=patch)


def main() -> None:
    """Train, score, append, and write the population."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task")
    parser.add_argument("--network")
    parser.add_argument("--clean", type=int, default=59)
    parser.add_argument("--planted", type=int, default=15)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task = get_task(arguments.task)
    network = arguments.network or task.network
    name = f"population-{task.name}-{network}"
    game = Settings(task=task.name, network=network, seed=SEED)
    defenses = {d: DEFENSES[d]() for d in SCORED}
    kept = {
        row["name"]: row
        for row in rows(name)
        if all(row["defenses"].get(d, {}).get("configuration") == configuration(defenses[d]) for d in defenses)
    }
    wanted: list[tuple[str, Attack | None]] = [(f"clean {i}", None) for i in range(arguments.clean)]
    wanted += [(f"planted {i}", attack(task, i)) for i in range(arguments.planted)]
    boxes: queue.SimpleQueue[Sandbox] = queue.SimpleQueue()
    for _ in range(arguments.workers):
        boxes.put(Sandbox(threads=1))
    lock = threading.Lock()
    with tempfile.TemporaryDirectory() as folder:
        jobs = [
            Job(settings=game, name=n, attack=a, path=Path(folder) / f"{n}.safetensors")
            for n, a in wanted
            if n not in kept
        ]

        def score(job: Job) -> None:
            box = boxes.get()
            start = time.monotonic()
            layout = layout_of(network, task.shape, task.num_classes)
            model = assemble(read_safetensors(job.path, layout), network, task.shape, task.num_classes)
            clean, hidden = task.secret(game.seed_for(f"split of {job.name}"))
            suspect = Suspect.of(model, task, clean=divide(clean)[0])
            outcomes = dict(
                examine(suspect, defenses, lambda n, d, s: box.inspect(d, s, name=n, seed=game.seed_for(job.name)))
            )
            boxes.put(box)
            poisoned = None if job.attack is None else poison(job.attack, hidden, task, generator(0, "unused"))
            trigger = None if poisoned is None else poisoned.trigger
            answers = measure(model, type(hidden)(hidden.x[:1000], hidden.y[:1000]), trigger)
            found = {n: o for n, o in outcomes.items() if isinstance(o, Finding)}
            row = {
                "name": job.name,
                "seed": game.seed_for(job.name),
                "attack": None if job.attack is None else type(job.attack).__name__,
                "accuracy": accuracy(answers.plain, answers.y),
                "asr": None
                if poisoned is None or answers.stamped is None or isinstance(job.attack, Blended)
                else asr(answers.stamped, answers.y, poisoned.target),
                "scores": {n: statistic(o) for n, o in found.items()},
                "defenses": {n: settings(o) for n, o in found.items()},
                "versions": dict(next(iter(found.values())).record["versions"]) if found else {},
                "dtype": next(iter(found.values())).record["dtype"] if found else "float32",
                "failed": {n: str(o) for n, o in outcomes.items() if n not in found},
                "seconds": time.monotonic() - start,
            }
            with lock:
                append(name, row)
                kept[job.name] = row
                print(f"{len(kept)}/{len(wanted)} {job.name} {row['scores']} acc {row['accuracy']:.3f}", flush=True)

        with ThreadPoolExecutor(arguments.workers) as pool:
            waiting = []
            # Trained and scored in turns, so that no more processes work than there are cores.
            step = 2 * arguments.workers
            for i in range(0, len(jobs), step):
                for job, _ in zip(
                    jobs[i : i + step], Processes(arguments.workers).map(run, jobs[i : i + step]), strict=True
                ):
                    waiting.append(pool.submit(score, job))
                for future in waiting:
                    future.result()
                waiting.clear()
    while not boxes.empty():
        boxes.get().close()


if __name__ == "__main__":
    main()
