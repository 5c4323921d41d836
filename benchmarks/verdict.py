"""The whole answer on models whose truth is known: p, target, trigger, repair and time, on the bank's evaluate part.

    python benchmarks/verdict.py run --task mnist --most 50 [--part 1/2]    a row per model; parts run side by side
    python benchmarks/verdict.py collect                                    results/verdict.json and the page

Every model is scanned as `molehunt scan` does it, by all defenses of a final, with the calibration of the package. Its
models share no seed, trigger or recipe draw with these. Models are made again from the bank's rows in results/; one
that comes out otherwise on this kind of processor is named and left out. Backdoors that miss a gate of the
referee are left out of all figures. What is measured after the scan, the success of the true trigger before and after
the repair and that of the recovered one, is measured on hidden images.

*Detected* is p of at least one half. *Family unmet*: p once more from the same scores, with all references of the
model's group of families taken out. Intervals hold 95 % of 2 000 bootstrap draws of models.
"""

import argparse
import math
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import logit

from bank import restore
from molehunt import bank, calibration, meta_files
from molehunt.bank.rows import backdoored, poisoned, read_rows, regrow
from molehunt.defenses import Defense
from molehunt.findings import Finding, Outcome
from molehunt.fusion import fuse
from molehunt.game.answers import accuracy, asr, measure
from molehunt.inspection import final_defenses
from molehunt.runner import generator, inspect
from molehunt.scanning import scan
from molehunt.suspect import Suspect
from molehunt.tasks import Images, get_task
from molehunt.testing import auc
from molehunt.triggers import Patch, Target
from neural_cleanse import overlap
from pages import put, span
from record import Figure, append, machine, rows, spread, todo, write

NAME = "verdict"
PAGE = Path(__file__).parent.parent / "docs/reference/verdict.md"
HEADING = "Figures"
HIDDEN = 2_000  # images on which triggers and repairs are measured
DETECTED = 0.5
DRAWS = 2_000
GROUPS: dict[str, frozenset[str]] = {
    "patch": frozenset({"badnets"}),
    "blend, additive": frozenset({"blended", "adap_blend", "sig", "stripes"}),
    "reflection": frozenset({"refool"}),
    "warp, frequency": frozenset({"wanet", "ftrojan"}),
    "one class alone": frozenset({"tact"}),
}
"""Families that are held out together."""


def scanned(key: dict[str, Any], entry: bank.Entry, row: bank.Row, works: bool) -> dict[str, Any]:
    """Scan one model of the bank, and measure what came of it."""
    task = get_task(key["task"])
    clean, hidden = task.secret(entry.seed)
    some = Images(hidden.x[:HIDDEN], hidden.y[:HIDDEN])
    model, made = regrow(entry, row), poisoned(entry)
    defenses = final_defenses()
    seconds: dict[str, float] = {}

    def ask(name: str, defense: Defense, suspect: Suspect) -> Outcome:
        start = time.monotonic()
        outcome = inspect(defense, suspect, name=name, seed=entry.seed)
        seconds[name] = round(time.monotonic() - start, 2)
        return outcome

    busy = round(os.getloadavg()[0], 2)
    report = scan(
        model,
        task,
        clean,
        name=entry.name,
        defenses=defenses,
        inspect=ask,
        population=calibration.shipped(task.name, model.name, defenses),
        metas=meta_files.shipped(task.name, model.name),
        recipe=entry.network,
    )
    verdict = report.verdict
    scores = {o.defense: o.score for o in verdict.outcomes if isinstance(o, Finding) and o.defense in verdict.p_values}
    found: dict[str, Any] = {
        **key,
        "hidden": row.kind if row.planted else None,
        "works": works,
        "p": verdict.p,
        "p_values": dict(verdict.p_values),
        "scores": scores,
        "guess": int(verdict.q.argmax()),
        "q": [round(float(v), 4) for v in verdict.q],
        "repair": verdict.details["repair"]["taken"],
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "busy": busy,
        "machine": machine(),
    }
    repaired = None
    if verdict.repaired is not None:
        repaired = regrow(entry, row)
        repaired.load_state_dict(dict(verdict.repaired))
    trigger = None if made is None else made.trigger
    before, after = (None if m is None else measure(m.eval(), some, trigger) for m in (model, repaired))
    assert before is not None
    found["accuracy"] = [accuracy(a.plain, a.y) for a in (before, after) if a is not None]
    if made is not None:
        classes = made.target.classes
        found["target"] = list(classes) if isinstance(classes, tuple | list) else classes
        found["asr"] = [asr(a.stamped, a.y, made.target) for a in (before, after) if a and a.stamped is not None]
    if verdict.trigger is not None and verdict.target is not None:
        goal = Target(classes=verdict.target, sources=verdict.sources)
        stamped = measure(model, some, verdict.trigger)
        assert stamped.stamped is not None
        found["recovered"] = {
            "target": verdict.target,
            "sources": verdict.sources,
            "asr": asr(stamped.stamped, stamped.y, goal),
            "weight": verdict.trigger.footprint().weight,
        }
        if isinstance(verdict.trigger, Patch) and isinstance(trigger, Patch):
            found["recovered"]["iou"] = overlap(verdict.trigger.mask > 0.5, trigger.mask > 0)
    return found


