"""Scan one model: ask every defense about it, fuse what they say, and lay it out for a report."""

import copy
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version

import torch
from torch import nn

from molehunt import calibration, checkpoints, combine
from molehunt.asking import Budget, ask
from molehunt.calibration import Population
from molehunt.defenses import Defense
from molehunt.examination import Inspect, divide
from molehunt.findings import Abstention, Failure, Outcome, Verdict
from molehunt.metas import Meta
from molehunt.power import power, unused
from molehunt.report import CLEAR_AT, FOUND_AT, Change, Pictures, ScanReport
from molehunt.runner import generator
from molehunt.suspect import Suspect
from molehunt.tasks import DEFENDER, SPLITS, Images, Task
from molehunt.tensor_file import CheckpointError

EXAMPLES = 4
"""Example pictures in the report."""
PLAUSIBLE = 0.5
"""Below this accuracy the report asks whether model and pictures belong together."""


def clean_images(task: Task, seed: int, pictures: Task | None = None) -> Images:
    """Return the clean images that a scan works with; the training split of the task is never read.

    Args:
        task: what the model was trained for.
        seed: draws the images.
        pictures: a folder of pictures, as a task, to take them from: all of its splits. None takes the same part of
            the task's test split that a game gives to its defender.

    Raises:
        ValueError: the folder has pictures of another shape, or another number of classes.
        DataError: the data could not be had.
    """
    if pictures is None:
        return task.secret(seed)[0]
    if pictures.shape != task.shape or pictures.num_classes != task.num_classes:
        raise ValueError(
            f"the clean pictures have shape {pictures.shape} and {pictures.num_classes} classes, the model needs "
            f"{task.shape} and {task.num_classes}; name another folder, or its size with ?size=HEIGHTxWIDTH"
        )
    parts = [pictures.load(split) for split in SPLITS]
    x, y = torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts])
    rows = torch.randperm(len(y), generator=generator(seed, "clean images"))[:DEFENDER]
    return Images(x[rows], y[rows])


def comparable(population: Population, task: Task, network: str) -> Population:
    """Hand back a reference population if its models are of this task and network.

    Raises:
        ValueError: they are not.
    """
    if (population.task, population.network) != (task.name, network):
        raise ValueError(
            f"the references are {population.network} models of {population.task}, this is a {network} of {task.name}"
        )
    return population


def scan(
    model: nn.Module,
    task: Task,
    clean: Images,
    *,
    name: str,
    defenses: Mapping[str, Defense],
    inspect: Inspect,
    population: Population | None = None,
    metas: Sequence[Meta] | None = None,
    recipe: str | None = None,
    device: str | None = None,
    found_at: float = FOUND_AT,
    clear_at: float = CLEAR_AT,
    command: str = "",
    notes: tuple[str, ...] = (),
    budget: Budget | None = None,
    keep: bool = False,
) -> ScanReport:
    """Ask every defense about a model and fuse the answers.

    Repairs are asked last, and only where one may be taken, see `asking.ask`.

    Args:
        model: any module from pictures in [0, 1] to logits; its network's name is its `name`, else that of its class.
        task: what it was trained for.
        clean: clean labeled images. Four fifths go to the defenses; what they answer is measured on the rest.
        name: what the report calls the model.
        defenses: which to ask, by name.
        inspect: runs one of them, as in `examination.examine`.
        population: clean reference models to compare scores with, or None.
        metas: meta-classifiers for models of this task and network, or None.
        recipe: name of the recipe by which the model says it was trained; None where nothing says so.
        device: where to work; a GPU when there is one, else the CPU.
        found_at: p from which the model is called backdoored.
        clear_at: p up to which it is called clean.
        command: what scans it again.
        notes: what else the report should say.
        budget: time for all defenses together; None is no limit. The report says what more time would buy.
        keep: Ctrl-C ends the asking and not the scan: the report is about what had been answered until then.
    """
    seen, held_out = divide(clean)
    suspect = Suspect.of(model, task, clean=seen, metas=tuple(metas) if metas else None, device=device)
    if not _runs(suspect):
        suspect = Suspect.of(model, task, clean=seen, metas=suspect.metas, device=suspect.device, dtype=torch.float32)
        notes += ("The network does not run in the fast number format; the defenses worked in float32.",)

    def fuse(outcomes: Iterable[Outcome]) -> Verdict:
        return combine.verdict(
            outcomes, population, classes=task.num_classes, suspect=suspect, held_out=held_out, recipe=recipe
        )

    verdict = ask(suspect, defenses, inspect, fuse, budget=budget, keep=keep)
    caught = None
    if population is not None and verdict.p_values and not verdict.details["could_not_tell"]:
        caught = power(population, list(verdict.p_values))
        told = None if caught is None else unused(population, caught, _unheard(verdict))
        notes += () if told is None else (told,)
    repaired = _repaired(suspect, verdict)
    accuracy = Change(
        before=_accuracy(suspect, held_out), after=None if repaired is None else _accuracy(repaired, held_out)
    )
    if accuracy.before < PLAUSIBLE:
        notes += (
            f"The model is right about {accuracy.before:.0%} of the clean pictures. Is it the right task, in the right "
            "order of classes, with pixels in [0, 1]?",
        )
    return ScanReport(
        name=name,
        task=task.name,
        network=network_name(model),
        shape=task.shape,
        classes=task.classes,
        verdict=verdict,
        when=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        pictures=_pictures(suspect, verdict, held_out),
        accuracy=accuracy,
        asr=_success(suspect, repaired, verdict, held_out),
        power=caught,
        notes=notes,
        command=command,
        versions={"molehunt": version("molehunt"), "torch": torch.__version__, "python": platform.python_version()},
        model_sha256=_digest(suspect.model),
        references_sha256="" if population is None else calibration.digest(population),
        found_at=found_at,
        clear_at=clear_at,
    )


