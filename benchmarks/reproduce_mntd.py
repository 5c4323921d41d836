"""MNTD on MNIST: how well meta-classifiers tell backdoored networks from clean ones, by the number of shadow models.

    python benchmarks/reproduce_mntd.py grow --shadows 512          trains shadows and targets; resumes
    python benchmarks/reproduce_mntd.py try --shadows 64            settings, on targets of the develop seeds
    python benchmarks/reproduce_mntd.py run --shadows 512           rows by number of shadows and kind of target
    python benchmarks/reproduce_mntd.py bank --task mnist5k --banks FOLDER    models of a bank, by shadow models
    python benchmarks/reproduce_mntd.py collect                     results/rounds_3_4.json from the rows

Networks are `mntd_mnist`. Shadows: so many clean and so many of the jumbo distribution, each of 1 200 images of its
own, ten passes up to a rate of 4e-3 (the *short* schedule of benchmarks/population.py). Targets, as in the paper, are
trained on half of the training split, an own half each, for four passes: clean ones, *patch* ones (jumbo draws that are
patches), *blend* ones (draws of the whole picture), and *stripes* (SIG), a family that no shadow has.

AUC is of the mean logit of five meta-classifiers, over all clean targets and all of one kind, with a 95 % interval
from 2 000 draws of targets with replacement; beside it the 95 % quantile of AUCs of shuffled labels. The curve takes
the first m clean and m backdoored shadows.

`bank` judges what the game is about: models of the bank, of six families of attacks and of clean models that are hard
to tell, by shadow models of the same network that see the whole training split, as `molehunt shadows` trains them. With
`--part develop` the settings are chosen, with `--part evaluate` the curve is made. The models are built first:
`molehunt bank build`, or `benchmarks/bank.py run`.
"""

import argparse
import os
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molehunt import bank
from molehunt.attacks import SIG
from molehunt.attacks.jumbo import jumbo
from molehunt.bank.rows import backdoored, folder_of, read_rows, regrow
from molehunt.charts.words import DASHED
from molehunt.figures import INK, REST, SAID, Axes, chart
from molehunt.game.attacker import parse_settings
from molehunt.meta_training import fit
from molehunt.metas import Meta, Settings
from molehunt.networks import Network
from molehunt.runner import generator
from molehunt.shadows import JumboDraw, Shadows
from molehunt.suspect import freeze
from molehunt.tasks import Images, Task, get_task
from molehunt.testing import auc
from molehunt.training import Recipe
from molehunt.training.layout import Layout
from molehunt.training.members import Member, Plan
from molehunt.training.population import train_population
from record import Figure, append, machine, rows, todo, write

NAME, DEVELOP, RESULT = "mntd", "mntd-develop", "rounds_3_4"
TASK, NETWORK = "mnist", "mntd_mnist"
SHORT = Recipe(epochs=10, batch=50, optimizer="adamw", lr=4e-3, weight_decay=0.0, schedule="linear", warmup=0.15)
TARGETS = Recipe(epochs=4, batch=100, optimizer="adamw", lr=1e-3, weight_decay=0.0, schedule="constant")
SEED = 70_000  # first of the targets; no other work uses seeds from here to 79 999
KINDS = ("clean", "patch", "blend", "stripes")
CLASSIFIERS, DRAWS = 5, 2_000
PAGE = Path(__file__).parent.parent / "docs/reference/defenses/mntd.md"


@dataclass(frozen=True)
class Stripes:
    """SIG with a drawn target, a family that is in no shadow."""

    seed: int

    def __call__(self, images: Images, task: Task, rng: torch.Generator) -> Any:
        """Poison images."""
        target = int(torch.randint(task.num_classes, (1,), generator=generator(self.seed, "mntd stripes")))
        return SIG(target=target)(images, task, rng)


def drawn(kind: str, seed: int, task: Task) -> JumboDraw:
    """The first draw of a kind from a seed on: a patch, or a pattern over the whole picture."""
    number = seed * 1_000
    while True:
        trigger: Any = jumbo(task.shape, task.num_classes, torch.Generator().manual_seed(number)).trigger
        whole = bool((trigger.mask > 0).all())
        if whole == (kind == "blend"):
            return JumboDraw(number)
        number += 1


