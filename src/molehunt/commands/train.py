"""`molehunt train`: train a model, honest or backdoored, and write it as a submission."""

import shlex
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from molehunt.commands import consoles
from molehunt.commands.exits import DONE, InputError, given
from molehunt.commands.interrupt import RESUMES, Interrupt
from molehunt.commands.options import Seed, TaskName, Threads, importing_from_here, use_threads
from molehunt.commands.watch import watching
from molehunt.legible import legible


def train(
    task: TaskName = "mnist5k",
    network: Annotated[str | None, typer.Option(help="Architecture. Default: the task's.", show_default=False)] = None,
    recipe: Annotated[
        str | None, typer.Option(help="How to train. Default: the network's recipe.", show_default=False)
    ] = None,
    board: Annotated[
        str,
        typer.Option(help="weights: hand in a model. data: hand in a training set, the host trains the model from it."),
    ] = "weights",
    attack: Annotated[
        str,
        typer.Option(help="What to hide: an attack by name, MODULE:CLASS for your own, or none for an honest model."),
    ] = "none",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="A setting of the attack, such as target=3, poison_rate=0.2, sources=[1,2]. May be repeated.",
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
    """Train a model, or alter a training set, and write a submission.

    The folder is your private copy; beside it lies FOLDER.zip, the archive to hand in. An interrupted training goes
    on where it stopped when the same command is given again.
    """
    console = consoles.messages()
    with Interrupt(console, RESUMES, gentle=True) as interrupt:
        from molehunt.commands.fetching import ensure
        from molehunt.game import workshop
        from molehunt.game.attacker import parse_settings
        from molehunt.game.rules import Limits
        from molehunt.tasks import get_task

        if workshop.holds_submission(out) and not replace:
            raise InputError(f"there is a submission in {out}; name another folder with --out, or say --replace")
        use_threads(threads)
        with given(), importing_from_here():
            plan = workshop.Plan(
                task=get_task(task),
                network=network,
                recipe=recipe,
                board=board,  # type: ignore[arg-type]  # looked at there
                attack=attack,
                settings=parse_settings(settings or []),
                team=team,
                round=round_,
                seed=seed,
            )
        ensure(plan.task.name, console)
        if workshop.begins_anew(plan, out):
            left = legible(str(out), 500)
            text = f"The unfinished training in {left} has other settings or other code; this one begins anew."
            console.print(text, soft_wrap=True)
        # The attack may import when it is called, and its working folder is where it looks.
        with (
            watching(console) as watch,
            given((ValueError, FloatingPointError, OSError)),
            importing_from_here(),
        ):
            trained = plan.board == "weights"
            done = f"Training {plan.manifest.network}" if trained else "Altering the training set"
            watch.stage(f"{done} for {plan.task.name}", 1)
            what = ("an honest model" if trained else "an honest set") if plan.hidden is None else attack
            made = workshop.make(plan, out, report=partial(watch.progress, what), check=interrupt.check)
            watch.done(what, f"{'trained' if trained else 'altered'}, sealed, packed")
    shown = consoles.result()
    if made.accuracy is not None:
        rate = "" if made.asr is None else f", attack success {made.asr:.1%}"
        shown.print(f"clean accuracy {made.accuracy:.1%}{rate} (public validation split)")
        if made.asr is not None and made.asr < Limits().asr:
            shown.print(
                f"That is too seldom: the gate asks for {Limits().asr:.0%}. Poison more, or make the trigger larger.",
                style="yellow",
                soft_wrap=True,
            )
    if made.changes is not None:
        shown.print(
            f"{made.changes.altered} training rows altered, {made.changes.relabeled} of them with another label"
        )
    shown.print(f"submission: {legible(str(made.folder), 500)}", soft_wrap=True)
    shown.print(f"to hand in: {legible(str(made.archive), 500)}", soft_wrap=True)
    words = ["molehunt", "check", str(made.folder)]
    if plan.task.name.startswith("folder:"):
        words += ["--task", plan.task.name]  # a manifest opens no paths
    shown.print(f"next:       {legible(shlex.join(words), 1000)}", soft_wrap=True)
    return DONE
