"""What a population costs: beside the official recipe, as a whole, and whether a short schedule is good enough.

    python benchmarks/population.py speed                      both recipes, interleaved, seconds per model
    python benchmarks/population.py grow mnist --state FOLDER  1 024 MNIST shadows; also: cifar (256), narrow (64)
    python benchmarks/population.py gate --state FOLDER        do short shadows train as good a meta-classifier?
    python benchmarks/population.py guard --state FOLDER       can the recipe be read in place of the backdoor?
    python benchmarks/population.py collect                    results/population.json from all rows

Every call but the last appends rows to results/population.jsonl. Weights lie in the folder `--state`, in blocks; an
interrupted run goes on from there, but only a run that was not interrupted counts for the seconds of a population.

Ratios are per image: a poisoned set of the official recipe has its copies on top, one of ours has them among its 1 200.

*official*: the recipe of MNTD's public code, written again from its description: one network at a time, float32, two
threads, a data loader that hands over one picture after the other and stamps it then, q copies appended; 100 passes
over 1 200 images, batch 100, Adam 1e-3. *equal*: as many passes and the same rates by `train_population`, in the number
format and the layout that are fastest here. *short*: 10 passes, batch 50, one cycle up to 4e-3.

The gate: five meta-classifiers (ten queries that are tuned, 20 hidden units, raw logits, ten passes of one model per
step, Adam 1e-3) on 128 clean and 128 poisoned shadows of either recipe, with the same starting weights, judge the same
128 clean and 128 poisoned targets (half of the training split, four passes). The official shadows are trained by the
official code path, those that `speed` times. The difference of their AUCs is paired; its interval comes from 2 000
draws of targets and meta-classifiers with replacement, but of one draw of shadows. The last pass counts, none is
chosen.

The guard: 60 clean `badnets_cnn` of 3 150 mnist5k images against 60 whose training differs as much as a poison of a
tenth would make it differ, without any backdoor: *repeated*, a tenth of the rows shows other rows' images once more,
which is what a poison does here, as poisoned rows take the place of clean ones; *added*, 350 further images at as many
passes, which is what appending a poison would do. Beside them 60 that are backdoored, as a scale.
"""

import argparse
import json
import multiprocessing
import os
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress, TaskID, track
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from molehunt import bank
from molehunt.attacks import BadNets
from molehunt.attacks.jumbo import jumbo
from molehunt.bank.guard import MOST, telltale
from molehunt.engine import Local, Processes
from molehunt.files import write_atomically
from molehunt.game.answers import accuracy, asr, measure
from molehunt.networks import Network, build, default_device, fast_dtype
from molehunt.runner import generator
from molehunt.tasks import Images, Task, get_task
from molehunt.testing import auc
from molehunt.training import Recipe, recipe_for
from molehunt.training.layout import Layout
from molehunt.training.layout import measure as measure_layout
from molehunt.training.members import Grown, Member, Plan
from molehunt.training.population import train_population
from molehunt.triggers import Target
from record import Figure, append, machine, rows, spread, write

NAME = "population"
OFFICIAL_PASSES = 100
EQUAL = Recipe(epochs=100, batch=100, optimizer="adamw", lr=1e-3, weight_decay=0.0, schedule="constant")
SHORT = Recipe(epochs=10, batch=50, optimizer="adamw", lr=4e-3, weight_decay=0.0, schedule="linear", warmup=0.15)
TARGETS = Recipe(epochs=4, batch=100, optimizer="adamw", lr=1e-3, weight_decay=0.0, schedule="constant")
CIFAR = Recipe(epochs=50, batch=100, optimizer="adamw", lr=1e-3, weight_decay=0.0, schedule="linear", warmup=0.1)
SUBSET = 1_200
TEST_IMAGES = 2_000
SEED = 60_000  # first of the shadows; no other work uses seeds from here to 69 999
GUARDED, PERMUTATIONS = 60, 20
QUERIES, HIDDEN, PASSES, CLASSIFIERS, DRAWS = 10, 20, 10, 5, 2_000


@dataclass(frozen=True)
class Draw:
    """One attack of the jumbo distribution, by its seed; it travels to another process as this number."""

    seed: int

    def __call__(self, images: Images, task: Task, rng: torch.Generator) -> Any:
        """Poison images."""
        attack = jumbo(task.shape, task.num_classes, torch.Generator().manual_seed(self.seed))
        return attack(images, task, rng)