def targets(kind: str, count: int, develop: bool) -> Plan:
    """Targets of one kind."""
    task = get_task(TASK)
    first = SEED + 1_000 * KINDS.index(kind) + (500 if develop else 0)
    half = len(task.load("train").y) // 2
    members = []
    for number in range(count):
        seed = first + number
        poison: Any = {"clean": None, "stripes": Stripes(seed)}.get(kind)
        if kind in {"patch", "blend"}:
            poison = drawn(kind, seed, task)
        members.append(Member(name=f"{kind} {seed}", seed=seed, poison=poison, subset=half, subset_seed=seed))
    return Plan(task=TASK, network=NETWORK, recipe=TARGETS, members=tuple(members))


def grown(kind: str, count: int, develop: bool, state: Path) -> list[Network]:
    """Train or read targets of one kind, one network per block, spread over the processors."""
    folder = state / f"targets-{kind}-{'develop' if develop else 'report'}-{count}"
    layout = Layout(block=1, processes=len(os.sched_getaffinity(0)))
    found = []
    for one in train_population(targets(kind, count, develop), folder, layout=layout):
        freeze(one.network)
        found.append(one.network)
        print(f"\r{kind} {len(found)}/{count}", end="", flush=True)
    print()
    return found


def shadows(count: int) -> tuple[list[Network], Tensor]:
    """Shadows, clean and backdoored in turn, and their target classes."""
    population = Shadows(task=TASK, network=NETWORK, count=count, images=1_200, recipe=SHORT)

    def told(what: str, done: int, total: int) -> None:
        print(f"\r{what} {done}/{total}", end="", flush=True)

    networks = [one.network for one in population.grow(report=told)]
    print()
    for network in networks:
        freeze(network)
    return networks, population.targets()


def scored(
    networks: list[Network], goals: Tensor, settings: Settings, judged: dict[str, list[Network]], of: str = TASK
) -> tuple[dict[str, Tensor], float]:
    """Mean logits over the meta-classifiers by kind, and the seconds that training them took."""
    task, sums = get_task(of), dict[str, Tensor]()
    start = time.monotonic()
    spent = 0.0
    for place in range(CLASSIFIERS):
        rng = generator(place, "mntd benchmark")
        meta = Meta(task.shape, task.num_classes, task.mean, task.std, settings, rng)
        fit(meta, networks, goals, rng)
        spent += time.monotonic() - start
        for kind, some in judged.items():
            said = meta.scores(some).double()
            said = said.amax(1) if said.ndim == 2 else said
            sums[kind] = sums.get(kind, torch.zeros(len(some), dtype=torch.float64)) + said / CLASSIFIERS
        start = time.monotonic()
    return sums, spent


def interval(scores: Tensor, positive: Tensor, rng: torch.Generator) -> tuple[list[float], float]:
    """95 % interval of an AUC over draws of targets, and the 95 % quantile with shuffled labels."""
    groups = [positive.nonzero().squeeze(1), (~positive).nonzero().squeeze(1)]
    found, shuffled = [], []
    for _ in range(DRAWS):
        some = torch.cat([g[torch.randint(len(g), (len(g),), generator=rng)] for g in groups])
        found.append(auc(scores[some], positive[some]))
        shuffled.append(auc(scores, positive[torch.randperm(len(positive), generator=rng)]))
    ends = torch.tensor(found).double().quantile(torch.tensor([0.025, 0.975]).double())
    return ends.tolist(), float(torch.tensor(shuffled).double().quantile(0.95))


