"""RAB's certified curves at the settings of the official examples, and how fast its networks are trained.

    python benchmarks/rab_curves.py speed --state FOLDER     members per second, beside one by one in float32
    python benchmarks/rab_curves.py passes --state FOLDER    MNIST 0 against 1, N = 100: 2 passes against 20
    python benchmarks/rab_curves.py curves --state FOLDER    MNIST 0 against 1, N = 1 000, as many passes as that allows
    python benchmarks/rab_curves.py color --state FOLDER     CIFAR-10, airplane against bird, N = 250
    python benchmarks/rab_curves.py collect                  results/rounds_3_4.json, the page and its picture

Two classes, Adam at 1e-3, batches of 128 (CIFAR-10: 64), one draw of noise per member, no augmentation; `mntd_mnist`
and `mntd_cifar` with two outputs. In the training set one pixel is moved by an l2 norm of 1 on 10 % of the rows
(CIFAR-10: 0.1 on 2 %), which get the label of the second class. Asked are all test pictures of the two classes, as they
are and with the pixel moved. Hard votes, alpha = .001; a fifth of the members chooses the class and the others bound
it. A curve is the share of test pictures that are certified (*rate*), and certified and right (*accuracy*), beyond a
total l2 norm of a change of the training pictures; under the trigger the label is still that of the picture.

Members are trained in blocks, in the layout that is fastest here. A finished block is a file in the folder `--state`: a
run that was killed goes on from there. Member m draws from seed m whatever N and the number of passes.

`passes` compares certified accuracy on the same test pictures, at the radii 0, .2, .5 and 1: two passes are enough
where the lower end of the one-sided 95 % interval of the difference (draws of test pictures, not of members) is above
-.01 at each of them, at sigma .5 and 1. `curves` asks for its verdict, or takes `--epochs`.

`speed` times, in turns and for equally many passes: one member by a float32 loop whose pictures come one by one from a
data loader, as in public code; one by the same loop with all pictures in one tensor; and four blocks of ours per
process, the start of the processes included.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from molehunt.defenses import RAB
from molehunt.defenses._certificates import certified
from molehunt.defenses._ensemble import answers, noise
from molehunt.defenses.rab import RADII, SETTLING
from molehunt.networks import default_device, fast_dtype
from molehunt.runner import generator
from molehunt.suspect import Suspect, freeze
from molehunt.training.layout import Layout
from rab_ensembles import COLOR, LONG, Case, Material, begun, ensemble, grow, kind, material, read, settle
from rab_tables import NAME, collect, enough
from record import append, machine, todo

SIGMAS, SHORT = (0.5, 1.0), 2
ROUNDS = 4  # blocks that each process trains in `speed`, so that starting it does not weigh much
WAYS = ("loader", "tensor", "ours")
GATED, DRAWS = (0.0, 0.2, 0.5, 1.0), 2_000
POINTS = 60  # of a curve


def halves(case: Case, ballots: Tensor) -> dict[str, dict[str, Tensor]]:
    """Radii of the test pictures as they are, and of those under the trigger, and whether the class chosen is right."""
    about, found = material(case), {}
    choosing = max(1, round(SETTLING * case.members))
    for name, some in zip(("clean", "triggered"), torch.arange(len(about.y)).chunk(2), strict=True):
        told = RAB(members=case.members, size=case.sigma).certificate(ballots[:, some], about.y[some], 2, case.members)
        winner = (2 * ballots[:choosing, some].sum(0) > choosing).long()  # ties go to class 0, as there
        right = winner == about.y[some]
        found[name] = {"radii": told["radii"], "right": right, "most": torch.tensor(told["most"])}
    return found


def curve(key: dict[str, Any], case: Case, state: Path) -> dict[str, Any]:
    """Make the row of one ensemble."""
    busy, start = round(os.getloadavg()[0], 2), time.monotonic()
    ballots, cost = ensemble(case, state)
    about, parts = material(case), halves(case, ballots)
    most = float(parts["clean"]["most"])
    at = sorted({*RADII, *torch.linspace(0.0, most, POINTS, dtype=torch.float64).tolist()})
    row: dict[str, Any] = {**key, "alpha": RAB().alpha, "most": most, "at": at}
    for name, part in parts.items():
        rate, accuracy = certified(part["radii"], part["right"], torch.tensor(at, dtype=torch.float64))
        right = float(part["right"].double().mean())
        row[name] = {
            "pictures": len(part["right"]),
            "right": right,
            "rate": rate.tolist(),
            "accuracy": accuracy.tolist(),
        }
    # What the certificate would have to reach: the norm of the poison over all its rows.
    row |= {"training": len(about.training.y), "poisoned": about.poisoned, "poison": case.norm * about.poisoned**0.5}
    return {**row, **cost, "wall": time.monotonic() - start, "busy": busy, "machine": machine()}


def compared(key: dict[str, Any], short: Case, long: Case, state: Path) -> dict[str, Any]:
    """Certified accuracy after few passes less that after many, on the same clean pictures."""
    at, hits = torch.tensor(GATED, dtype=torch.float64), []
    for case in (short, long):
        part = halves(case, ensemble(case, state)[0])["clean"]
        hits.append(((part["radii"].unsqueeze(1) > at) & part["right"].unsqueeze(1)).double())
    apart, rng = hits[0] - hits[1], generator(0, "rab passes")
    drawn = torch.stack([apart[torch.randint(len(apart), (len(apart),), generator=rng)].mean(0) for _ in range(DRAWS)])
    return {
        **key,
        "at": list(GATED),
        "accuracy": [one.mean(0).tolist() for one in hits],
        "difference": apart.mean(0).tolist(),
        "lower_95_one_sided": drawn.quantile(0.05, dim=0).tolist(),
    }


def one_by_one(case: Case, number: int, *, loader: bool) -> dict[str, Any]:
    """Train one member in float32 with a plain loop, its pictures from a data loader or from one tensor."""
    start, about = time.perf_counter(), material(case)
    network, (x, y), rng = begun(case, number)
    optimizer = torch.optim.Adam(network.train().parameters(), lr=case.recipe.lr)
    for _ in range(case.epochs):
        batches: Iterable[Sequence[Tensor]]
        if loader:
            batches = DataLoader(TensorDataset(x, y), batch_size=case.batch, shuffle=True, generator=rng)
        else:
            order = torch.split(torch.randperm(len(y), generator=rng), case.batch)
            batches = ((x[some], y[some]) for some in order)
        for pictures, labels in batches:
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(network(pictures), labels))
            optimizer.step()
    freeze(network)
    shift = noise(about.task.shape, "gaussian", case.sigma, rng)
    said = answers(network, Suspect.of(network, about.task, dtype=torch.float32), about.asked, shift)
    return {"members": 1, "seconds": time.perf_counter() - start, "accuracy": right_of(said[None], about)}


def right_of(ballots: Tensor, about: Material) -> float:
    """Mean accuracy of members (m, pictures) on the clean half of what is asked."""
    half = len(about.y) // 2
    return float((ballots[:, :half] == about.y[:half]).double().mean())


def timed(key: dict[str, Any], case: Case, layout: Layout, threads: int) -> dict[str, Any]:
    """Train by all three ways, one after the other; what each takes is all that a member needs."""
    about, busy, number = material(case), round(os.getloadavg()[0], 2), 10_000 + 1_000 * int(key["repeat"])
    torch.set_num_threads(threads)
    row = {**key, "loader": one_by_one(case, number, loader=True), "tensor": one_by_one(case, number, loader=False)}
    count = ROUNDS * layout.processes
    blocks = [range(number + i * layout.block, number + (i + 1) * layout.block) for i in range(count)]
    with tempfile.TemporaryDirectory() as scratch:
        items = [(Path(scratch) / f"{i}.safetensors", numbers) for i, numbers in enumerate(blocks)]
        start = time.perf_counter()
        paths = list(layout.engine().map(partial(grow, case, layout.threads), items))
        seconds = time.perf_counter() - start
        ballots = torch.cat([read(path, case, numbers)[0] for path, numbers in zip(paths, blocks, strict=True)])
    row["ours"] = {"members": len(ballots), "seconds": seconds, "accuracy": right_of(ballots, about)}
    dtype = str(fast_dtype(default_device())).removeprefix("torch.")
    return {**row, "layout": asdict(layout), "threads": threads, "dtype": dtype, "busy": busy, "machine": machine()}


def make(key: dict[str, Any], way: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Make a row that no run has made yet, keep it, and say so."""
    for lacking in todo(NAME, [key]):
        row = way(lacking)
        append(NAME, row)
        shown = ("what", "task", "sigma", "members", "epochs", "difference", "lower_95_one_sided", *WAYS)
        print({name: row[name] for name in shown if name in row}, flush=True)


