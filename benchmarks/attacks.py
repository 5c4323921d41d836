"""What the attacks give: accuracy beside the clean twin's, success, and the referee's own gates.

    python benchmarks/attacks.py run --attack sig --task mnist --seed 0
    python benchmarks/attacks.py run --attack sig --task cifar10 --network narrow_cifar --references 2
    python benchmarks/attacks.py run --attack "badnets (all-to-all)"        another form of it
    python benchmarks/attacks.py run --attack sig --board data              hand over a set, let the host train
    python benchmarks/attacks.py try --attack sig --task mnist --set poison_rate=0.05
    python benchmarks/attacks.py speed                      seconds to poison 50 000 CIFAR-sized pictures
    python benchmarks/attacks.py pictures                   docs/reference/attacks/NAME.png
    python benchmarks/attacks.py pictures --attack label_consistent --set epsilon=0     its patches alone, in no time
    python benchmarks/attacks.py collect                    results/attacks.json from the rows

`run` trains the task's own network, or the one named, by its default recipe, measures on the test split and appends to
results/attacks.jsonl; a row that is there already is not made again, unless it was gated against fewer references or is
of other settings than the attack has now: then the later one counts. `try` is for choosing settings: it measures on the
validation split and appends to results/attacks-develop.jsonl. The gates are those of `molehunt check`, against clean
models of the same network and recipe. On the data board the set goes the way that a submission goes: stamped before
any augmentation, eight bits, merged and shuffled. Clean models are trained once and kept in the folder `--state`, as is
the state of a training that was interrupted; the clean twin of a model is the one of the same number.
"""

import argparse
import hashlib
import json
import os
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from molehunt import figures
from molehunt.attacks import ATTACKS, AnyAttack, Bench, Crafter, Poisoned, poison
from molehunt.attacks.crafting import backdoor, untouched
from molehunt.datasets import cache
from molehunt.game.answers import accuracy, asr, measure, share
from molehunt.game.attacker import describe, make_attack, parse_settings, sealed, train_model
from molehunt.game.check import References, check
from molehunt.game.rules import Board, Limits
from molehunt.game.training_set import TrainingSet
from molehunt.networks import Network, default_device
from molehunt.runner import generator
from molehunt.tasks import Images, Task, get_task
from molehunt.training import recipe_for
from record import Figure, append, machine, rows, spread, write

NAME, DEVELOP = "attacks", "attacks-develop"
PICTURES = Path(__file__).parent.parent / "docs/reference/attacks"
CRAFTED = ("label_consistent", "low_frequency", "issba", "input_aware")
"""Attacks that train a network of their own before they poison: the goal for seconds is not about them."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "badnets (all-to-all)": ("badnets", {"target": "all"}),
    "badnets (source-specific)": ("badnets", {"sources": (1,), "poison_rate": 0.05}),
    "badnets (one pixel)": ("badnets", {"form": "pixel"}),
    "badnets (four pixels)": ("badnets", {"form": "four pixels"}),
    "badnets (random place)": ("badnets", {"place": "random"}),
    "label_consistent (without covers)": ("label_consistent", {"cover_rate": 0.0, "epsilon": 0.1}),
    "input_aware (a twentieth of the pixels)": ("input_aware", {"area": 0.05}),
    "multi_trigger (a target each)": ("multi_trigger", {"target": (0, 1, 2, 3)}),
}
"""Other forms of an attack than the default one: the attack, and what is set."""
FITTING: dict[str, dict[str, Any]] = {
    "wanet": {"poison_rate": 0.033},
    "input_aware": {"poison_rate": 0.033},
    "bpp": {"poison_rate": 0.05, "negative_rate": 0.05},
}
"""What keeps to the rows that the data board allows where the default settings do not."""
IMAGES = 50_000
REPEATS = 3
DATA = " (data board)"


@dataclass(frozen=True, kw_only=True)
class Kept(References):
    """Clean models of one task and network, in a folder of this benchmark.

    Attributes:
        state: the folder.
    """

    state: Path

    @property
    def folder(self) -> Path:
        """The same name as in the cache, so that other recipes name other models."""
        return self.state / References(task=self.task, network=self.network).folder.name


def reporting(what: str) -> tuple[Progress, Callable[[int, int], None]]:
    """A progress line, and what tells it how far things are."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    progress = Progress(*columns)
    line = progress.add_task(what)
    return progress, lambda done, total: progress.update(line, completed=done, total=total)


