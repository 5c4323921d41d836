"""Scanning from Python: `molehunt.scan` takes any classifier that torch can run."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from molehunt import calibration, defenses, meta_files, runner
from molehunt.asking import Budget
from molehunt.defenses import DEFENSES, Defense
from molehunt.findings import Outcome
from molehunt.foreign import Opened, Wanted, adapted, advice, opened, pixels
from molehunt.foreign.files import is_foreign
from molehunt.game.rules import get_round
from molehunt.game.submission import read_submission
from molehunt.networks import Adapted, Network
from molehunt.report import CLEAR_AT, FOUND_AT, ScanReport
from molehunt.scanning import clean_images, network_name
from molehunt.scanning import scan as scan_with
from molehunt.suspect import Suspect
from molehunt.tasks import Images, Task, get_task

Clean = Images | tuple[Tensor, Tensor] | Path | str


def scan(
    model: nn.Module | Path | str,
    clean: Clean | None = None,
    *,
    task: Task | str | None = None,
    classes: Sequence[str] | None = None,
    network: str | None = None,
    normalize: str | tuple[Sequence[float], Sequence[float]] | None = None,
    size: tuple[int, int] | None = None,
    channels: int | None = None,
    ask: Mapping[str, Defense] | Sequence[str] | None = None,
    seed: int = 0,
    seconds: float = 600,
    budget: float | None = None,
    device: str | None = None,
    found_at: float = FOUND_AT,
    clear_at: float = CLEAR_AT,
) -> ScanReport:
    """Ask every defense whether something is hidden in a model.

    Nothing of a file is run; a module is your own code already.

    Args:
        model: a classifier of pictures, in any mode and on any device, which is not changed; or a file or folder, as
            `molehunt scan` takes it.
        clean: clean labeled pictures: tensors (N, C, H, W) in [0, 1] and (N,), a folder with one folder of pictures per
            class, or a `.npz` file. None takes the task's own.
        task: what the model was trained for, or its name. None where `clean` says it all.
        classes: names of the classes, for tensors without a task.
        network: of a file: the name of a listed network, timm:NAME, or FILE.py:CALLABLE, which is run. Of a module:
            what the report calls it.
        normalize: what the module does *not* do itself: "none", "signed" (-1 to 1), "bytes" (0 to 255), "imagenet",
            "cifar10", "task", "MEAN/STD", or mean and deviation as two sequences in units of [0, 1]. None gives it
            pixels in [0, 1].
        size: height and width that the module takes, where they are not those of the pictures.
        channels: channels that it takes, 1 or 3, where they are not those of the pictures.
        ask: whom to ask, defenses by name, or with settings of your own. None asks all, with the budget of a final.
        seed: draws what the defenses draw.
        seconds: time limit for one defense.
        budget: seconds for all defenses together: the cheap ones are asked first, and `report.notes` say what more time
            would buy. None is no limit.
        device: where to work; a GPU when there is one, else the CPU.
        found_at: p from which the model is called backdoored.
        clear_at: p up to which it is called clean.

    Returns:
        The report: `report.verdict` has p, q and the outcomes, `report.notes` the warnings. A repaired state dict in it
        has the names of the module that you handed in. `molehunt.report` writes it as text, JSON or a page.

    Raises:
        ValueError: a model or pictures that cannot be taken; the message says what to do.
        DataError: the data of the task could not be had.
    """
    problem, images, notes = _pictures(clean, task, classes, seed)
    found = _opened(model, problem, network, normalize, size, channels)
    if found.pixels is not None:
        notes += advice(found.model, problem, images, found.pixels)
    chosen = _chosen(ask)
    allowed = None if budget is None else Budget(seconds=budget)
    report = scan_with(
        found.model,
        problem,
        images,
        name=found.name if isinstance(model, nn.Module) else Path(model).name,
        defenses=chosen,
        inspect=partial(_inspect, seed=seed, seconds=seconds, budget=allowed),
        population=calibration.shipped(problem.name, found.name, chosen),
        metas=meta_files.shipped(problem.name, found.name),
        recipe=found.recipe,
        device=device,
        found_at=found_at,
        clear_at=clear_at,
        notes=(*found.notes, *notes),
        budget=allowed,
    )
    return _with_names_of(model, found.model, report)


def open_model(path: Path, task: Task, wanted: Wanted) -> Opened:
    """Read a model from a file or folder: a submission, weights, or what other tools write.

    The sealed part of a submission is not opened.

    Args:
        path: the file or folder.
        task: what the model was trained for.
        wanted: what the user says about it.

    Raises:
        Refused: it is refused; the message says what to do.
    """
    if is_foreign(path):
        return opened(path, task, wanted)
    contents = read_submission(path, task=task, allowed_networks=None if wanted.network is None else [wanted.network])
    model = contents.model()
    return Opened(model=model, name=model.name, recipe=contents.manifest.recipe)


def final_defenses() -> dict[str, Defense]:
    """Make every defense, the built-in ones with the short budget of a final, in which everything plays as in a scan.

    Raises:
        ValueError: an installed package brings one that cannot be loaded.
    """
    kinds = defenses.available()
    made: dict[str, Defense] = {name: kind() for name, kind in kinds.items()}
    return made | get_round("final").make("weights", {n: k for n, k in kinds.items() if n in DEFENSES})


def _opened(
    model: nn.Module | Path | str,
    task: Task,
    network: str | None,
    normalize: str | tuple[Sequence[float], Sequence[float]] | None,
    size: tuple[int, int] | None,
    channels: int | None,
) -> Opened:
    if not isinstance(model, nn.Module):
        wanted = Wanted(network=network, normalize=normalize, size=size, channels=channels)
        return open_model(Path(model), task, wanted)
    own = isinstance(model, Network) and normalize is None
    given = None if own else pixels(normalize or "none", task)
    whole, notes = adapted(model, task, name=network or network_name(model), pixels=given, size=size, channels=channels)
    return Opened(model=whole, name=whole.name, pixels=given, notes=notes)


def _pictures(
    clean: Clean | None, task: Task | str | None, classes: Sequence[str] | None, seed: int
) -> tuple[Task, Images, tuple[str, ...]]:
    problem = get_task(task) if isinstance(task, str) else task
    if clean is None:
        if problem is None:
            raise ValueError("say what the model was trained for (task=NAME), or hand over clean pictures")
        return problem, clean_images(problem, seed), ()
    own = () if problem is None else ("The clean pictures are not the task's own.",)
    if isinstance(clean, str | Path):
        read = pictures_at(Path(clean))
        return problem or read, clean_images(problem or read, seed, read), own
    x, y = clean
    problem = problem or _task_of(x, y, classes)
    if tuple(x.shape[1:]) != problem.shape or y.shape != (len(x),) or len(x) == 0:
        raise ValueError(
            f"expected pictures (N, {', '.join(map(str, problem.shape))}) and N labels, got {tuple(x.shape)} and "
            f"{tuple(y.shape)}"
        )
    if int(y.min()) < 0 or int(y.max()) >= problem.num_classes:
        raise ValueError(f"labels must be 0 to {problem.num_classes - 1}, got {int(y.min())} to {int(y.max())}")
    # Shuffled, for the last fifth is kept from the defenses and must have all classes in it.
    rows = torch.randperm(len(y), generator=runner.generator(seed, "clean images"))
    return problem, Images(x.float().cpu()[rows], y.long().cpu()[rows]), own


def pictures_at(path: Path) -> Task:
    """Read a folder of pictures, or a `.npz` file, as a task.

    Raises:
        ValueError: it is neither.
    """
    return get_task(f"npz:{path}" if path.suffix.lower() == ".npz" else f"folder:{path}")


def _task_of(x: Tensor, y: Tensor, classes: Sequence[str] | None) -> Task:
    if x.dim() != 4 or not x.is_floating_point() or not len(x) or float(x.min()) < 0 or float(x.max()) > 1:
        raise ValueError(f"expected floats (N, C, H, W) in [0, 1] as pictures, got {x.dtype} {tuple(x.shape)}")
    names = tuple(classes) if classes is not None else tuple(str(k) for k in range(int(y.max()) + 1))
    std, mean = torch.std_mean(x.float(), dim=(0, 2, 3), correction=0)
    return Task(
        name="pictures of your own",
        shape=(x.shape[1], x.shape[2], x.shape[3]),
        classes=names,
        augment="crop",
        network="resnet18",
        mean=tuple(mean.tolist()),
        std=tuple(std.clamp_min(1e-4).tolist()),
    )


def _chosen(wanted: Mapping[str, Defense] | Sequence[str] | None) -> dict[str, Defense]:
    if isinstance(wanted, Mapping):
        return dict(wanted)
    known = final_defenses()
    if wanted is None:
        return known
    if odd := [name for name in wanted if name not in known]:
        raise ValueError(f"unknown defense {odd[0]!r}; known: {', '.join(known)}")
    return {name: known[name] for name in wanted}


def _inspect(
    name: str, defense: Defense, suspect: Suspect, *, seed: int, seconds: float, budget: Budget | None
) -> Outcome:
    most = seconds if budget is None else budget.limit(seconds)
    return runner.inspect(defense, suspect, name=name, seed=seed, seconds=most)


def _with_names_of(model: object, whole: Network | Adapted, report: ScanReport) -> ScanReport:
    """Give a repaired state the names of the module that was handed in."""
    state = report.verdict.repaired
    if state is None or not isinstance(model, nn.Module) or not isinstance(whole, Adapted):
        return report
    own = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    return dataclasses.replace(report, verdict=dataclasses.replace(report.verdict, repaired=own))
