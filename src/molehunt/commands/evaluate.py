"""`molehunt evaluate`: judge a defense, also one of your own, on the bank's evaluation part."""

import hashlib
import importlib
import inspect as source
import json
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molehunt.commands import consoles
from molehunt.commands.bank import ROOT, Folder, Most, Net
from molehunt.commands.exits import DONE, InputError, given
from molehunt.commands.interrupt import RESUMES, Interrupt
from molehunt.commands.options import Seconds, TaskName, importing_from_here
from molehunt.commands.watch import watching
from molehunt.legible import legible

if TYPE_CHECKING:
    from molehunt.defenses import Defense


def evaluate(
    defense: Annotated[
        str, typer.Argument(help="A defense by name, or MODULE:CLASS for your own.", show_default=False)
    ],
    task: TaskName = "mnist5k",
    network: Net = None,
    most: Most = None,
    folder: Folder = ROOT,
    seconds: Seconds = 600,
) -> int:
    """Score the evaluation part of the model bank with one defense, and show how well it tells backdoored from clean.

    It runs in this process, with its default settings. A scored model is on disk at once, and a run that was stopped
    goes on when the same command is given again; with other code it begins anew.
    """
    console = consoles.messages()
    with Interrupt(console, RESUMES, gentle=True) as interrupt:
        from molehunt import bank
        from molehunt.bank.judgement import judge
        from molehunt.bank.rows import folder_of
        from molehunt.bank.scores import calibrate as score
        from molehunt.commands.evaluation import evaluation
        from molehunt.commands.fetching import ensure
        from molehunt.examination import Inspect
        from molehunt.runner import generator
        from molehunt.tasks import get_task

        with given(), importing_from_here():
            network = network or get_task(task).network
            listed = bank.entries(task, network, "evaluate", most=most)
            made, place = _find(defense)
        ensure(task, console)
        with watching(console) as watch:
            watch.stage(f"Scoring {len(listed)} models", len(listed))

            @contextmanager
            def inspecting(seed: int) -> Iterator[Inspect]:
                with evaluation(
                    False, seed=seed, seconds=seconds, interrupt=interrupt, watch=watch, say=console.print
                ) as run:
                    yield run[0]

            def tell(name: str, scores: Mapping[str, float | None]) -> None:
                value = scores.get(defense)
                watch.done(name, "no score" if value is None else f"score {value:.3g}")
                interrupt.check()

            where = folder_of(folder, task, network)
            with given((ValueError, OSError)):
                found = score(listed, where, {defense: made}, inspecting, report=tell, place=place)
                clean = [row[0] for row in found.table([defense])]
                planted = [row[0] for row in found.table([defense], planted=True)]
                told = judge(clean, planted, generator(0, "evaluate"))
    costs = [json.loads((where / place / f"{e.name}.json").read_text())["seconds"].get(defense) for e in listed]
    known = [cost for cost in costs if cost is not None]
    shown = consoles.result()
    shown.print(
        f"{legible(defense, 80)}: AUC {told.auc:.3f} [{told.low:.3f}, {told.high:.3f}] on {told.clean} clean and "
        f"{told.planted} backdoored models",
        soft_wrap=True,
    )
    shown.print(f"shuffled labels give up to {told.permuted:.3f} (95 %)")
    missing = len(found.models) - told.clean - told.planted
    shown.print(f"no score on {missing} models; {statistics.median(known):.2f} s per model (median)")
    return DONE


def _find(name: str) -> "tuple[Defense, str]":
    """Return a defense and the folder of its scores, which is another one when its code is another.

    Raises:
        ValueError: there is no such defense, or it is none.
    """
    from molehunt.defenses import available

    module, colon, attribute = name.partition(":")
    if not colon and name not in available():
        raise ValueError(f"unknown defense {name!r}; known: {', '.join(available())}, MODULE:CLASS")
    try:
        kind: Any = getattr(importlib.import_module(module), attribute, None) if colon else available()[name]
    except Exception as error:  # a stranger's module may raise anything
        raise ValueError(f"{module} cannot be imported: {type(error).__name__}: {error}") from error
    if not (isinstance(kind, type) and is_dataclass(kind) and hasattr(kind, "needs") and "__call__" in dir(kind)):
        raise ValueError(f"{name} is no defense: a frozen dataclass with `needs`, called with (suspect, run)")
    try:
        made: Any = kind()
    except TypeError as error:
        raise InputError(f"{name} needs settings, and is evaluated with its defaults: {error}") from error
    digest = hashlib.sha256(Path(source.getfile(kind)).read_bytes()).hexdigest()
    return made, f"scores-{name.replace(':', '.')}-{digest[:12]}"