def references(task: Task, network: str, state: Path, numbers: list[int]) -> list[Network]:
    """Clean models, trained now where they are missing."""
    kept, found = Kept(task=task, network=network, state=state), []
    for number in numbers:
        progress, report = reporting(f"clean {task.name} {number}")
        with progress:
            found.append(kept.get(number, report=report).eval().to(default_device()))
    return found


def cover_accuracy(model: Network, attack: AnyAttack, made: Poisoned, images: Images, task: Task) -> float | None:
    """Accuracy on unseen images that carry what the covers carry: another warp, another image's trigger, half a blend.

    The attack poisons the images with the trigger that it has; what it stamps and leaves its label is counted. None for
    an attack without covers, or one that cannot be told its trigger.
    """
    if (
        isinstance(attack, Crafter)
        or not hasattr(attack, "trigger")
        or not bool((made.altered & covers_of(made, task.load("train"))).any())
    ):
        return None
    again = replace(attack, trigger=made.trigger)  # type: ignore[type-var]  # attacks are dataclasses
    fresh = again(images, task, generator(0, "attack benchmark covers"))
    kept = covers_of(fresh, images)
    if not bool(kept.any()):
        return None
    said = measure(model, Images(fresh.stamped().x[kept], images.y[kept]))
    return accuracy(said.plain, said.y)


def covers_of(made: Poisoned, clean: Images) -> torch.Tensor:
    """Bool (N,), altered rows that keep their label; none of a clean-label attack, whose altered rows all do."""
    if torch.equal(made.images.y, clean.y):
        return torch.zeros_like(made.altered)
    return made.altered & (made.images.y == clean.y)


def one(
    name: str,
    task: Task,
    seed: int,
    *,
    network: str,
    develop: bool,
    settings: dict[str, Any],
    state: Path,
    few: int,
    board: Board,
) -> dict[str, Any]:
    """Train one backdoored model and answer its row."""
    limits = Limits(references=few)
    recipe = recipe_for(network, task)
    attack = make_attack(name, settings)
    clean = references(task, network, state, list(range(limits.references)))
    twin = references(task, network, state, [seed])[0]
    split: Literal["validation", "test"] = "validation" if develop else "test"
    images = task.load(split)
    busy, start = os.getloadavg()[0], time.monotonic()
    rng = generator(seed, f"attack benchmark {name} {network}" + ("" if board == "weights" else f" {board}"))
    poisoned: Poisoned | None = None
    seen: Images | None = None
    if board == "data":
        public = task.load("train")
        poisoned = poison(attack, public, task, rng)
        seen = TrainingSet.of(poisoned, public, rng).delivered(public, rng)
    key = hashlib.sha256(repr((attack, task.name, network, board, seed)).encode()).hexdigest()[:16]
    progress, report = reporting(f"{name} {task.name} {seed}")
    with progress:
        model, made = train_model(
            task,
            network,
            recipe,
            attack if board == "weights" else None,
            rng=rng,
            images=seen,
            report=report,
            checkpoint=None if develop else state / f"{key}.pt",
        )
    made = made or poisoned
    seconds = time.monotonic() - start
    assert made is not None
    answers = measure(model.eval().to(default_device()), images, made.trigger)
    assert answers.stamped is not None
    counted = made.target.counts(answers.y)
    goal = made.target.goal(answers.y)
    gates = check(model, sealed(attack, made), clean, images, shape=task.shape, limits=limits)
    said = describe(attack)
    del said["attack"]
    row: dict[str, Any] = {
        "attack": name,
        "settings": said,
        "task": task.name,
        "network": network,
        "seed": seed,
        "references": len(clean),
        "split": split,
        "altered": share(made.altered),
        "relabeled": share(made.images.y != task.load("train").y),
        "accuracy": accuracy(answers.plain, answers.y),
        "twin": accuracy(measure(twin, images).plain, answers.y),
        "asr": asr(answers.stamped, answers.y, made.target),
        "base_rate": share((answers.plain == goal)[counted]),
        "gates": [
            {"name": g.name, "measured": g.measured, "limit": g.limit, "passed": g.passed, "message": g.message}
            for g in gates
        ],
        "passed": all(g.passed for g in gates),
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "busy": round(busy, 2),
        "machine": machine(),
    }
    cover = cover_accuracy(model, attack, made, images, task) if board == "weights" else None
    if cover is not None:
        row["cover_accuracy"] = cover
    if made.further:
        other = [(measure(model, images, trigger), target) for trigger, target in made.further]
        row["further_asr"] = [asr(a.stamped, a.y, t) for a, t in other if a.stamped is not None]
    return row


