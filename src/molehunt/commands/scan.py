"""`molehunt scan`: is something hidden in this model?"""

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molehunt.commands import consoles
from molehunt.commands.exits import CLEAR, FOUND, UNSURE, InputError, check_target, given, reading
from molehunt.commands.interrupt import Interrupt
from molehunt.commands.options import Metas, Seconds, Seed, Threads, use_threads
from molehunt.commands.watch import watching
from molehunt.files import write_atomically

if TYPE_CHECKING:
    from molehunt.networks import Network
    from molehunt.tasks import Task

STANDARD_OUTPUT = Path("-")
PICKLES = frozenset({".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".bin"})


def scan(
    path: Annotated[
        Path,
        typer.Argument(help="A submission (folder or archive), or a .safetensors file of weights.", show_default=False),
    ],
    task: Annotated[
        str | None,
        typer.Option(help="What the model was trained for, such as cifar10.", metavar="NAME", show_default=False),
    ] = None,
    clean: Annotated[
        Path | None,
        typer.Option(
            help="Clean pictures, one folder per class. Needed where the task is none of the known ones.",
            metavar="FOLDER",
            show_default=False,
        ),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            help="Architecture of the weights in a .safetensors file, such as resnet18.",
            metavar="NAME",
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
    found_at: Annotated[float, typer.Option(help="Call it found from this probability on.")] = 0.8,
    clear_at: Annotated[float, typer.Option(help="Call it clear up to this probability.")] = 0.2,
    seed: Seed = 0,
    seconds: Seconds = 600,
    isolated: Annotated[
        bool, typer.Option("--isolated", help="Run each defense in a process of its own that sees nothing else.")
    ] = False,
    threads: Threads = None,
) -> int:
    """Ask every defense whether something is hidden in a model.

    Exit code 1: found, 0: clear, 2: could not tell, also when every defense abstained or failed; 3: wrong usage or an
    input that is refused.
    """
    _check_usage(path, task, clean, found_at, clear_at)
    to_output = json_ == STANDARD_OUTPUT
    check_target(None if to_output else json_)
    check_target(html)
    console = consoles.messages()
    with Interrupt(console, "stopped") as interrupt:
        from molehunt import calibration, meta_files
        from molehunt.commands.evaluation import evaluation, telling
        from molehunt.commands.fetching import ensure
        from molehunt.defenses import DEFENSES, available
        from molehunt.game.rules import get_round
        from molehunt.report import answer, scan_html, scan_json, scan_text
        from molehunt.scan import clean_images, comparable
        from molehunt.scan import scan as look
        from molehunt.tasks import get_task

        use_threads(threads)
        with given():
            pictures = None if clean is None else get_task(f"folder:{clean}")
            problem = get_task(task) if task is not None else pictures
        assert problem is not None  # one of the two was given
        with reading(path):
            model, recipe = _read(path, problem, network)
        # With the short budget of a final, in which everything plays as it does here.
        with given():
            kinds = available()
        defenses = {name: kind() for name, kind in kinds.items()}
        defenses |= get_round("final").make("weights", {n: k for n, k in kinds.items() if n in DEFENSES})
        with given((ValueError, OSError)):
            known = None if references is None else comparable(calibration.load(references), problem, model.name)
            asking = meta_files.chosen(metas, problem, model.name)
        if pictures is None:
            ensure(problem.name, console)
        with given():
            images = clean_images(problem, seed, pictures)
        notes = () if pictures is None or task is None else ("The clean pictures are not the task's own.",)
        with (
            watching(console) as watch,
            evaluation(isolated, seed=seed, seconds=seconds, interrupt=interrupt, watch=watch, say=console.print) as (
                inspect,
            ),
        ):
            watch.stage(f"Scanning with {len(defenses)} defenses", len(defenses))
            report = look(
                model,
                problem,
                images,
                name=path.name or str(path),
                defenses=defenses,
                inspect=telling(watch, inspect),
                population=known or calibration.shipped(problem.name, model.name, defenses),
                metas=asking,
                recipe=recipe,
                device="cpu" if isolated else None,
                found_at=found_at,
                clear_at=clear_at,
                command=_command(path, task, clean, network, references, metas, seed),
                notes=notes,
            )
    if json_ is not None:
        document = json.dumps(scan_json(report), indent=1, allow_nan=False) + "\n"
        if to_output:
            sys.stdout.write(document)
        else:
            _write(json_, document)
    if html is not None:
        _write(html, scan_html(report))
    # With the document on the standard output, what is for people goes beside it.
    (console if to_output else consoles.result()).print(scan_text(report))
    return {"found": FOUND, "clear": CLEAR, "unsure": UNSURE}[answer(report.verdict, found_at, clear_at)]


def _check_usage(path: Path, task: str | None, clean: Path | None, found_at: float, clear_at: float) -> None:
    """Refuse what can be seen to be wrong before anything is loaded."""
    if task is None and clean is None:
        raise InputError(
            "say what the model was trained for: --task NAME, or --clean FOLDER with pictures of its classes"
        )
    if not 0.0 <= clear_at < found_at <= 1.0:  # asked so that a NaN is refused
        raise InputError(f"--clear-at must lie below --found-at, both in [0, 1], got {clear_at} and {found_at}")
    if path.suffix.lower() in PICKLES:
        safe = shlex.quote(str(path.with_suffix(".safetensors")))
        raise InputError(f"{path} may be a pickle, which is never read; first: molehunt convert {path} {safe}")
    if not path.exists():
        raise InputError(f"cannot open {path}: there is no such file or folder")


def _read(path: Path, task: "Task", network: str | None) -> "tuple[Network, str | None]":
    """Read a stranger's model and the name of its recipe, where something names it.

    The sealed part of a submission is not opened.
    """
    from molehunt import checkpoints
    from molehunt.game.submission import read_submission

    if path.suffix.lower() == ".safetensors":
        if network is None:
            raise InputError("a file of weights does not say what it is for: name the architecture with --network")
        return checkpoints.load(path, network, task.shape, task.num_classes), None
    contents = read_submission(path, task=task, allowed_networks=None if network is None else [network])
    return contents.model(), contents.manifest.recipe


def _command(
    path: Path,
    task: str | None,
    clean: Path | None,
    network: str | None,
    references: Path | None,
    metas: Path | None,
    seed: int,
) -> str:
    """What scans the model again, for the report."""
    named = {"task": task, "clean": clean, "network": network, "references": references, "metas": metas, "seed": seed}
    options = [word for name, value in named.items() if value is not None for word in (f"--{name}", str(value))]
    return shlex.join(["molehunt", "scan", str(path), *options])


def _write(path: Path, text: str) -> None:
    with given((OSError,)):
        write_atomically(path, [text.encode()])