def judge(count: int, many: list[int], settings: dict[str, Any], number: int, develop: bool, state: Path) -> None:
    """Make a row per number of shadows."""
    name = DEVELOP if develop else NAME
    keys = [{"shadows": m, "settings": settings, "targets": number} for m in many]
    wanted = list(todo(name, keys))
    if not wanted:
        print("these rows are there already")
        return
    judged = {kind: grown(kind, number, develop, state) for kind in KINDS}
    networks, goals = shadows(count)
    for key in wanted:
        m = 2 * key["shadows"]
        busy = round(os.getloadavg()[0], 2)
        sums, spent = scored(networks[:m], goals[:m], Settings(**settings), judged)
        row: dict[str, Any] = {**key, "seconds": spent}
        for kind in KINDS[1:]:
            scores = torch.cat([sums["clean"], sums[kind]])
            positive = torch.arange(len(scores)) >= len(sums["clean"])
            ends, chance = interval(scores, positive, generator(0, "mntd interval"))
            row[kind] = {"auc": auc(scores, positive), "interval_95": ends, "shuffled_95": chance}
        append(name, {**row, "threads": torch.get_num_threads(), "busy": busy, "machine": machine()})
        print(key, {kind: (round(row[kind]["auc"], 4), row[kind]["interval_95"]) for kind in KINDS[1:]}, flush=True)


def banked(task: str, part: str, root: Path) -> tuple[list[Network], list[str | None]]:
    """Models of a bank that are there: clean ones, and those whose backdoor works; and what is hidden in each."""
    network = get_task(task).network
    listed, folder = bank.entries(task, network, part), folder_of(root, task, network)
    there = {row.name: row for row in read_rows(listed, folder)}
    works = backdoored(there.values())
    networks: list[Network] = []
    kinds: list[str | None] = []
    for entry in listed:
        if entry.name in there and (not entry.planted or entry.name in works):
            networks.append(regrow(entry, there[entry.name]))
            freeze(networks[-1])
            kinds.append(entry.kind if entry.planted else None)
    return networks, kinds


def judge_bank(task: str, part: str, most: int, settings: dict[str, Any], root: Path) -> None:
    """Make rows of how meta-classifiers judge the models of a bank: one, or by the number of shadow models."""
    name = DEVELOP if part == "develop" else NAME
    many = [most] if settings else [m for m in (8, 16, 32, 64, 128) if m <= most] or [most]
    told = asdict(Settings(**settings))
    keys = [{"bank": task, "part": part, "shadows": m, "settings": settings, "configuration": told} for m in many]
    wanted = list(todo(name, keys))
    if not wanted:
        print("these rows are there already")
        return
    networks, kinds = banked(task, part, root)
    if len({kind is None for kind in kinds}) < 2:
        raise ValueError(f"{root} has no clean and backdoored models of {task}, {part}; build them, or name --banks")
    positive = torch.tensor([kind is not None for kind in kinds])
    population = Shadows(task=task, network=get_task(task).network, count=max(many))
    shadows_, goals = [one.network for one in population.grow()], population.targets()
    for network in shadows_:
        freeze(network)
    for key in wanted:
        m, busy = 2 * key["shadows"], round(os.getloadavg()[0], 2)
        found, spent = scored(shadows_[:m], goals[:m], Settings(**settings), {"all": networks}, task)
        ends, chance = interval(found["all"], positive, generator(0, "mntd interval"))
        families = {}
        for kind in sorted({kind for kind in kinds if kind is not None}):
            some = torch.tensor([one is None or one == kind for one in kinds])
            families[kind] = auc(found["all"][some], positive[some])
        counts = {"clean": int((~positive).sum()), "backdoored": int(positive.sum())}
        row = {**key, "auc": auc(found["all"], positive), "interval_95": ends, "shuffled_95": chance, **counts}
        row |= {"families": families, "seconds": spent}
        append(name, {**row, "threads": torch.get_num_threads(), "busy": busy, "machine": machine()})
        print({k: v for k, v in row.items() if k != "machine"}, flush=True)