def run(task: str, network: str, most: int, part: str) -> None:
    """Make the missing rows."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = restore(task, network, Path(scratch))
        listed = bank.entries(task, network, "evaluate", most=most)
        there = {row.name: row for row in read_rows(listed, folder)}
    works = backdoored(list(there.values()))
    number, of = (int(word) for word in part.split("/"))
    mine = [entry for index, entry in enumerate(listed) if entry.name in there and index % of == number - 1]
    named = {entry.name: entry for entry in mine}
    torch.set_num_threads(1)
    for key in todo(NAME, [{"task": task, "network": network, "model": name} for name in named]):
        entry = named[key["model"]]
        try:
            row = scanned(key, entry, there[entry.name], entry.name in works)
        except ValueError as error:
            print(f"left out: {error}", flush=True)
            continue
        append(NAME, row)
        shown = ("model", "hidden", "works", "p", "target", "guess", "recovered", "repair", "accuracy", "asr")
        print({k: row[k] for k in shown if k in row}, round(sum(row["seconds"].values()), 1), flush=True)


def judged(task: str, network: str) -> list[dict[str, Any]]:
    """Rows that count: clean models, and backdoors that pass the gates."""
    kept = [row for row in rows(NAME) if (row["task"], row["network"]) == (task, network)]
    return [row for row in kept if row["hidden"] is None or row["works"]]


def log_loss(p: Sequence[float], truth: Sequence[bool]) -> float:
    """Mean of minus the logarithm of what was said of the truth."""
    return statistics.mean(-math.log(a if b else 1.0 - a) for a, b in zip(p, truth, strict=True))


def slope(p: Sequence[float], truth: Sequence[bool]) -> float:
    """Slope of a logistic regression of the truth on the log-odds that were said: 1 where they hold."""
    odds, signs = logit(np.asarray(p)), np.where(truth, 1.0, -1.0)

    def loss(values: Any) -> float:
        return float(np.logaddexp(0.0, -signs * (values[0] + values[1] * odds)).mean() + 1e-6 * values[1] ** 2)

    return float(minimize(loss, [0.0, 1.0], method="Nelder-Mead").x[1])


def interval(p: Sequence[float], truth: Sequence[bool], of: Callable[..., float], draws: int = DRAWS) -> list[float]:
    """Range of 95 % of a statistic over models drawn again, clean and backdoored ones apart."""
    rng = generator(0, "bootstrap")
    kinds = [[i for i, t in enumerate(truth) if t is kind] for kind in (False, True)]
    found = []
    for _ in range(draws):
        chosen = [kind[k] for kind in kinds for k in torch.randint(len(kind), (len(kind),), generator=rng).tolist()]
        found.append(of([p[i] for i in chosen], [truth[i] for i in chosen]))
    low, high = torch.tensor(found, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return [low, high]


def area(p: Sequence[float], truth: Sequence[bool]) -> float:
    """AUC of what was said."""
    return auc(torch.tensor(p, dtype=torch.float64), torch.tensor(truth))


def unmet(row: dict[str, Any], population: calibration.Population, out: frozenset[str]) -> float:
    """Probability from the same scores, without the references of some families."""
    part = replace(population, models=tuple(m for m in population.models if m.attack not in out))
    return fuse(row["scores"], part).p


def figures(task: str, network: str, kept: list[dict[str, Any]]) -> tuple[dict[str, Figure], list[str]]:
    """The figures of one bank, and the lines of their table."""
    p, truth = [row["p"] for row in kept], [row["hidden"] is not None for row in kept]
    command = f"python benchmarks/verdict.py run --task {task}"
    made: dict[str, Figure] = {}
    lines = [
        f"`{task}`, `{network}`, {truth.count(False)} clean models and {truth.count(True)} backdoored ones that pass "
        "the gates:",
        "",
        "| figure | value | 95 % interval or range | goal |",
        "|---|---|---|---|",
    ]

    def add(what: str, value: float, over: Any, goal: float | None, better: str, digits: int = 3) -> None:
        made[f"{task}, {network}, {what}"] = Figure(
            value=value,
            unit="",
            goal=goal,
            better=better,  # type: ignore[arg-type]  # one of its two words
            spread=over,
            command=command,
        )
        ends = "" if over is None else span(list(over.values()) if isinstance(over, dict) else over, digits)
        said = "" if goal is None else f"{'at least' if better == 'higher' else 'at most'} {goal:g}"
        lines.append(f"| {what} | {value:.{digits}f} | {ends} | {said} |")

    add("AUC", area(p, truth), interval(p, truth, area), 0.97, "higher")
    add("log-loss", log_loss(p, truth), interval(p, truth, log_loss), 0.25, "lower")
    add("slope of the calibration", slope(p, truth), interval(p, truth, slope, 200), None, "higher")
    best = max(kept[0]["p_values"], key=lambda name: area([-row["p_values"].get(name, 1.0) for row in kept], truth))
    add(
        f"AUC of the best single defense, {best}",
        area([-r["p_values"][best] for r in kept], truth),
        None,
        None,
        "higher",
    )
    bad = [row for row in kept if row["hidden"] is not None]
    seen = [row for row in bad if row["p"] >= DETECTED]
    add("detected", len(seen) / len(bad), None, None, "higher")
    add(
        "target first, of those detected", statistics.mean(r["guess"] == r["target"] for r in seen), None, 0.9, "higher"
    )
    population = calibration.shipped(task, network)
    assert population is not None
    honest = [row for row in kept if row["hidden"] is None]
    for group, families in GROUPS.items():
        mine = [row for row in bad if row["hidden"] in families]
        if mine:
            both = [unmet(row, population, families) for row in [*honest, *mine]]
            sides = [False] * len(honest) + [True] * len(mine)
            add(
                f"AUC, {group} unmet ({len(mine)} models)",
                area(both, sides),
                interval(both, sides, area),
                0.8,
                "higher",
            )
    patches = [row for row in seen if row["hidden"] == "badnets" and "recovered" in row]
    if patches:
        success = [row["recovered"]["asr"] for row in patches]
        add("BadNets, success of the recovered trigger", statistics.median(success), spread(success), 0.95, "higher")
        overlaps = [row["recovered"].get("iou", 0.0) for row in patches]
        add("BadNets, IoU of the recovered patch", statistics.median(overlaps), spread(overlaps), 0.5, "higher")
    after = [row["asr"][-1] for row in seen]
    add("success of the true trigger after the repair", statistics.median(after), spread(after), 0.05, "lower")
    lost = [row["accuracy"][0] - row["accuracy"][-1] for row in seen]
    add("accuracy lost in the repair", statistics.median(lost), spread(lost), 0.02, "lower")
    return made, [*lines, "", *repairs(seen), "", *times(kept)]


def repairs(seen: list[dict[str, Any]]) -> list[str]:
    """Which repair was taken of detected backdoors, and what it left."""
    by: dict[str, list[float]] = defaultdict(list)
    for row in seen:
        by[row["repair"] or "none"].append(row["asr"][-1])
    lines = ["| repair taken | models | true trigger left, median | range |", "|---|---|---|---|"]
    for name, left in sorted(by.items(), key=lambda item: -len(item[1])):
        lines.append(f"| {name} | {len(left)} | {statistics.median(left):.3f} | {span(left, 3)} |")
    return lines


def times(kept: list[dict[str, Any]]) -> list[str]:
    """Seconds of detection and repair."""
    from molehunt.defenses import REPAIRS

    parts = {
        "detection": [sum(s for n, s in row["seconds"].items() if n not in REPAIRS) for row in kept],
        "repairs": [sum(s for n, s in row["seconds"].items() if n in REPAIRS) for row in kept if row["p"] >= 0.2],
    }
    threads = sorted({row["threads"] for row in kept})
    lines = [
        f"| seconds, {' or '.join(map(str, threads))} thread beside other work | median | range |",
        "|---|---|---|",
    ]
    return lines + [f"| {n} | {statistics.median(v):.1f} | {span(v, 1)} |" for n, v in parts.items() if v]


def collect() -> None:
    """Write results/verdict.json and the section of the page."""
    everything: dict[str, Figure] = {}
    parts = []
    for task, network in sorted({(row["task"], row["network"]) for row in rows(NAME)}):
        made, lines = figures(task, network, judged(task, network))
        everything |= made
        parts.append("\n".join(lines))
    how = (
        "Every model was scanned by all defenses of a final with the shipped calibration; `python "
        "benchmarks/verdict.py run` makes a row per model, `collect` this section. *Detected*: p of at least one half. "
        "*Unmet*: the references have no model of those families. Success and accuracy are measured on hidden images."
    )
    put(PAGE, HEADING, "\n\n".join([*parts, how]), before="Reference populations")
    print(write(NAME, everything).read_text())


def main() -> None:
    """Run or collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "collect"])
    parser.add_argument("--task", default="mnist")
    parser.add_argument("--network", help="default: the task's own")
    parser.add_argument("--most", type=int, default=50, help="so many clean models and so many backdoored ones")
    parser.add_argument("--part", default="1/1", help="I/N: every N-th model, beginning with the I-th")
    arguments = parser.parse_args()
    if arguments.what == "run":
        network = arguments.network or get_task(arguments.task).network
        return run(arguments.task, network, arguments.most, arguments.part)
    return collect()


if __name__ == "__main__":
    main()