def speed(names: list[str]) -> None:
    """Measure the seconds to poison 50 000 color pictures, stamping included, and to stamp all of them."""
    torch.set_num_threads(1)
    task, rng = get_task("cifar10"), torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (IMAGES, *task.shape), generator=rng, dtype=torch.uint8).float() / 255
    clean = Images(x, torch.arange(IMAGES) % task.num_classes)
    command, note = "python benchmarks/attacks.py speed", "one thread; random pictures, which cost what others do"
    for name in names:
        attack, times = make_attack(name, {}), []
        for repeat in range(1 if name in CRAFTED else REPEATS):
            start, cpu = time.monotonic(), time.process_time()
            made = poison(attack, clean, task, torch.Generator().manual_seed(repeat))
            made.stamped()
            poisoning = (time.monotonic() - start, time.process_time() - cpu)
            start, cpu = time.monotonic(), time.process_time()
            for part in torch.split(x, 4096):
                made.trigger(part)
            times.append((*poisoning, time.monotonic() - start, time.process_time() - cpu))
        busy = f"; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
        found = {}
        for what, wall, processor, goal in (
            ("poisoning 50 000 CIFAR-sized images", 0, 1, None if name in CRAFTED else 2.0),
            ("the trigger on all of 50 000 CIFAR-sized images", 2, 3, None),
        ):
            # Seconds of the processor: what else the machine does delays them less than those of the clock.
            values = [t[processor] for t in times]
            clock = spread([t[wall] for t in times])
            found[f"{name}, {what}"] = Figure(
                value=spread(values)["median"],
                unit="s",
                goal=goal,
                better="lower",
                spread=spread(values),
                command=f"{command} --attack {name}",
                note=f"processor time, {note}{busy}; by the clock {clock['median']:.2f} s",
            )
        write(NAME, found)
        print(name, {k.partition(", ")[2]: round(f.value or 0.0, 2) for k, f in found.items()}, flush=True)


def pictures(names: list[str], task: Task, settings: dict[str, Any]) -> None:
    """Draw ten stamped images, one of each class, and what was changed in them."""
    train, images = task.load("train"), task.load("validation")
    some = Images(train.x[:5000], train.y[:5000])
    ten = torch.stack([(images.y == k).nonzero()[0, 0] for k in range(min(10, task.num_classes))])
    for name in names:
        made = shown(make_attack(name, settings), some, task)
        x = images.x[ten]
        alt = f"Ten {task.name} pictures under the trigger of {name}; under each the change, amplified."
        picture = figures.contact_sheet(x, made.trigger(x), alt)
        path = PICTURES / f"{name}.png"
        path.write_bytes(picture.png)
        print(path.name, f"{len(picture.png) / 1000:.0f} kB", flush=True)


def shown(attack: AnyAttack, images: Images, task: Task) -> Poisoned:
    """The trigger of an attack for a picture; one whose trigger comes with its model makes one, of as few images."""
    rng = generator(0, "attack pictures")
    if not isinstance(attack, Crafter):
        return attack(images, task, rng)
    if hasattr(attack, "trigger"):
        return untouched(images, *backdoor(attack.trigger, 0, task))
    recipe = recipe_for(task.network, task)
    return attack.craft(Bench(clean=images, task=task, network=task.network, recipe=recipe, rng=rng)).poisoned


def finished() -> list[dict[str, Any]]:
    """All rows, the latest of each model: one that was gated against more references follows an older one."""
    return list({(r["attack"], r["task"], r["network"], r["seed"]): r for r in rows(NAME)}.values())


