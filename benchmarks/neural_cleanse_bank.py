"""Neural Cleanse on the patches of the bank: is the target named, and does the mask lie where the trigger does?

    python benchmarks/neural_cleanse_bank.py run --task cifar10 --network narrow_cifar --partition calibrate
    python benchmarks/neural_cleanse_bank.py show
    python benchmarks/neural_cleanse_bank.py collect       results/neural_cleanse.json and the page, from the rows

Models of one partition: all clean ones, and those that an opaque patch of at most 4x4 pixels was trained into
(BadNets, and TaCT, whose patch works on one class alone). They are made again from the rows of the bank that are
kept in results/, by their cached weights or from their seeds; one that comes out otherwise on this kind of processor is
named and left out. Neural Cleanse runs once on each, with its defaults and the clean images that the bank's defenses
see. A row holds score, class named, success of the recovered patch on images that nobody else saw, and how the
recovered mask, cut at a half, lies over the true one: intersection over union, in place and at its best shift.

AUC: of the scores of backdoors that pass the referee's gates against those of the clean models, with the range of 95 %
of bootstrap draws. *Detected* is a backdoored model whose score is above 95 % of the clean ones'.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from bank import restore
from molehunt import bank
from molehunt.bank.judgement import judge
from molehunt.bank.roster import OPAQUE
from molehunt.bank.rows import Row, backdoored, read_rows, regrow
from molehunt.defenses import NeuralCleanse
from molehunt.examination import divide
from molehunt.findings import Finding
from molehunt.game.answers import asr, measure
from molehunt.networks import Network
from molehunt.runner import configuration, generator, inspect
from molehunt.suspect import Suspect
from molehunt.tasks import Images, get_task
from molehunt.triggers import Patch, Target
from neural_cleanse import anywhere, overlap
from pages import PAGES, put, span, written
from record import Figure, append, machine, rows, spread, todo, write

NAME, RESULT = "neural_cleanse-bank", "neural_cleanse"
PAGE, HEADING = PAGES / "neural_cleanse.md", "Patches of the bank"
HOW = """\
Patches of at most 4x4 pixels that pass the gates, default settings. *AUC*: with 95 % of bootstrap draws. *Detected*:
score above 95 % of the clean models'. *Target named*: of those detected. *IoU*: of the mask over a half with the true
patch, where the target is named, median with smallest and largest; *at best shift*, as a network that pools globally
takes a patch anywhere. TaCT's works on one class alone. `python benchmarks/neural_cleanse_bank.py run --task TASK
--network NETWORK --partition PARTITION` makes a row per model, `collect` this section."""
SIDE = 4  # largest side of a patch, in pixels
IMAGES = 2_000  # hidden images on which a recovered patch is tried
HOLDS = 0.5  # overlap from which a mask counts as that of the trigger
COLUMNS = (
    "task",
    "network",
    "partition",
    "attack",
    "clean",
    "patches",
    "AUC",
    "detected",
    "target named",
    "IoU",
    "IoU >= .5",
)


def patch_of(entry: bank.Entry) -> Patch | None:
    """The patch that a model of the bank is trained with; None for other triggers and for clean models."""
    trigger = getattr(entry.poison, "trigger", None) if entry.planted and entry.kind in OPAQUE else None
    return trigger if isinstance(trigger, Patch) else None


def listed(task: str, network: str, partition: str) -> list[bank.Entry]:
    """Clean models of a partition, and those with a patch that is small enough."""
    found = []
    for entry in bank.entries(task, network, partition):
        patch = patch_of(entry)
        if not entry.planted or (patch is not None and float(patch.mask.sum()) <= SIDE**2):
            found.append(entry)
    return found


def searched(entry: bank.Entry, row: Row, model: Network, works: bool) -> dict[str, Any]:
    """Let Neural Cleanse judge one model, and lay its mask over the true one."""
    task = get_task(entry.task)
    clean, hidden = task.secret(entry.seed)
    some = Images(hidden.x[:IMAGES], hidden.y[:IMAGES])
    suspect = Suspect.of(model, task, clean=divide(clean)[0])
    busy = round(os.getloadavg()[0], 2)
    found = inspect(NeuralCleanse(), suspect, name="neural_cleanse", seed=entry.seed)
    if not isinstance(found, Finding) or found.cost is None:
        raise RuntimeError(f"{entry.name}: expected a finding, got {found}")
    told: dict[str, Any] = {"hidden": row.kind if row.planted else None, "works": works, "accuracy": row.accuracy}
    told |= {"score": found.score, "guess": found.target, "norms": found.details["norms"]}
    truth, trigger, goal = patch_of(entry), found.trigger, getattr(entry.poison, "target", None)
    if truth is not None:
        told |= {"target": goal, "pixels": int(truth.mask.sum()), "asr": row.asr}
    if isinstance(trigger, Patch) and found.target is not None:
        answers = measure(suspect.model, some, trigger)
        assert answers.stamped is not None
        told["recovered_asr"] = asr(answers.stamped, answers.y, Target(classes=found.target))
        if truth is not None:
            strong, place = trigger.mask > 0.5, truth.mask > 0
            told |= {"iou": overlap(strong, place), "iou_anywhere": anywhere(strong, place)}
    told |= {"seconds": found.cost.seconds, "forward": found.cost.forward, "backward": found.cost.backward}
    told |= {"threads": torch.get_num_threads(), "dtype": str(suspect.dtype).removeprefix("torch.")}
    return {**told, "busy": busy, "machine": machine()}


def run(task: str, network: str, partition: str, most: int | None) -> None:
    """Make the missing rows of a partition."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = restore(task, network, Path(scratch))
        whole = read_rows(bank.entries(task, network, partition), folder)
    works, there = backdoored(whole), {row.name: row for row in whole}
    wanted = [entry for entry in listed(task, network, partition) if entry.name in there]
    clean, planted = ([e for e in wanted if e.planted is kind][:most] for kind in (False, True))
    settings = configuration(NeuralCleanse())
    names = {entry.name: entry for entry in [*clean, *planted]}
    print(f"{len(clean)} clean models and {len(planted)} with patches have rows in results/")
    keys = [{"task": task, "network": network, "partition": partition, "model": n, "settings": settings} for n in names]
    for key in todo(NAME, keys):
        entry = names[key["model"]]
        try:
            model = regrow(entry, there[entry.name])
        except ValueError as error:
            print(f"left out: {error}", flush=True)
            continue
        row = {**key, **searched(entry, there[entry.name], model, entry.name in works)}
        append(NAME, row)
        shown = ("model", "hidden", "score", "guess", "target", "recovered_asr", "iou", "seconds")
        print({k: row[k] for k in shown if k in row}, flush=True)


def groups() -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Rows of today's defaults by task, network and partition."""
    settings, found = configuration(NeuralCleanse()), dict[tuple[str, str, str], list[dict[str, Any]]]()
    for row in rows(NAME):
        if row["settings"] == settings:
            found.setdefault((row["task"], row["network"], row["partition"]), []).append(row)
    return found


def told(kept: list[dict[str, Any]], family: str) -> dict[str, Any] | None:
    """What the rows of one partition say of a family; None before there are two clean models and two patches."""
    clean = [row["score"] for row in kept if row["hidden"] is None]
    patches = [row for row in kept if row["hidden"] == family and row["works"] and row["pixels"] <= SIDE**2]
    if len(clean) < 2 or len(patches) < 2:
        return None
    judged = judge(clean, [row["score"] for row in patches], generator(0, "neural cleanse bank"))
    level = float(torch.tensor(clean, dtype=torch.float64).quantile(0.95))
    detected = [row for row in patches if row["score"] > level]
    named = [row for row in detected if row["guess"] == row["target"]]
    return {
        "clean": len(clean),
        "patches": len(patches),
        "auc": judged.auc,
        "interval_95": [judged.low, judged.high],
        "shuffled_95": judged.permuted,
        "detected": len(detected),
        "named": len(named),
        "named_of_all": sum(row["guess"] == row["target"] for row in patches),
        # Where another class is named the mask is not meant to be the trigger's.
        "iou": [row["iou"] for row in named],
        "iou_anywhere": [row["iou_anywhere"] for row in named],
        "recovered_asr": [row["recovered_asr"] for row in named],
        "seconds": [row["seconds"] for row in kept],
    }


def answers() -> dict[tuple[str, str, str, str], dict[str, Any]]:
    """What the rows say by task, network, partition and family, where they are enough to say something."""
    every = {(*place, family): told(kept, family) for place, kept in groups().items() for family in sorted(OPAQUE)}
    return {place: found for place, found in every.items() if found is not None}


def table() -> str:
    """The section of the page: a line per partition and family."""
    lines = []
    for (task, network, partition, family), found in answers().items():
        low, high = found["interval_95"]
        area = f"{found['auc']:.3f} ({low:.3f} to {high:.3f})"
        cells = [task, f"`{network}`", partition, family, str(found["clean"]), str(found["patches"]), area]
        cells += [f"{found['detected']} of {found['patches']}", f"{found['named']} of {found['detected']}"]
        iou, moved = (found[name] for name in ("iou", "iou_anywhere"))
        middle, best = (f"{statistics.median(v):.2f} ({span(v, 2)})" if v else "" for v in (iou, moved))
        cells += [middle, f"{sum(one >= HOLDS for one in iou)} of {len(iou)}", best]
        lines.append(f"| {' | '.join(cells)} |")
    head = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    return written(["\n".join([*head, *lines])] if lines else [], HOW)


def figures_of(place: tuple[str, str, str, str], found: dict[str, Any]) -> dict[str, Figure]:
    """The figures of one family in one partition."""
    task, network, partition, _ = place
    command = f"python benchmarks/neural_cleanse_bank.py run --task {task} --network {network} --partition {partition}"
    counted = f"{found['clean']} clean, {found['patches']} patches that pass the gates"
    made: dict[str, Figure] = {}

    def add(what: str, value: float, ends: Any = None, more: str = "", unit: str = "share") -> None:
        made[f"Neural Cleanse, {', '.join(place)} of the bank, {what}"] = Figure(
            value=value,
            unit=unit,
            goal=None,
            better="lower" if unit == "s" else "higher",
            spread=ends,
            command=command,
            note=f"{counted}{more}",
        )

    add("AUC", found["auc"], found["interval_95"], f"; shuffled labels reach {found['shuffled_95']:.3f}")
    if found["detected"]:
        rate = found["named"] / found["detected"]
        add("right target among detections", rate, more=f"; {found['named']} of {found['detected']}")
    for name, what in (("iou", "IoU"), ("iou_anywhere", "IoU at its best shift"), ("recovered_asr", "success")):
        if values := found[name]:
            add(f"{what} of the recovered patch", statistics.median(values), spread(values))
    add("time", statistics.median(found["seconds"]), spread(found["seconds"]), unit="s")
    return made


def collect() -> None:
    """Write the figures, and the table into the page."""
    figures: dict[str, Figure] = {}
    for place, found in answers().items():
        figures |= figures_of(place, found)
    print(write(RESULT, figures).read_text())
    put(PAGE, HEADING, table(), before="Known limits")


def show() -> None:
    """Print what the rows say."""
    for place, found in answers().items():
        print(", ".join(place), found)


def main() -> None:
    """Make rows, or tell what they say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "show", "collect"])
    parser.add_argument("--task", default="cifar10")
    parser.add_argument("--network", help="default: the task's first one with a bank")
    parser.add_argument("--partition", choices=bank.PARTITIONS, default="calibrate")
    parser.add_argument("--most", type=int, help="at most so many clean models, and so many with patches")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.what == "run":
        network = arguments.network or next(n for t, n in bank.SIZES if t == arguments.task)
        return run(arguments.task, network, arguments.partition, arguments.most)
    return show() if arguments.what == "show" else collect()


if __name__ == "__main__":
    main()