def members(count: int, first: int, *, subset: int | None, shared: bool = True) -> tuple[Member, ...]:
    """Members by number, every second one poisoned; a block has as many of either kind."""
    return tuple(
        Member(
            name=f"{'poisoned' if number % 2 else 'clean'} {number}",
            seed=first + number,
            poison=Draw(first + number) if number % 2 else None,
            subset=subset,
            subset_seed=0 if shared else first + number,
        )
        for number in range(count)
    )


@cache
def test_images(task: str) -> Images:
    """The first images of the test split, for accuracies."""
    found = get_task(task).load("test")
    return Images(found.x[:TEST_IMAGES], found.y[:TEST_IMAGES])


class Memory:
    """The most memory that this process and its workers held at one time, in GiB, looked at twice a second.

    Pages that several processes share are counted in parts (PSS), so the sum is what the machine gave.
    """

    def __enter__(self) -> "Memory":
        """Begin to look."""
        self.peak_gib, self._stop = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Look a last time, and end."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
            self.peak_gib = max(self.peak_gib, sum(map(proportional, pids)) / 2**20)
            if self._stop.wait(0.5):
                return


def proportional(pid: int | None) -> int:
    """KiB of a process, shared pages in parts; 0 for one that is gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(re.findall(r"^Pss:\s+(\d+) kB", text, re.M)[0])


def conditions() -> dict[str, Any]:
    """What a row must say about its machine."""
    dtype = str(fast_dtype(default_device())).removeprefix("torch.")
    return {"dtype": dtype, "busy": round(os.getloadavg()[0], 2), "machine": machine()}


class OneByOne(Dataset[tuple[Tensor, Tensor]]):
    """The official training set: clean images, then stamped copies, each made when it is asked for."""

    def __init__(self, images: Images, seed: int | None) -> None:
        """Draw which images are copied, if any."""
        self.images, self.attack, self.rows = images, None, torch.zeros(0, dtype=torch.int64)
        if seed is not None:
            self.attack = jumbo(tuple(images.x.shape[1:]), 10, torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
            rate = self.attack.poison_rate
            copies = round(rate / (1 - rate) * len(images.y))
            self.rows = torch.randperm(len(images.y), generator=torch.Generator().manual_seed(seed))[:copies]

    def __len__(self) -> int:
        return len(self.images.y) + len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index < len(self.images.y):
            return self.images.x[index], self.images.y[index]
        assert self.attack is not None
        assert self.attack.trigger is not None
        stamped = self.attack.trigger(self.images.x[self.rows[index - len(self.images.y)]][None])[0]
        return stamped, torch.tensor(self.attack.target)


def official(images: Images, task: Task, seed: int, *, poisoned: bool) -> tuple[Network, int]:
    """Train one network by the official recipe; also answers how many images it saw."""
    data = OneByOne(images, seed if poisoned else None)
    network = build("mntd_mnist", task.shape, task.num_classes, rng=generator(seed, "official")).train()
    loader = DataLoader(data, batch_size=100, shuffle=True, generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    seen = 0
    for _ in range(OFFICIAL_PASSES):
        for x, y in loader:
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(network(x), y))
            optimizer.step()
            seen += len(y)
    return network.eval(), seen


def official_shadow(folder: Path, member: Member) -> Path:
    """Train one shadow by the official recipe and put it on disk, if it is not there."""
    path = folder / f"{member.seed}.safetensors"
    if not path.exists():
        torch.set_num_threads(1)
        task = get_task("mnist")
        start = time.monotonic()
        network, _ = official(subset_of(task), task, member.seed, poisoned=member.poison is not None)
        seconds = json.dumps(time.monotonic() - start)
        write_atomically(path, [save(dict(network.state_dict()), metadata={"seconds": seconds})])
    return path


def official_shadows(folder: Path, some: Sequence[Member]) -> list[Grown]:
    """Train shadows by the official recipe, as many at a time as there are cores; those on disk are read."""
    folder.mkdir(parents=True, exist_ok=True)
    task, found = get_task("mnist"), []
    cores = len(os.sched_getaffinity(0))
    paths = (Processes(cores, 1) if cores > 1 else Local()).map(partial(official_shadow, folder), some)
    for member, path in track(zip(some, paths, strict=True), description="official", total=len(some)):
        network = build("mntd_mnist", task.shape, task.num_classes)
        with safe_open(path, framework="pt") as file:
            network.load_state_dict({name: file.get_tensor(name) for name in network.state_dict()})
            seconds = float(json.loads(file.metadata()["seconds"]))
        found.append(Grown(member=member, network=network.eval(), losses=(), seconds=seconds))
    return found


def subset_of(task: Task) -> Images:
    """The images that every shadow of this benchmark is trained on; as `Member(subset_seed=0)` draws them."""
    train = task.load("train")
    chosen = torch.randperm(len(train.y), generator=torch.Generator().manual_seed(0))[:SUBSET].sort().values
    return Images(train.x[chosen], train.y[chosen])


def quality(grown: Sequence[Grown], task: str) -> list[dict[str, Any]]:
    """Accuracy of every network, and the success of every trigger, on test images."""
    found = []
    for one in grown:
        attack = None
        if isinstance(one.member.poison, Draw):
            about = get_task(task)
            attack = jumbo(about.shape, about.num_classes, torch.Generator().manual_seed(one.member.poison.seed))
        answers = measure(one.network, test_images(task), attack.trigger if attack else None)
        row: dict[str, Any] = {"name": one.member.name, "seed": one.member.seed, "seconds": one.seconds}
        row["accuracy"] = accuracy(answers.plain, answers.y)
        if attack is not None and answers.stamped is not None:
            assert isinstance(attack.target, int)
            row["asr"] = asr(answers.stamped, answers.y, Target(classes=attack.target))
        found.append(row)
    return found


def speed(state: Path, repeats: int) -> None:
    """Time both sides in turns: two official networks, then eight at equal passes, then 64 short ones."""
    task = get_task("mnist")
    images = subset_of(task)
    layouts = {
        name: measure_layout("mntd_mnist", task.shape, task.num_classes, recipe)[0]
        for name, recipe in (("equal", EQUAL), ("short", SHORT))
    }
    done = sum(row["kind"] == "speed" for row in rows(NAME))
    for repeat in range(done, done + repeats):
        row: dict[str, Any] = {"kind": "speed", "repeat": repeat, **conditions(), "threads": torch.get_num_threads()}
        start, seen = time.monotonic(), 0
        networks = []
        for poisoned in (False, True):
            network, count = official(images, task, SEED + 5_000 + 2 * repeat + poisoned, poisoned=poisoned)
            networks.append(network)
            seen += count
        spent = time.monotonic() - start
        row["official"] = {"models": 2, "seconds": spent, "images": seen, "per_model": spent / 2}
        for name, recipe, count in (("equal", EQUAL, 8), ("short", SHORT, 64)):
            plan = Plan(
                task="mnist",
                network="mntd_mnist",
                recipe=recipe,
                members=members(count, SEED + 6_000 + 100 * repeat, subset=SUBSET),
            )
            start = time.monotonic()
            grown = list(train_population(plan, state / f"speed-{name}-{repeat}-{os.getpid()}", layout=layouts[name]))
            spent = time.monotonic() - start
            seen = sum(recipe.steps(SUBSET) * recipe.batch for _ in grown)
            row[name] = {"models": count, "seconds": spent, "images": seen, "per_model": spent / count}
            row[name]["layout"] = vars(layouts[name]) | {}
            row[name]["accuracy"] = spread([q["accuracy"] for q in quality(grown, "mnist")])
        test = test_images("mnist")
        row["official"]["accuracy"] = [accuracy(measure(n, test).plain, test.y) for n in networks]
        append(NAME, row)
        print({k: v for k, v in row.items() if k != "machine"}, flush=True)


def plan_of(what: str) -> Plan:
    """The whole populations that the goals are about."""
    if what == "mnist":
        return Plan(task="mnist", network="mntd_mnist", recipe=SHORT, members=members(1024, SEED, subset=SUBSET))
    return Plan(task="cifar10", network="mntd_cifar", recipe=CIFAR, members=members(256, SEED + 2_000, subset=1_000))


def tell(progress: Progress, line: TaskID, done: int, total: int) -> None:
    """Show how far things are."""
    progress.update(line, completed=done, total=total)


def through(plan: Plan, folder: Path, label: str, *, layout: Layout | None = None) -> list[Grown]:
    """Train a population with a progress bar."""
    with Progress() as progress:
        line = progress.add_task(label)
        return list(train_population(plan, folder, layout=layout, report=partial(tell, progress, line)))


def grow_bank(state: Path) -> None:
    """Train the last 64 models of the bank's calibrate partition with as many processes as there are cores.

    They have their own recipes and attacks, so no two of them could share a block. benchmarks/bank.py keeps their rows.
    """
    listed = bank.entries("cifar10", "narrow_cifar", "calibrate")[-64:]
    folder = state / "grow-narrow"
    begun = len(bank.read_rows(listed, folder)) if folder.exists() else 0
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(1)
    conditions_, start = conditions(), time.monotonic()
    peaks = [0.0]
    with Memory() as memory, Progress() as progress:
        line = progress.add_task("narrow")

        def report(row: bank.Row, done: int, total: int) -> None:
            tell(progress, line, done, total)
            if done == total // 4:
                peaks.append(memory.peak_gib)

        made = bank.build(listed, folder, processes=cores, report=report)
    whole = {
        "kind": "whole",
        "population": "narrow",
        "models": len(made),
        "seconds": time.monotonic() - start,
        "blocks_found": begun,
        "layout": {"block": 1, "processes": cores, "threads": 1},
        "peak_gib": memory.peak_gib,
        "peak_gib_of_a_quarter": peaks[-1],
        "accuracy": spread([row.accuracy for row in made]),
        "plain": spread([row.accuracy for row in made if row.kind == "plain"]),
        "asr": spread([row.asr for row in made if row.asr is not None]),
        **conditions_,
    }
    append(NAME, whole)
    print({k: v for k, v in whole.items() if k != "machine"}, flush=True)


def grow(what: str, state: Path) -> None:
    """Train one whole population, then append a row per member and one for all."""
    plan, folder = plan_of(what), state / f"grow-{what}"
    begun = len(list(folder.glob("block-*.safetensors")))
    conditions_, start = conditions(), time.monotonic()
    peaks = []
    with Memory() as memory, Progress() as progress:
        line = progress.add_task(what)
        # Nothing is kept: memory must not grow with the number of models.
        for number, _ in enumerate(train_population(plan, folder, report=partial(tell, progress, line)), start=1):
            if number in {len(plan.members) // 4, len(plan.members)}:
                peaks.append(memory.peak_gib)
    seconds = time.monotonic() - start
    said = []
    for one in train_population(plan, folder):
        (row,) = quality([one], plan.task)
        append(NAME, {"kind": "member", "population": what, **row})
        said.append(row)
    layout = json.loads((folder / "layout.json").read_text())
    whole = {
        "kind": "whole",
        "population": what,
        "models": len(said),
        "seconds": seconds,
        "blocks_found": begun,
        "layout": layout,
        "peak_gib": memory.peak_gib,
        "peak_gib_of_a_quarter": peaks[0],
        "recipe": plan.recipe.to_json(),
        "accuracy": spread([row["accuracy"] for row in said]),
        "asr": spread([row["asr"] for row in said if "asr" in row]),
        **conditions_,
    }
    append(NAME, whole)
    print({k: v for k, v in whole.items() if k != "machine"}, flush=True)


class Meta(nn.Module):
    """A meta-classifier with its queries."""

    def __init__(self, task: Task, seed: int) -> None:
        """Draw queries around the data's mean, and small weights."""
        super().__init__()
        rng = generator(seed, "meta-classifier")
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (task.mean, task.std))
        self.queries = nn.Parameter(mean + std * torch.randn(QUERIES, *task.shape, generator=rng))
        self.hidden = nn.Linear(QUERIES * task.num_classes, HIDDEN)
        self.head = nn.Linear(HIDDEN, 1)
        for layer in (self.hidden, self.head):
            bound = layer.in_features**-0.5
            for value in (layer.weight, layer.bias):
                with torch.no_grad():
                    value.uniform_(-bound, bound, generator=rng)

    def forward(self, network: Network) -> Tensor:
        """Logit of "poisoned", a scalar."""
        answer: Tensor = self.head(torch.relu(self.hidden(network(self.queries).flatten())))
        return answer[0]