def draw(cases: Sequence[Case], state: Path) -> None:
    """Make the rows of some ensembles, one after the other."""
    for case in cases:
        make({"what": "curve", **case.to_json()}, partial(curve, case=case, state=state))


def main() -> None:
    """Make rows, or collect them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "passes", "curves", "color", "collect"])
    parser.add_argument("--state", type=Path, default=Path("runs/rab_curves"), help="folder of the finished blocks")
    parser.add_argument("--members", type=int, help="N; default: 100 of passes, 1 000 of curves, 250 of color")
    parser.add_argument("--epochs", type=int, help="passes of speed, curves and color; default: 20, what is enough, 10")
    parser.add_argument("--images", type=int, help="training pictures and test pictures at most; default: all")
    parser.add_argument("--repeats", type=int, default=3, help="of speed")
    arguments = parser.parse_args()
    if arguments.what == "collect":
        return collect()
    state, own = arguments.state, {"images": arguments.images}
    if arguments.what == "color":
        case = replace(COLOR, members=arguments.members or COLOR.members, epochs=arguments.epochs or COLOR.epochs)
        return draw([replace(case, **own)], state)
    if arguments.what == "speed":
        case = Case(epochs=arguments.epochs or LONG, **own)
        layout, threads = settle(case, state), len(os.sched_getaffinity(0))
        for repeat in range(arguments.repeats):
            key = {"what": "speed", **kind(case), "repeat": repeat}
            make(key, partial(timed, case=case, layout=layout, threads=threads))
        return None
    if arguments.what == "passes":
        for sigma in SIGMAS:
            pair = [Case(sigma=sigma, epochs=n, members=arguments.members or 100, **own) for n in (SHORT, LONG)]
            draw(pair, state)
            key = {"what": "passes", "sigma": sigma, "members": pair[0].members, "passes": [SHORT, LONG], **own}
            make(key, partial(compared, short=pair[0], long=pair[1], state=state))
        return None
    epochs = arguments.epochs or (SHORT if enough(SIGMAS) else LONG)
    return draw([Case(sigma=s, epochs=epochs, members=arguments.members or 1_000, **own) for s in SIGMAS], state)


if __name__ == "__main__":
    main()
