"""`molehunt train`: train a model, honest or backdoored, and write it as a submission."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from molehunt.commands import consoles
from molehunt.commands.exits import DONE, InputError, given
from molehunt.commands.interrupt import RESUMES, Interrupt
from molehunt.commands.options import Seed, TaskName, Threads, use_threads
from molehunt.commands.watch import watching
from molehunt.legible import legible


def train(
    task: TaskName = "mnist5k",
    network: Annotated[str | None, typer.Option(help="Architecture. Default: the task's.", show_default=False)] = None,
    recipe: Annotated[
        str | None, typer.Option(help="How to train. Default: the network's recipe.", show_default=False)
    ] = None,
    attack: Annotated[str, typer.Option(help="What to hide: badnets, blended, or none for an honest model.")] = "none",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="A setting of the attack, such as target=3, poison_rate=0.05, sources=[1,2]. May be repeated.",
            show_default=False,
        ),
    ] = None,
    team: Annotated[str, typer.Option(help="Your team, as the board will show it.")] = "My Team",
    round_: Annotated[
        str, typer.Option("--round", help="The round that it is for: I, II, III, IV or final.")
    ] = "final",
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="Folder of the submission; made if need be.")] = Path("submission"),
    replace: Annotated[bool, typer.Option("--replace", help="Replace the submission that is in the folder.")] = False,
    threads: Threads = None,
) -> int:
    """Train a model and write a submission.

    The folder is your private copy; beside it lies FOLDER.zip, the archive to hand in. An interrupted training goes
    on where it stopped when the same command is given again.
    """
    console = consoles.messages()
    with Interrupt(console, RESUMES, gentle=True) as interrupt:
        from molehunt.commands.fetching import ensure
        from molehunt.game import workshop
        from molehunt.game.attacker import parse_settings
        from molehunt.tasks import get_task

        if workshop.holds_submission(out) and not replace:
            raise InputError(f"there is a submission in {out}; name another folder with --out, or say --replace")
        use_threads(threads)
        with given():
            plan = workshop.Plan(
                task=get_task(task),
                network=network,
                recipe=recipe,
                attack=attack,
                settings=parse_settings(settings or []),
                team=team,
                round=round_,
                seed=seed,
            )
        ensure(plan.task.name, console)
        with watching(console) as watch, given((ValueError, FloatingPointError, OSError)):
            watch.stage(f"Training {plan.manifest.network} for {plan.task.name}", 1)
            what = "an honest model" if plan.hidden is None else attack
            made = workshop.make(plan, out, report=partial(watch.progress, what), check=interrupt.check)
            watch.done(what, "trained, sealed, packed")
    shown = consoles.result()
    rate = "" if made.asr is None else f", attack success {made.asr:.1%}"
    shown.print(f"clean accuracy {made.accuracy:.1%}{rate} (public validation split)")
    shown.print(f"submission: {legible(str(made.folder), 500)}", soft_wrap=True)
    shown.print(f"to hand in: {legible(str(made.archive), 500)}", soft_wrap=True)
    shown.print(f"next:       molehunt check {legible(str(made.folder), 500)}", soft_wrap=True)
    return DONE