def picture() -> None:
    """Draw AUC by number of shadow models on the bank's evaluate partition, and write its words into the page."""
    found = [row for row in rows(NAME) if row.get("part") == "evaluate"]
    if not found:
        return
    task = found[-1]["bank"]
    found = sorted((row for row in found if row["bank"] == task), key=lambda row: int(row["shadows"]))
    many, middle = [row["shadows"] for row in found], [row["auc"] for row in found]
    ends = [[row["interval_95"][i] for row in found] for i in (0, 1)]

    def draw(axes: Axes) -> None:
        axes.fill_between(many, ends[0], ends[1], color=REST, label="95 % of draws of models")
        axes.plot(many, middle, "o-", color=SAID, linewidth=2.0, label="AUC")
        chance = max(row["shuffled_95"] for row in found)
        axes.axhline(chance, color=INK, linewidth=1.2, linestyle=DASHED, label="shuffled labels, 95 %")
        axes.set_xscale("log", base=2)
        axes.set_xticks(many, [str(m) for m in many])
        axes.set_ylim(0.5, 1.02)
        axes.set_xlabel("shadow models of either kind")
        axes.set_ylabel("AUC")

    told = ", ".join(f"{row['auc']:.3f} with {row['shadows']}" for row in found)
    made = chart(draw, f"MNTD on {task}, AUC by number of shadow models of either kind: {told}")
    (PAGE.parent / "mntd_shadows.png").write_bytes(made.png)
    line = f"![{made.alt}](mntd_shadows.png)"
    PAGE.write_text(re.sub(r"!\[[^\]]*\]\(mntd_shadows\.png\)", lambda _: line, PAGE.read_text()))


def collect() -> None:
    """Write the figures into results/rounds_3_4.json, and the picture."""
    picture()
    figures: dict[str, Figure] = {}
    for row in rows(NAME):
        if row["settings"]:
            continue
        if "bank" in row:
            figures[f"MNTD, bank of {row['bank']}, {row['shadows']} + {row['shadows']} shadows, AUC"] = Figure(
                value=row["auc"],
                unit="share",
                goal=None,
                better="higher",
                spread=row["interval_95"],
                command=f"python benchmarks/reproduce_mntd.py bank --task {row['bank']} --part {row['part']} "
                f"--shadows {row['shadows']} --banks FOLDER",
                note=f"{row['clean']} clean and {row['backdoored']} backdoored models of six families; shuffled labels "
                f"reach {row['shuffled_95']:.3f}; {', '.join(f'{k} {v:.3f}' for k, v in row['families'].items())}",
            )
            continue
        for kind, goal in (("patch", 0.98), ("blend", 0.99), ("stripes", None)):
            figures[f"MNTD on MNIST, {row['shadows']} + {row['shadows']} shadows, {kind}, AUC"] = Figure(
                value=row[kind]["auc"],
                unit="share",
                goal=goal if row["shadows"] == 512 else None,
                better="higher",
                spread=row[kind]["interval_95"],
                command=f"python benchmarks/reproduce_mntd.py run --shadows {row['shadows']}",
                note=f"{row['targets']} clean and {row['targets']} backdoored targets; shuffled labels reach "
                f"{row[kind]['shuffled_95']:.3f}",
            )
    print(write(RESULT, figures).read_text())


def main() -> None:
    """Grow, choose, report or collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["grow", "try", "run", "bank", "collect"])
    parser.add_argument("--shadows", type=int, help="of either kind; default: 512, of bank 128")
    parser.add_argument("--targets", type=int, help="of every kind; default: 100, of try 30")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of metas; try only")
    parser.add_argument("--state", type=Path, default=Path("runs/mntd"), help="folder of the targets")
    parser.add_argument("--banks", type=Path, default=Path("runs/bank"), help="of bank: folder of banks")
    parser.add_argument("--task", default="mnist5k", help="of bank")
    parser.add_argument("--part", choices=["develop", "evaluate"], default="evaluate", help="of bank")
    arguments = parser.parse_args()
    if arguments.what == "collect":
        return collect()
    develop = arguments.what == "try" or (arguments.what == "bank" and arguments.part == "develop")
    if arguments.set and not develop:
        parser.error("--set changes the method, so its figure would not be that of the defaults; use try")
    number = arguments.targets or (30 if develop else 100)
    torch.set_num_threads(1)
    if arguments.what == "bank":
        settings = parse_settings(arguments.set)
        return judge_bank(arguments.task, arguments.part, arguments.shadows or 128, settings, arguments.banks)
    most = arguments.shadows or 512
    if arguments.what == "grow":
        shadows(most)
        for kind in KINDS:
            grown(kind, number, False, arguments.state)
        return None
    many = [most] if develop else [m for m in (16, 32, 64, 128, 256, 512) if m <= most]
    return judge(most, many, parse_settings(arguments.set), number, develop, arguments.state)


if __name__ == "__main__":
    main()