def fitted(grown: Sequence[Grown], task: Task, seed: int) -> Meta:
    """Train a meta-classifier on shadows."""
    meta = Meta(task, seed)
    optimizer = torch.optim.Adam(meta.parameters(), lr=1e-3)
    rng = generator(seed, "meta order")
    for one in grown:
        one.network.requires_grad_(False).eval()
    for _ in range(PASSES):
        for index in torch.randperm(len(grown), generator=rng).tolist():
            one = grown[index]
            label = torch.tensor(float(one.member.poison is not None))
            optimizer.zero_grad()
            torch.autograd.backward(F.binary_cross_entropy_with_logits(meta(one.network), label))
            optimizer.step()
    return meta


def gate(state: Path) -> None:
    """Compare meta-classifiers of official and short shadows on the same targets."""
    task = get_task("mnist")
    populations = {
        "targets": (TARGETS, members(256, SEED + 8_000, subset=len(task.load("train").y) // 2, shared=False)),
        "short": (SHORT, members(256, SEED + 7_000, subset=SUBSET)),
    }
    grown = {
        name: through(
            Plan(task="mnist", network="mntd_mnist", recipe=recipe, members=some), state / f"gate-{name}", name
        )
        for name, (recipe, some) in populations.items()
    }
    grown["official"] = official_shadows(state / "gate-official", members(256, SEED + 7_000, subset=SUBSET))
    truth = torch.tensor([one.member.poison is not None for one in grown["targets"]])
    scores: dict[str, list[Tensor]] = {"official": [], "short": []}
    for number in range(CLASSIFIERS):
        for name in scores:
            meta = fitted(grown[name], task, number).eval()
            with torch.no_grad():
                scores[name].append(torch.stack([meta(one.network) for one in grown["targets"]]))
            print(number, name, round(auc(scores[name][-1], truth), 4), flush=True)
    rng = generator(0, "gate interval")
    groups = [truth.nonzero().squeeze(1), (~truth).nonzero().squeeze(1)]
    drawn = []
    for _ in range(DRAWS):
        some = torch.cat([g[torch.randint(len(g), (len(g),), generator=rng)] for g in groups])
        which = torch.randint(CLASSIFIERS, (CLASSIFIERS,), generator=rng).tolist()
        differences = [
            auc(scores["short"][i][some], truth[some]) - auc(scores["official"][i][some], truth[some]) for i in which
        ]
        drawn.append(sum(differences) / len(differences))
    found = {name: [auc(s, truth) for s in kept] for name, kept in scores.items()}
    shuffled = [truth[torch.randperm(len(truth), generator=rng)] for _ in range(DRAWS)]
    permuted = {
        name: float(torch.tensor([auc(kept[0], other) for other in shuffled]).quantile(0.95))
        for name, kept in scores.items()
    }
    quantiles = torch.tensor(drawn, dtype=torch.float64).quantile(torch.tensor([0.05, 0.025, 0.975]).double())
    row = {
        "kind": "gate",
        "auc": found,
        "permuted_95": permuted,
        "difference": sum(found["short"]) / CLASSIFIERS - sum(found["official"]) / CLASSIFIERS,
        "lower_95_one_sided": float(quantiles[0]),
        "interval_95": [float(quantiles[1]), float(quantiles[2])],
        "quality": {
            name: {
                "accuracy": spread([q["accuracy"] for q in said]),
                "asr": spread([q["asr"] for q in said if "asr" in q]),
            }
            for name, said in ((name, quality(some, "mnist")) for name, some in grown.items())
        },
        "recipes": {name: recipe.to_json() for name, (recipe, _) in populations.items()},
        "official_seconds": spread([one.seconds for one in grown["official"]]),
        **conditions(),
    }
    append(NAME, row)
    print({k: v for k, v in row.items() if k != "machine"}, flush=True)


@dataclass(frozen=True)
class Repeats:
    """A set in which a share of the rows shows the images of other rows of the same class."""

    share: float = 0.1

    def __call__(self, images: Images, task: Task, rng: torch.Generator) -> "Repeated":
        """Replace rows, drawn by the generator."""
        order = torch.randperm(len(images.y), generator=rng)
        replaced, kept = order[: round(self.share * len(order))], order[round(self.share * len(order)) :]
        x = images.x.clone()
        for label in range(task.num_classes):
            rows_, others = replaced[images.y[replaced] == label], kept[images.y[kept] == label]
            x[rows_] = images.x[others[torch.randint(len(others), (len(rows_),), generator=rng)]]
        return Repeated(Images(x, images.y))


@dataclass(frozen=True)
class Repeated:
    """What `Repeats` makes."""

    images: Images

    def stamp(self, x: Tensor, rows: Tensor) -> Tensor:
        """Stamp nothing."""
        return x


def guard(state: Path) -> None:
    """Tell clean models from clean models with other sets by weight norm and accuracy."""
    task = get_task("mnist5k")
    recipe, count = recipe_for("badnets_cnn", task), len(task.load("train").y)
    fewer = round(0.9 * count)
    sorts: dict[str, tuple[int, Any]] = {
        "clean": (fewer, None),
        "repeated": (fewer, Repeats()),
        "added": (count, None),
        "backdoored": (fewer, BadNets(target=0, size=4)),
    }
    plan = Plan(
        task="mnist5k",
        network="badnets_cnn",
        recipe=recipe,
        members=tuple(
            Member(
                name=f"{sort} {number}",
                seed=SEED + 9_000 + GUARDED * place + number,
                subset=subset,
                subset_seed=SEED + 9_000 + GUARDED * place + number,
                poison=poison,
            )
            for place, (sort, (subset, poison)) in enumerate(sorts.items())
            for number in range(GUARDED)
        ),
    )
    # One at a time: sets of different sizes cannot share a block.
    grown = through(plan, state / "guard", "guard", layout=Layout(block=1, processes=os.cpu_count() or 1))
    test = task.load("test")
    found: dict[str, list[tuple[float, float]]] = {sort: [] for sort in sorts}
    for one in grown:
        norm = sum(float(p.detach().double().square().sum()) for p in one.network.parameters()) ** 0.5
        found[one.member.name.split()[0]].append((norm, accuracy(measure(one.network, test).plain, test.y)))
    rng, row = generator(0, "guard permutation"), {"kind": "guard", **conditions(), "count": GUARDED}
    for sort in ("repeated", "added", "backdoored"):
        both = found["clean"] + found[sort]
        order = [torch.randperm(len(both), generator=rng).tolist() for _ in range(PERMUTATIONS)]
        shuffled = [telltale([both[i] for i in o[:GUARDED]], [both[i] for i in o[GUARDED:]]) for o in order]
        row[sort] = {"auc": telltale(found["clean"], found[sort]), "permuted": spread(shuffled)}
    row["norm"] = {sort: spread([n for n, _ in listed]) for sort, listed in found.items()}
    row["accuracy"] = {sort: spread([a for _, a in listed]) for sort, listed in found.items()}
    append(NAME, row)
    print({k: v for k, v in row.items() if k != "machine"}, flush=True)


def ratio(row: dict[str, Any], name: str) -> float:
    """Times as many models per second as the official recipe, for equally many images of a set."""
    per_image = {k: row[k]["seconds"] / row[k]["images"] for k in ("official", name)}
    passes = {"official": OFFICIAL_PASSES, name: (EQUAL if name == "equal" else SHORT).epochs}
    return float(per_image["official"] * passes["official"] / (per_image[name] * passes[name]))


def informed(row: dict[str, Any]) -> bool:
    """Whether the official shadows teach anything: two useless classifiers would pass the gate."""
    return bool(min(row["auc"]["official"]) > row["permuted_95"]["official"])


def holds(row: dict[str, Any]) -> bool:
    """Whether a short schedule passed the gate."""
    return informed(row) and bool(row["lower_95_one_sided"] >= -0.02)


def collect() -> None:
    """Write results/population.json."""
    kept, figures = rows(NAME), {}
    timed = [row for row in kept if row["kind"] == "speed"]
    # One machine and number format: what was measured elsewhere cannot share a median.
    timed = [row for row in timed if all(row[k] == timed[-1][k] for k in ("machine", "dtype", "threads"))]
    gates = [row for row in kept if row["kind"] == "gate"]
    if timed:
        command = "python benchmarks/population.py speed"
        note = f"{timed[-1]['dtype']}; load before each run {[row['busy'] for row in timed]}"
        for name, goal in (("equal", 3.0), ("short", 25.0)):
            ratios = [ratio(row, name) for row in timed]
            # A short schedule counts for nothing until its shadows are known to be as good.
            shown = spread(ratios)["median"] if name == "equal" or any(map(holds, gates[-1:])) else None
            figures[f"MNTD network on MNIST, times as many models per second as the official recipe, {name}"] = Figure(
                value=shown, unit="ratio", goal=goal, better="higher", spread=spread(ratios),
                seeds=[row["repeat"] for row in timed], command=command,
                note=note if shown is not None else f"{note}; the gate has not been passed",
            )  # fmt: skip
        for name in ("official", "equal", "short"):
            values = [row[name]["per_model"] for row in timed]
            figures[f"MNTD network on MNIST, seconds per model, {name}"] = Figure(
                value=spread(values)["median"], unit="s", goal=None, better="lower", spread=spread(values),
                command=command, note=note,
            )  # fmt: skip
    for row in gates[-1:]:
        figures["short schedule, AUC of meta-classifiers less that of official shadows, lower 95 % bound"] = Figure(
            value=row["lower_95_one_sided"] if informed(row) else None, unit="AUC", goal=-0.02, better="higher",
            spread=f"difference {row['difference']:.4f}, 95 % interval {row['interval_95'][0]:.4f} to "
            f"{row['interval_95'][1]:.4f}",
            command="python benchmarks/population.py gate",
            note=f"AUC official {[round(a, 3) for a in row['auc']['official']]}, short "
            f"{[round(a, 3) for a in row['auc']['short']]}; with shuffled labels up to {row['permuted_95']}",
        )  # fmt: skip
    for row in (row for row in kept if row["kind"] == "guard"):
        wanted: dict[str, float | None] = {"repeated": MOST, "added": MOST, "backdoored": None}
        for sort, most in wanted.items():
            figures[f"guard, AUC of weight norm and accuracy, clean against {sort}"] = Figure(
                value=row[sort]["auc"], unit="AUC", goal=most, better="lower",
                spread=f"with permuted labels {row[sort]['permuted']['min']:.2f} to {row[sort]['permuted']['max']:.2f}",
                command="python benchmarks/population.py guard",
            )  # fmt: skip
    minutes = {"mnist": 20, "cifar": 60, "narrow": 60}
    # A run that only read blocks says nothing about time and memory.
    for row in (row for row in kept if row["kind"] == "whole" and row["blocks_found"] == 0):
        what, command = row["population"], f"python benchmarks/population.py grow {row['population']}"
        figures[f"{row['models']} networks, {what}, time"] = Figure(
            value=row["seconds"] / 60, unit="min", goal=minutes[what], better="lower", command=command,
            note=f"{row['dtype']}, layout {row['layout']['block']} x {row['layout']['processes']} x "
            f"{row['layout']['threads']}; load before {row['busy']}",
        )  # fmt: skip
        figures[f"{row['models']} networks, {what}, memory"] = Figure(
            value=row["peak_gib"], unit="GiB", goal=4.0, better="lower", command=command,
            note=f"after a quarter of the models {row['peak_gib_of_a_quarter']:.2f}",
        )  # fmt: skip
        figures[f"{row['models']} networks, {what}, accuracy"] = Figure(
            value=row["accuracy"]["median"], unit="share", goal=0.85 if what == "narrow" else None, better="higher",
            spread=row["accuracy"], command=command,
        )  # fmt: skip
        figures[f"{row['models']} networks, {what}, ASR"] = Figure(
            value=row["asr"]["median"], unit="share", goal=None, better="higher", spread=row["asr"], command=command
        )
    print(write(NAME, figures).read_text())


def main() -> None:
    """Measure one thing, or collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "grow", "gate", "guard", "collect"])
    parser.add_argument("population", nargs="?", choices=["mnist", "cifar", "narrow"], help="of grow")
    parser.add_argument("--repeats", type=int, default=3, help="of speed")
    parser.add_argument("--state", type=Path, default=Path("runs/population"), help="folder of the blocks")
    arguments = parser.parse_args()
    if arguments.what == "collect":
        return collect()
    arguments.state.mkdir(parents=True, exist_ok=True)
    if arguments.what == "speed":
        return speed(arguments.state, arguments.repeats)
    if arguments.what == "gate":
        return gate(arguments.state)
    if arguments.what == "guard":
        return guard(arguments.state)
    if arguments.population is None:
        parser.error("grow needs a population: mnist, cifar or narrow")
    if arguments.population == "narrow":
        return grow_bank(arguments.state)
    return grow(arguments.population, arguments.state)


if __name__ == "__main__":
    main()