def collect() -> None:
    """Write results/attacks.json."""
    figures_: dict[str, Figure] = {}
    kept = finished()
    for task, network, name in dict.fromkeys((r["task"], r["network"], r["attack"]) for r in kept):
        found = [r for r in kept if (r["task"], r["network"], r["attack"]) == (task, network, name)]
        own = network == get_task(task).network
        plain, devices = name.removesuffix(DATA), dict.fromkeys(device_of(r) for r in found)
        where = task if own else f"{task} with {network}"
        made: list[tuple[str, list[float], str, float | None, Literal["higher", "lower"]]] = [
            ("accuracy", [r["accuracy"] for r in found], "share", None, "higher"),
            (
                "loss of accuracy against its clean twin",
                [r["twin"] - r["accuracy"] for r in found],
                "share",
                0.02,
                "lower",
            ),
            ("ASR", [r["asr"] for r in found], "share", None, "higher"),
            ("base rate", [r["base_rate"] for r in found], "share", None, "lower"),
            ("runs that pass all gates", [float(r["passed"]) for r in found], "share", 1.0, "higher"),
            ("time", [r["seconds"] for r in found], "s", None, "lower"),
        ]
        for gate in dict.fromkeys(g["name"] for r in found for g in r["gates"]):
            values = [g["measured"] for r in found for g in r["gates"] if g["name"] == gate]
            made.append((f"gate {gate}", values, "pixels" if name == "wanet" and gate == "budget" else "share", None,
                         "higher" if gate in {"clean accuracy", "attack success"} else "lower"))  # fmt: skip
        if all("cover_accuracy" in r for r in found):
            made.append(("cover accuracy", [r["cover_accuracy"] for r in found], "share", None, "higher"))
        if all("further_asr" in r for r in found):
            made.append(
                ("least ASR of the further triggers", [min(r["further_asr"]) for r in found], "share", None, "higher")
            )
        for what, values, unit, goal, better in made:
            middle = sum(values) / len(values) if what.startswith("runs") else spread(values)["median"]
            figures_[f"{name} on {where}, {what}"] = Figure(
                value=middle,
                unit=unit,
                goal=goal,
                better=better,
                spread=spread(values),
                seeds=[r["seed"] for r in found],
                command=f"python benchmarks/attacks.py run --attack {shlex.quote(plain)} --task {task}"
                + (" --board data" if name.endswith(DATA) else "")
                + ("" if own else f" --network {network}"),
                # The file names the machine that collects; the rows know who made them.
                note=f"made on: {', '.join(devices)}"
                + (f"; load before each run {[r['busy'] for r in found]}" if what == "time" else ""),
            )
    print(write(NAME, figures_).read_text())
    for name in ATTACKS:
        write_table(name, [r for r in kept if attack_of(r) == name])


def device_of(row: dict[str, Any]) -> str:
    """What made a row."""
    made = row["machine"]
    return str(made.get("gpu") or f"{made['processor']}, {made['cores']} cores")


def attack_of(row: dict[str, Any]) -> str:
    """The attack of a row, whichever form of it."""
    return str(row["attack"]).partition(" (")[0]


HEADING = "### Through the gates"
COLUMNS = "| task | network | models | accuracy, % | lost, points | ASR, % | without trigger, % | gates missed |"


def write_table(name: str, found: list[dict[str, Any]]) -> None:
    """Put the rows of one attack into its page, below the other figures; a test compares the two."""
    page = PICTURES / f"{name}.md"
    before, heading, rest = page.read_text().partition(f"\n{HEADING}\n")
    before, _, after = (before if heading else page.read_text()).partition("\n## Known departures")
    if heading:
        after = rest.partition("\n## Known departures")[2]
    if found:
        lines = [COLUMNS, f"|{'---|' * COLUMNS.count(' | ')}---|", *table_of(found)]
        note = (
            "Default settings and recipe, test split, medians; smallest and largest in parentheses. *lost*: against "
            "clean\nmodels of the same numbers. `python benchmarks/attacks.py run` makes a row of "
            "`benchmarks/results/attacks.jsonl`, `collect` this table."
        )
        before += f"\n{HEADING}\n\n" + "\n".join(lines) + f"\n\n{note}\n"
    page.write_text(f"{before}\n## Known departures{after}")


