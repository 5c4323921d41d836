"""The model bank at its real size: rows of its models and of what the defenses scored, which outlive caches.

    python benchmarks/bank.py run --task mnist5k --partition calibrate --jobs 2     trains, then scores
    python benchmarks/bank.py ship --task mnist5k                                   the calibration of the package
    python benchmarks/bank.py export --task mnist --partition evaluate --most 50 --to FRESH.json
    python benchmarks/bank.py collect                                               results/bank.json

`run` does what `molehunt bank build` and `molehunt calibrate` do, and appends every finished model and every scored one
to results/bank-TASK-NETWORK.jsonl at once. It begins by laying those rows where the bank looks for them, so that on a
new machine only the missing ones are made. Weights are cached and never required: a model to be scored whose weights
are gone is trained again from its seed, on the same kind of machine to the same bytes.

`ship` writes src/molehunt/populations/TASK-NETWORK.json from the rows of the calibrate partition, which has to be
complete. `export` writes such a file of another partition, or of its first models, for `calibration.py null`.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import molehunt
from molehunt import bank, calibration
from molehunt.bank import scores
from molehunt.bank.roster import OPAQUE
from molehunt.bank.rows import backdoored, folder_of
from molehunt.bank.scored import Scored
from molehunt.commands.evaluation import Elsewhere
from molehunt.datasets import cache
from molehunt.defenses import Defense, available
from molehunt.engine import Processes
from molehunt.networks import default_device
from molehunt.tasks import get_task
from record import RESULTS, Figure, append, rows, spread, write

SECONDS = 600.0
"""Time limit for one defense on one model, as `molehunt calibrate` has it."""


def everyone() -> dict[str, Defense]:
    """All defenses, with their default settings."""
    return {name: kind() for name, kind in available().items()}


def name_of(task: str, network: str) -> str:
    """Name of the file of rows."""
    return f"bank-{task}-{network}"


def restore(task: str, network: str, root: Path) -> Path:
    """Lay the kept rows where the bank looks for them, the latest of each; return the folder of the bank."""
    folder = folder_of(root, task, network)
    (folder / "scores").mkdir(parents=True, exist_ok=True)
    for kept in rows(name_of(task, network)):
        place = folder / ("scores" if "asked" in kept["row"] else ".")
        (place / f"{kept['row']['name']}.json").write_text(json.dumps(kept["row"]))
    return folder


def adopt(task: str, network: str, folder: Path) -> None:
    """Keep the rows that are on disk alone: of models that were finished out of turn when a run was killed."""
    name = name_of(task, network)
    kept = rows(name)
    for path in sorted([*folder.glob("*.json"), *folder.glob("scores/*.json")]):
        row, at = json.loads(path.read_text()), round(path.stat().st_mtime)
        alike = [one for one in kept if (one["row"]["name"], "asked" in one["row"]) == (row["name"], "asked" in row)]
        # What was kept later, maybe by another machine, is newer than what lies here.
        if not any(one["row"] == row or one.get("at", 0) > at for one in alike):
            append(name, {"busy": None, "at": at, "row": row})


def run(task: str, network: str, partition: str, most: int | None, jobs: int, root: Path) -> None:
    """Train the missing models of a partition and score them, and keep the rows."""
    # First what is on disk alone, then the rest over it: a finished row must not be replaced by an older one.
    adopt(task, network, folder_of(root, task, network))
    folder, name = restore(task, network, root), name_of(task, network)
    listed = bank.entries(task, network, partition, most=most)
    torch.set_num_threads(1)

    def keep(row: bank.Row | Scored) -> None:
        append(name, {"busy": round(os.getloadavg()[0], 2), "at": round(time.time()), "row": asdict(row)})

    def grown(row: bank.Row, done: int, total: int) -> None:
        keep(row)
        rate = "" if row.asr is None else f", ASR {row.asr:.1%}"
        print(f"{done}/{total} {row.name} {row.kind}: {row.accuracy:.1%}{rate}, {row.seconds:.0f} s", flush=True)

    def scored(found: Scored) -> None:
        keep(found)
        print(found.name, {k: round(v, 3) for k, v in found.scores.items() if v is not None}, found.failed, flush=True)

    bank.build(listed, folder, processes=jobs, report=grown)
    scores.score(
        listed,
        folder,
        everyone(),
        # A sandbox has no GPU.
        Elsewhere(isolated=default_device().type == "cpu", seconds=SECONDS),
        engine=Processes(jobs, 1) if jobs > 1 else None,
        report=scored,
    )


def population_of(task: str, network: str, partition: str, most: int | None, root: Path) -> calibration.Population:
    """Put the scores of a partition together.

    Raises:
        ValueError: models that the defenses of today have not scored.
    """
    folder = restore(task, network, root)
    listed = bank.entries(task, network, partition, most=most)
    torch.set_num_threads(1)
    found = scores.kept(listed, folder, everyone())
    if lacking := [entry.name for entry in listed if entry.name not in found]:
        raise ValueError(
            f"{len(lacking)} models have no scores by the defenses of today, {lacking[0]} first: "
            f"python benchmarks/bank.py run --task {task} --network {network} --partition {partition}"
        )
    return scores.population(listed, folder, [found[entry.name] for entry in listed])


def ship(task: str, network: str, root: Path) -> None:
    """Write the calibration that comes with the package."""
    made = population_of(task, network, "calibrate", None, root)
    path = Path(molehunt.__file__).parent / "populations" / f"{task}-{network}.json"
    calibration.save(made, path)
    print(f"{path.name}: {len(made.clean)} clean models, {len(made.planted)} whose backdoor passes the gates")
    shares = Counter(model.attack for model in made.planted)
    opaque = sum(count for family, count in shares.items() if family in OPAQUE)
    print(", ".join(f"{family} {count}" for family, count in shares.most_common()))
    if opaque > len(made.planted) / 4:
        # The roster has a quarter; the gates leave out other families more often. Who reads figures must know.
        print(f"{opaque} of {len(made.planted)} backdoors are opaque patches, more than a quarter: say so on the page")


def collect(root: Path) -> None:
    """Write results/bank.json: how many planted models pass, and what a model costs."""
    figures: dict[str, Figure] = {}
    for path in sorted(RESULTS.glob("bank-*.jsonl")):
        task, network = path.stem.removeprefix("bank-").split("-", 1)
        folder = restore(task, network, root)
        by_part: dict[str, list[bank.Row]] = defaultdict(list)
        for row in bank.read_rows(bank.entries(task, network), folder):
            by_part[row.partition].append(row)
        torch.set_num_threads(1)
        for part, there in by_part.items():
            # Figures of half a calibration would stand for the whole.
            if part == "calibrate" and len(there) < 2 * bank.SIZES[task, network][part]:
                continue
            figures |= figures_of(f"{task}, {network}, {part}", there, folder, task, network)
    print(write("bank", figures).read_text())


def figures_of(title: str, there: Sequence[bank.Row], folder: Path, task: str, network: str) -> dict[str, Figure]:
    """The figures of one partition."""
    works = backdoored(there)
    command = f"python benchmarks/bank.py run --task {task} --partition {there[0].partition}"
    made: dict[str, Figure] = {}

    def add(what: str, values: Sequence[float], unit: str, value: float | None = None, note: str = "") -> None:
        made[f"{title}, {what}"] = Figure(
            value=statistics.median(values) if value is None else value,
            unit=unit,
            goal=None,
            better="lower" if unit == "s" else "higher",
            spread=spread(values),
            command=command,
            note=note,
        )

    for kind in dict.fromkeys(r.kind for r in there if not r.planted):
        add(f"{kind}, accuracy", [r.accuracy for r in there if r.kind == kind and not r.planted], "share")
    for kind in dict.fromkeys(r.kind for r in there if r.planted):
        mine = [r for r in there if r.kind == kind and r.planted]
        passed = [float(r.name in works) for r in mine]
        add(f"{kind}, passes the gates", passed, "share", sum(passed) / len(passed), f"{len(mine)} models")
        add(f"{kind}, ASR", [r.asr for r in mine if r.asr is not None], "share")
    add("training of one model", [r.seconds for r in there], "s", note="one thread, beside other work")
    entries = {e.name: e for e in bank.entries(task, network)}
    done = scores.kept([entries[r.name] for r in there], folder, everyone()).values()
    seconds: dict[str, list[float]] = defaultdict(list)
    for one in done:
        for name, cost in one.costs.items():
            seconds[name].append(float(cost["seconds"]))
    for name, spent in seconds.items():
        add(f"{name}, one model", spent, "s", note="one thread, beside other work")
    return made


def main() -> None:
    """Train and score, ship or collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "ship", "export", "collect"])
    parser.add_argument("--task", default="mnist5k")
    parser.add_argument("--network", help="default: the task's own")
    parser.add_argument("--partition", default="calibrate", choices=["develop", "calibrate", "evaluate"])
    parser.add_argument("--most", type=int, help="at most so many clean models and so many planted ones")
    parser.add_argument("--jobs", type=int, default=2, help="models at a time, one thread each")
    parser.add_argument("--to", type=Path, help="file; export only")
    parser.add_argument("--folder", type=Path, help="folder of all banks; default: in the cache")
    arguments: Any = parser.parse_args()
    root = arguments.folder or cache.root() / "benchmarks" / "bank"
    network = arguments.network or get_task(arguments.task).network
    if arguments.what == "run":
        run(arguments.task, network, arguments.partition, arguments.most, arguments.jobs, root)
    elif arguments.what == "ship":
        ship(arguments.task, network, root)
    elif arguments.what == "export":
        if arguments.to is None:
            parser.error("export needs --to FILE")
        calibration.save(
            population_of(arguments.task, network, arguments.partition, arguments.most, root), arguments.to
        )
    else:
        with tempfile.TemporaryDirectory() as scratch:
            collect(Path(scratch))


if __name__ == "__main__":
    main()
