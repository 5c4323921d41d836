"""`molehunt matrix`: every attack against every defense, each cell measured."""

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from molehunt.commands import consoles
from molehunt.commands.bank import Net
from molehunt.commands.exits import DONE, InputError, check_target, given
from molehunt.commands.interrupt import RESUMES, Interrupt
from molehunt.commands.options import Isolated, Metas, Seconds, Seed, TaskName, Threads, use_threads
from molehunt.commands.watch import watching
from molehunt.legible import legible


def matrix(
    task: TaskName = "mnist5k",
    network: Net = None,
    attack: Annotated[
        list[str] | None, typer.Option(help="An attack by name; may be repeated. Default: all.", show_default=False)
    ] = None,
    defense: Annotated[
        list[str] | None, typer.Option(help="A defense by name; may be repeated. Default: all.", show_default=False)
    ] = None,
    training: Annotated[
        bool, typer.Option("--training", help="Hand over the training sets of attacks that poison one, too.")
    ] = False,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="Folder of models, finished lines and tables.")] = Path("matrix"),
    metas: Metas = None,
    seconds: Seconds = 600,
    isolated: Isolated = None,
    threads: Threads = None,
) -> int:
    """Play every attack against every defense, and write a table, a CSV file and a heat map.

    A finished line is on disk at once; a run that was stopped goes on when the same command is given again. A cell that
    was not run says so.
    """
    console = consoles.messages()
    with Interrupt(console, RESUMES, gentle=True) as interrupt:
        from molehunt import calibration, meta_files
        from molehunt import matrix as matrices
        from molehunt import matrix_tables as tables
        from molehunt.attacks import available as known_attacks
        from molehunt.bank.scores import with_finders
        from molehunt.commands.evaluation import evaluations
        from molehunt.commands.fetching import ensure
        from molehunt.defenses import available
        from molehunt.figures import heat_map
        from molehunt.files import write_atomically
        from molehunt.tasks import get_task

        use_threads(threads)
        with given((ValueError, OSError)):
            on = get_task(task)
            network = network or on.network
            known, listed = available(), known_attacks()
            population = calibration.shipped(task, network)
            asking = meta_files.chosen(metas, on, network)
        for what, names, all_ in (("defense", defense, list(known)), ("attack", attack, list(listed))):
            if unknown := [name for name in names or () if name not in all_]:
                raise InputError(f"unknown {what} {legible(unknown[0], 80)!r}; known: {', '.join(all_)}")
        with given((OSError,)):
            where = out / f"{task.replace(':', '-').replace('/', '-')}-{network.replace(':', '-')}"
            where.mkdir(parents=True, exist_ok=True)
        # Of a part of the matrix in files of their own: they must not take the place of the whole.
        stem = "matrix" if not attack and not defense else "part"
        check_target(where / f"{stem}.csv")
        defenses = with_finders({name: known[name]() for name in dict.fromkeys(defense or known)})
        attacks = list(dict.fromkeys(attack or listed))
        ensure(task, console)
        if population is None:
            text = f"There is no calibration for {network} on {task}, so no score has a p-value; repairs are measured."
            console.print(text, soft_wrap=True)
        lines = []
        with watching(console) as watch, ExitStack() as stack:
            watch.stage(f"{len(attacks)} attacks against {len(defenses)} defenses", len(attacks) + 1)
            made = evaluations(
                isolated,
                seconds=seconds,
                interrupt=interrupt,
                watch=watch,
                say=partial(console.print, soft_wrap=True),
            )
            inspecting = stack.enter_context(made)[0]
            with given((ValueError, FloatingPointError, OSError)):
                clean = matrices.references(
                    on, network, report=partial(watch.progress, "clean models"), check=interrupt.check
                )
                watch.done("clean models", "trained")
                whole = matrices.Matrix(
                    task=on,
                    network=network,
                    defenses=defenses,
                    folder=where,
                    inspecting=inspecting,
                    population=population,
                    metas=asking,
                    training=training,
                    references=clean,
                )
            skipped = {}
            for name in attacks:
                try:
                    line = whole.line(
                        name,
                        matrices.target_of(name, on.num_classes, seed),
                        seed,
                        report=partial(watch.progress, name),
                        check=interrupt.check,
                    )
                except (ValueError, FloatingPointError) as error:
                    # One attack that does not fit the task must not cost the others their cells.
                    skipped[name] = str(error)
                    watch.done(name, f"not run: {error}")
                    continue
                lines.append(line)
                watch.done(name, tables.sentence(line).partition(": ")[2])
    shown = consoles.result()
    names = list(defenses)
    if lines:
        write_atomically(where / f"{stem}.csv", [tables.as_csv(lines).encode()])
        write_atomically(where / f"{stem}.md", [tables.as_markdown(lines, names).encode()])
        values, rows = tables.grid(lines, names)
        picture = heat_map(values, rows, names)
        write_atomically(where / f"{stem}.png", [picture.png])
        for line in lines:
            shown.print(tables.sentence(line), soft_wrap=True)
        shown.print(f"tables and picture: {legible(str(where / f'{stem}.md'), 500)}, .csv, .png", soft_wrap=True)
    for name, why in skipped.items():
        shown.print(f"{name}: not run: {legible(why, 500)}", soft_wrap=True)
    if not lines:
        raise InputError("not one attack could be played; see above")
    return DONE
