"""`molehunt scan`: is something hidden in this model?"""

import json
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molehunt.commands import consoles
from molehunt.commands.exits import CLEAR, FOUND, UNSURE, InputError, check_target, given, reading
from molehunt.commands.interrupt import Interrupt
from molehunt.commands.options import Metas, Seconds, Seed, Threads, use_threads
from molehunt.commands.watch import watching
from molehunt.files import write_atomically
from molehunt.legible import legible

if TYPE_CHECKING:
    from molehunt.foreign import Opened, Wanted
    from molehunt.tasks import Task

STANDARD_OUTPUT = Path("-")
NAMES = re.compile(r"(timm|hf|hf-hub|https?):")


def scan(
    path: Annotated[
        Path,
        typer.Argument(
            help="A submission (folder or archive), a .safetensors or .pt file of weights, or a folder with one.",
            show_default=False,
        ),
    ],
    task: Annotated[
        str | None,
        typer.Option(help="What the model was trained for, such as cifar10.", metavar="NAME", show_default=False),
    ] = None,
    clean: Annotated[
        Path | None,
        typer.Option(
            help="Clean pictures: a folder with one folder per class, or a .npz file with x and y. Needed where the "
            "task is none of the known ones.",
            metavar="PATH",
            show_default=False,
        ),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            help="Architecture of the weights, such as resnet18 or timm:NAME; or FILE.py:CALLABLE, a class or function "
            "of your own, which is run.",
            metavar="NAME",
            show_default=False,
        ),
    ] = None,
    normalize: Annotated[
        str | None,
        typer.Option(
            help="How the network wants its pixels: none (0 to 1), signed (-1 to 1), bytes (0 to 255), imagenet, "
            "cifar10, task, or MEAN/STD such as 0.5/0.25.",
            metavar="HOW",
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Size of the pictures that the network takes, where it is not that of the clean ones.",
            metavar="HEIGHTxWIDTH",
            show_default=False,
        ),
    ] = None,
    channels: Annotated[
        int | None,
        typer.Option(
            help="Channels that the network takes, 1 or 3, where they are not those of the clean pictures.",
            min=1,
            max=3,
            show_default=False,
        ),
    ] = None,
    references: Annotated[
        Path | None,
        typer.Option(
            help="How models of the same task and network score: the file of `molehunt calibrate`, or "
            "references/population.json of a game.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    metas: Metas = None,
    json_: Annotated[
        Path | None,
        typer.Option(
            "--json", help="Write the answer as JSON; - is the standard output.", metavar="FILE", show_default=False
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write the answer as one HTML page.", metavar="FILE", show_default=False)
    ] = None,
    sarif: Annotated[
        Path | None,
        typer.Option(help="Write the answer as SARIF, which code hosts show.", metavar="FILE", show_default=False),
    ] = None,
    found_at: Annotated[float, typer.Option(help="Call it found from this probability on.")] = 0.8,
    clear_at: Annotated[float, typer.Option(help="Call it clear up to this probability.")] = 0.2,
    seed: Seed = 0,
    seconds: Seconds = 600,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Time for all defenses together, such as 60s, 5m or 1h: the cheap ones first, and the answer says "
            "what more time would buy.",
            metavar="TIME",
            show_default=False,
        ),
    ] = None,
    isolated: Annotated[
        bool, typer.Option("--isolated", help="Run each defense in a process of its own that sees nothing else.")
    ] = False,
    threads: Threads = None,
) -> int:
    """Ask every defense whether something is hidden in a model.

    Exit code 1: found, 0: clear, 2: could not tell, also when every defense abstained or failed; 3: wrong usage or an
    input that is refused. Ctrl-C prints what had been answered until then, and ends with 130.
    """
    _check_usage(path, task, clean, found_at, clear_at)
    limit = _time(budget)
    if channels == 2:
        raise InputError("--channels is 1 or 3: gray or color")
    to_output = json_ == STANDARD_OUTPUT
    check_target(None if to_output else json_)
    check_target(html)
    check_target(sarif)
    console = consoles.messages()
    with Interrupt(console, "stopped") as interrupt:
        from molehunt import calibration, meta_files
        from molehunt.asking import Budget
        from molehunt.commands.evaluation import evaluation, telling
        from molehunt.commands.fetching import ensure
        from molehunt.foreign import Wanted, advice
        from molehunt.inspection import final_defenses, pictures_at
        from molehunt.report import answer, scan_html, scan_json, scan_sarif, scan_text
        from molehunt.scanning import clean_images, comparable
        from molehunt.scanning import scan as look
        from molehunt.tasks import get_task

        use_threads(threads)
        with given():
            pictures = None if clean is None else pictures_at(clean)
            problem = get_task(task) if task is not None else pictures
        assert problem is not None  # one of the two was given
        with reading(path):
            wanted = Wanted(network=network, normalize=normalize, size=_size(size), channels=channels)
            found = _read(path, problem, wanted, isolated)
        with given():
            defenses = final_defenses()
        with given((ValueError, OSError)):
            known = None if references is None else comparable(calibration.load(references), problem, found.name)
            asking = meta_files.chosen(metas, problem, found.name)
        if pictures is None:
            ensure(problem.name, console)
        with given():
            images = clean_images(problem, seed, pictures)
        notes = found.notes
        if pictures is not None and task is not None:
            notes += ("The clean pictures are not the task's own.",)
        if found.pixels is not None:
            warnings = advice(found.model, problem, images, found.pixels)
            for warning in warnings:  # now, not after an hour of defenses
                console.print(legible(warning, 500), soft_wrap=True)
            notes += warnings
        allowed = None if limit is None else Budget(seconds=limit)

        def most() -> float:
            return seconds if allowed is None else allowed.limit(seconds)

        with (
            watching(console) as watch,
            evaluation(isolated, seed=seed, seconds=most, interrupt=interrupt, watch=watch, say=console.print) as (
                inspect,
            ),
        ):
            watch.stage(f"Scanning with {len(defenses)} defenses", len(defenses))
            report = look(
                found.model,
                problem,
                images,
                name=path.name or str(path),
                defenses=defenses,
                inspect=telling(watch, inspect),
                population=known or calibration.shipped(problem.name, found.name, defenses),
                metas=asking,
                recipe=found.recipe,
                device="cpu" if isolated else None,
                found_at=found_at,
                clear_at=clear_at,
                command=_command(
                    path,
                    {
                        "task": task,
                        "clean": clean,
                        "network": network,
                        "normalize": normalize,
                        "size": size,
                        "channels": channels,
                        "references": references,
                        "metas": metas,
                        "budget": budget,
                        "seed": seed,
                    },
                ),
                notes=notes,
                budget=allowed,
                keep=True,
            )
        if interrupt.asked:
            if report.verdict.details["could_not_tell"]:
                raise KeyboardInterrupt
            console.print("stopped; this is what had been answered until then")
    if json_ is not None:
        document = json.dumps(scan_json(report), indent=1, allow_nan=False) + "\n"
        if to_output:
            sys.stdout.write(document)
        else:
            _write(json_, document)
    if sarif is not None:
        _write(sarif, json.dumps(scan_sarif(report, str(path)), indent=1, allow_nan=False) + "\n")
    if html is not None:
        _write(html, scan_html(report))
    # With the document on the standard output, what is for people goes beside it.
    (console if to_output else consoles.result()).print(scan_text(report))
    if interrupt.asked:
        raise KeyboardInterrupt
    return {"found": FOUND, "clear": CLEAR, "unsure": UNSURE}[answer(report.verdict, found_at, clear_at)]


