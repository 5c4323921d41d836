"""`molehunt play`: a whole game on one machine, and its report."""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molehunt.commands import consoles
from molehunt.commands.exits import DONE, InputError, given
from molehunt.commands.interrupt import RESUMES, Interrupt
from molehunt.commands.options import Isolated, Metas, Seconds, Seed, TaskName, use_threads
from molehunt.commands.watch import watching
from molehunt.legible import legible

if TYPE_CHECKING:
    from molehunt.game.entries import Settings


def play(
    task: TaskName = "mnist5k",
    network: Annotated[
        str | None, typer.Option(help="Architecture that everybody trains. Default: the task's.", show_default=False)
    ] = None,
    round_: Annotated[str, typer.Option("--round", help="Which defenses play: I, II, III, IV or final.")] = "final",
    board: Annotated[
        str, typer.Option(help="weights: teams hand in models. data: training sets, and the host trains all models.")
    ] = "weights",
    seed: Seed = 0,
    teams: Annotated[int, typer.Option(help="Teams: attackers, and honest ones among them.", min=1)] = 7,
    clean: Annotated[int, typer.Option(help="Clean models that the host slips in among the judged.", min=0)] = 4,
    references: Annotated[
        int, typer.Option(help="Clean models that the host trains to compare with. More allow surer verdicts.", min=5)
    ] = 5,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the game. Default: runs/play-TASK-SEED, with -data on the data board.", show_default=False
        ),
    ] = None,
    metas: Metas = None,
    seconds: Seconds = 600,
    isolated: Isolated = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            help="Models that are trained or examined at once. Default: one per core.", min=1, show_default=False
        ),
    ] = None,
    threads: Annotated[
        int, typer.Option(help="Processor threads for each; results depend on their number.", min=1)
    ] = 1,
) -> int:
    """Play a whole game: train, submit, judge, publish.

    Everything lies in the game's folder. A game that was stopped goes on when the same command is given again.
    """
    console = consoles.messages()
    with Interrupt(console, RESUMES) as interrupt:
        from molehunt import meta_files
        from molehunt.commands.evaluation import evaluation
        from molehunt.commands.fetching import ensure
        from molehunt.defenses import DEFENSES
        from molehunt.engine import Local, Processes
        from molehunt.game import publication
        from molehunt.game.entries import Settings
        from molehunt.game.host import Host
        from molehunt.game.rules import get_round
        from molehunt.networks import NETWORKS
        from molehunt.report import game_text
        from molehunt.suspect import Access
        from molehunt.tasks import get_task

        use_threads(threads)
        with given():
            problem = get_task(task)
            settings = Settings(
                task=problem.name,
                network=network or problem.network,
                round=round_,
                board=board,  # type: ignore[arg-type]  # looked at there
                seed=seed,
                teams=teams,
                clean=clean,
                references=references,
            )
            if settings.network not in NETWORKS:
                raise InputError(f"unknown network {settings.network!r}; known: {', '.join(NETWORKS)}")
            played_round = get_round(round_)
            defenses = played_round.make(board, DEFENSES)
        if not defenses:
            needed = ", ".join(played_round.on_board(board))
            raise InputError(f"no defense of round {round_} is there yet: it needs {needed}")
        with given((ValueError, OSError)):
            asking = meta_files.chosen(metas, problem, settings.network)
        if asking is None and all(Access.METAS in need for d in defenses.values() for need in d.needs):
            named = f"--task {problem.name} --network {settings.network}"
            raise InputError(
                f"round {round_} asks meta-classifiers, and none come with the package for these models; train some "
                f"with molehunt shadows {named}, and name the file with --metas"
            )
        folder = out or Path("runs") / f"play-{_slug(task)}-{seed}{'-data' if board == 'data' else ''}"
        ensure(problem.name, console)
        count = jobs or _at_once(threads)
        with (
            watching(console) as watch,
            evaluation(
                isolated,
                seed=settings.seed_for("defenses"),
                seconds=seconds,
                interrupt=interrupt,
                watch=watch,
                say=console.print,
                jobs=count,
                hidden=(folder,),
            ) as inspectors,
        ):
            with given((ValueError, OSError)):
                host = Host(
                    settings,
                    folder,
                    defenses=defenses,
                    inspectors=inspectors,
                    engine=Processes(count, threads) if count > 1 else Local(),
                    watch=watch,
                    metas=asking,
                )
            played = host.play()
        command = _command(settings, metas)
        report = publication.summary(played, command)
        page = publication.publish(played, report)
    shown = consoles.result()
    shown.print(game_text(report))
    shown.print(f"report: {page.resolve().as_uri()}", soft_wrap=True)
    return DONE


def _at_once(threads: int) -> int:
    """How many models fit on this machine; one where there is a GPU, which they would have to share."""
    import torch

    if torch.cuda.is_available():
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // threads)


def _slug(task: str) -> str:
    """A name for a folder: a task that is a path becomes the last part of it."""
    return legible(Path(task.partition("?")[0].removeprefix("folder:")).name or "folder", 60)


def _command(settings: "Settings", metas: Path | None) -> str:
    """What plays the same game again; every setting is named, for defaults may change."""
    named = {
        "task": settings.task,
        "network": settings.network,
        "round": settings.round,
        "board": settings.board,
        "seed": settings.seed,
        "teams": settings.teams,
        "clean": settings.clean,
        "references": settings.references,
    }
    if metas is not None:
        named["metas"] = str(metas)
    return shlex.join(["molehunt", "play", *(word for k, v in named.items() for word in (f"--{k}", str(v)))])