def table_of(found: list[dict[str, Any]]) -> list[str]:
    """The lines of the table, one for each task, network and form of the attack."""
    lines = []
    for task, network, name in dict.fromkeys((r["task"], r["network"], r["attack"]) for r in found):
        mine = [r for r in found if (r["task"], r["network"], r["attack"]) == (task, network, name)]
        form = "".join(f", {part.rstrip(')')}" for part in name.split(" (")[1:])
        missed = dict.fromkeys(g["name"] for r in mine for g in r["gates"] if not g["passed"])
        told = []
        for gate in missed:
            count = sum(not g["passed"] for r in mine for g in r["gates"] if g["name"] == gate)
            told.append(gate if count == len(mine) else f"{gate} ({count} of {len(mine)})")
        columns = (
            [r["accuracy"] for r in mine],
            [r["twin"] - r["accuracy"] for r in mine],
            [r["asr"] for r in mine],
            [r["base_rate"] for r in mine],
        )
        cells = [between([100 * value for value in values]) for values in columns]
        lines.append(
            f"| {task}{form} | `{network}` | {len(mine)} | {' | '.join(cells)} | {', '.join(told) or 'none'} |"
        )
    return lines


def between(values: list[float]) -> str:
    """The median, and the range where there is one."""
    low, middle, high = (f"{spread(values)[k]:.2f}" for k in ("min", "median", "max"))
    return middle if len(values) == 1 else f"{middle} ({low} to {high})"


def main() -> None:
    """Train one model, or do one of the other things."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "try", "speed", "pictures", "collect"])
    parser.add_argument(
        "--attack", choices=[*ATTACKS, *VARIANTS], help="run and try need one; the default of the others is all"
    )
    parser.add_argument("--task", help="default: mnist; of the pictures cifar10")
    parser.add_argument("--network", help="default: the task's own; run and try only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the attack; try and pictures only",
    )
    parser.add_argument(
        "--state", type=Path, help="folder for clean models and interrupted trainings; default: the cache"
    )
    parser.add_argument(
        "--references",
        type=int,
        default=Limits().references,
        help="clean models that the gates compare with; fewer where each takes minutes, which the row says",
    )
    parser.add_argument(
        "--board", choices=get_args(Board), default="weights", help="who trains: the team, or the host from its set"
    )
    arguments = parser.parse_args()
    names = [arguments.attack] if arguments.attack else list(ATTACKS)
    develop = arguments.what == "try"
    if arguments.attack in VARIANTS and arguments.what not in {"run", "collect"}:
        parser.error(f"only run knows {arguments.attack!r}; give the attack and --set")
    if arguments.what == "collect":
        return collect()
    if arguments.what == "speed":
        # Of those that make a model the seconds of a training are in every row.
        quick = [name for name in names if name not in CRAFTED and not hasattr(ATTACKS[name], "craft")]
        return speed(names if arguments.attack else quick)
    if arguments.what == "pictures":
        return pictures(names, get_task(arguments.task or "cifar10"), parse_settings(arguments.set))
    if not arguments.attack:
        parser.error(f"{arguments.what} needs --attack")
    if arguments.set and not develop:
        parser.error("--set changes an attack, so its figure would not be that of the defaults; use try")
    state = arguments.state or cache.root() / "benchmarks"
    state.mkdir(parents=True, exist_ok=True)
    task = get_task(arguments.task or "mnist")
    network = arguments.network or task.network
    shown_name = arguments.attack + (DATA if arguments.board == "data" else "")
    key = {"attack": shown_name, "task": task.name, "network": network, "seed": arguments.seed}
    name, settings = VARIANTS.get(arguments.attack, (arguments.attack, parse_settings(arguments.set)))
    if arguments.board == "data":
        settings = FITTING.get(name, {}) | settings
    said = json.loads(json.dumps(describe(make_attack(name, settings))))
    # A row of settings that are not the attack's any more tells of another attack.
    made = [
        r for r in finished() if all(r[k] == v for k, v in key.items()) and {"attack": name} | r["settings"] == said
    ]
    if not develop and made and made[0]["references"] >= arguments.references:
        print("this row is there already")
        return None
    row = one(
        name,
        task,
        arguments.seed,
        network=network,
        develop=develop,
        settings=settings,
        state=state,
        few=arguments.references,
        board=arguments.board,
    )
    row["attack"] = shown_name
    append(DEVELOP if develop else NAME, row)
    shown = (
        "attack",
        "task",
        "seed",
        "split",
        "accuracy",
        "twin",
        "asr",
        "base_rate",
        "cover_accuracy",
        "passed",
        "seconds",
    )
    print(json.dumps({k: row[k] for k in shown if k in row}))
    for gate in row["gates"]:
        print(
            f"  {'pass' if gate['passed'] else 'MISS'}  {gate['name']}: {gate['measured']:.4f} ({gate['message']})",
            flush=True,
        )
    return None


if __name__ == "__main__":
    main()