def _check_usage(path: Path, task: str | None, clean: Path | None, found_at: float, clear_at: float) -> None:
    """Refuse what can be seen to be wrong before anything is loaded."""
    if task is None and clean is None:
        raise InputError(
            "say what the model was trained for: --task NAME, or --clean PATH with pictures of its classes"
        )
    if not 0.0 <= clear_at < found_at <= 1.0:  # asked so that a NaN is refused
        raise InputError(f"--clear-at must lie below --found-at, both in [0, 1], got {clear_at} and {found_at}")
    if NAMES.match(str(path)) and not path.exists():
        raise InputError(
            f"{path} is a name, and no models are downloaded; save its weights to a file where you have them, and scan "
            "that with --network timm:NAME"
        )
    if not path.exists():
        raise InputError(f"cannot open {path}: there is no such file or folder")


def _time(text: str | None) -> float | None:
    """Seconds of a time such as 60s, 5m or 1h."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)([smh])", text)
    if found is None or float(found[1]) == 0:
        raise InputError(f"expected --budget as a time such as 60s, 5m or 1h, got {text!r}")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", text)
    if found is None:
        raise InputError(f"expected --size HEIGHTxWIDTH, such as 32x32, got {text!r}")
    return int(found[1]), int(found[2])


def _read(path: Path, task: "Task", wanted: "Wanted", isolated: bool) -> "Opened":
    """Read a stranger's model, and see that isolated defenses can be handed it."""
    from molehunt.evidence import unportable
    from molehunt.inspection import open_model

    found = open_model(path, task, wanted)
    if isolated and unportable(found.model) is not None:
        raise InputError(
            f"isolated defenses are handed data, never code, and {found.name} is no network of Molehunt or timm; leave "
            "out --isolated, or scan in a container of your own"
        )
    return found


def _command(path: Path, named: Mapping[str, object]) -> str:
    """What scans the model again, for the report."""
    options = [word for name, value in named.items() if value is not None for word in (f"--{name}", str(value))]
    return shlex.join(["molehunt", "scan", str(path), *options])


def _write(path: Path, text: str) -> None:
    with given((OSError,)):
        write_atomically(path, [text.encode()])