def network_name(model: nn.Module) -> str:
    """What a module calls its network, else the name of its class."""
    name = getattr(model, "name", None)
    return name if isinstance(name, str) and name else type(model).__name__


def _runs(suspect: Suspect) -> bool:
    """Whether the model runs in the suspect's number format; code of strangers need not."""
    if suspect.dtype == torch.float32:
        return True
    try:
        answers = suspect.logits(torch.rand(2, *suspect.task.shape, generator=torch.Generator().manual_seed(0)))
    except RuntimeError:
        return False
    return bool(torch.isfinite(answers).all())


def _repaired(suspect: Suspect, verdict: Verdict) -> Suspect | None:
    if verdict.repaired is None:
        return None
    model = copy.deepcopy(suspect.model)
    model.load_state_dict(dict(verdict.repaired))
    return Suspect.of(model, suspect.task, device=suspect.device, dtype=suspect.dtype)


def _digest(model: nn.Module) -> str:
    """SHA-256 of the canonical weights; empty where a tensor has no canonical form, as in code of the user's own."""
    try:
        return checkpoints.digest(checkpoints.canonical(model.state_dict()))
    except CheckpointError:
        return ""


def _unheard(verdict: Verdict) -> list[str]:
    """Names of those that more time would have let speak."""
    return [o.defense for o in verdict.outcomes if isinstance(o, Abstention | Failure)]


def _accuracy(suspect: Suspect, images: Images) -> float:
    """Share of the images that are classified right; 0 if there are none."""
    if len(images.y) == 0:
        return 0.0
    return float((suspect.logits(images.x).argmax(1).cpu() == images.y).double().mean())


def _meant(verdict: Verdict, y: torch.Tensor) -> torch.Tensor:
    """Which images the recovered trigger is meant for, bool (N,)."""
    if verdict.sources is not None:
        return torch.isin(y, torch.tensor(verdict.sources))
    return y.ne(-1 if verdict.target is None else verdict.target)


def _success(suspect: Suspect, repaired: Suspect | None, verdict: Verdict, images: Images) -> Change | None:
    """How often the recovered trigger sends images of its sources to its class, before and after the repair."""
    if verdict.trigger is None or verdict.target is None:
        return None
    others = images.x[_meant(verdict, images.y)]
    if len(others) == 0:
        return None
    stamped = Images(verdict.trigger(others), torch.full((len(others),), verdict.target))
    return Change(before=_accuracy(suspect, stamped), after=None if repaired is None else _accuracy(repaired, stamped))


def _pictures(suspect: Suspect, verdict: Verdict, images: Images) -> Pictures | None:
    """Examples without and with the recovered trigger; None where nothing was recovered."""
    if verdict.trigger is None:
        return None
    x = images.x[_meant(verdict, images.y)][:EXAMPLES]
    if len(x) == 0:
        return None
    stamped = verdict.trigger(x)
    return Pictures(clean=x, recovered=stamped, clean_says=_says(suspect, x), recovered_says=_says(suspect, stamped))


def _says(suspect: Suspect, x: torch.Tensor) -> tuple[str, ...]:
    return tuple(suspect.task.classes[k] for k in suspect.logits(x).argmax(1).tolist())
