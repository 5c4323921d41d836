"""`molehunt shadows`: train shadow models and the meta-classifiers of MNTD that learn from them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molehunt.commands import consoles
from molehunt.commands.bank import Net
from molehunt.commands.exits import DONE, check_target, given
from molehunt.commands.interrupt import RESUMES, Interrupt
from molehunt.commands.options import TaskName, Threads, use_threads
from molehunt.commands.watch import watching
from molehunt.legible import legible

if TYPE_CHECKING:
    from molehunt.shadows import Shadows


def shadows(
    task: TaskName = "mnist5k",
    network: Net = None,
    count: Annotated[int, typer.Option(help="Clean shadow models, and as many backdoored ones.", min=1)] = 128,
    images: Annotated[
        int | None,
        typer.Option(
            help="Training images that each shadow model sees. Default: the whole split, as suspects do.",
            min=1,
            show_default=False,
        ),
    ] = None,
    metas: Annotated[int, typer.Option(help="Meta-classifiers, each trained from other weights.", min=1, max=100)] = 5,
    robust: Annotated[
        bool, typer.Option("--robust", help="Keep a layer of random weights, against those who train against them.")
    ] = False,
    seed: Annotated[
        int, typer.Option(help="Of the meta-classifiers. Whoever plays against students takes a secret one.")
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File of the meta-classifiers. Default: TASK-NETWORK.safetensors.", metavar="FILE", show_default=False
        ),
    ] = None,
    threads: Threads = None,
) -> int:
    """Train shadow models, clean and backdoored, and meta-classifiers that learn to tell them apart.

    The file is what `molehunt scan --metas` and `molehunt calibrate --metas` take. Models and finished
    meta-classifiers are kept in the cache: a run that was stopped or killed goes on when the same command is given
    again.
    """
    console = consoles.messages()
    with Interrupt(console, RESUMES) as interrupt:
        from molehunt import meta_files
        from molehunt.commands.fetching import ensure
        from molehunt.metas import Settings
        from molehunt.shadows import Shadows
        from molehunt.tasks import get_task

        use_threads(threads)
        with given():
            network = network or get_task(task).network
            population = Shadows(task=task, network=network, count=count, images=images)
            settings = Settings(robust=robust)
        out = out or Path(f"{task}-{network}.safetensors")
        check_target(out)
        ensure(task, console)
        # The length of the split, and so whether so many images are there, is known only now.
        with watching(console) as watch, given((ValueError, FloatingPointError, OSError)):
            watch.stage(f"Training {2 * count} shadow models and {metas} meta-classifiers", 1 + metas)

            def told(what: str, done: int, total: int) -> None:
                watch.progress(what, done, total)
                if done == total:
                    watch.done(what, f"{total} models" if what == "shadow models" else "")

            trained = population.metas(metas, settings, seed=seed, report=told, check=interrupt.check)
            meta_files.save(trained, out, {**population.about(), "meta seed": seed})
    shown = consoles.result()
    shown.print(_summary(population, len(trained)), soft_wrap=True)
    shown.print(f"meta-classifiers: {legible(str(out), 500)}", soft_wrap=True)
    return DONE


def _summary(population: "Shadows", count: int) -> str:
    return (
        f"{count} meta-classifiers, from {population.count} clean and {population.count} backdoored "
        f"{population.network} models of {population.task}"
    )
