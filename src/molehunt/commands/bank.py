"""`molehunt bank`: build, list and show the model bank, on which defenses are chosen, calibrated and judged."""

from collections import defaultdict
from pathlib import Path
from typing import Annotated

import typer

from molehunt.commands import consoles
from molehunt.commands.exits import DONE, InputError, given
from molehunt.commands.interrupt import RESUMES, Interrupt
from molehunt.commands.options import TaskName
from molehunt.commands.watch import watching
from molehunt.legible import legible

app = typer.Typer(help="Models whose truth is known: build, list and show them.", rich_markup_mode="markdown")

Net = Annotated[str | None, typer.Option(help="Architecture. Default: the task's.", show_default=False)]
Folder = Annotated[Path, typer.Option(help="Folder of all banks.")]
Part = Annotated[
    str | None, typer.Option(help="develop, calibrate or evaluate. Default: all three.", show_default=False)
]
Most = Annotated[
    int | None,
    typer.Option(help="At most so many clean and so many planted models per partition.", min=1, show_default=False),
]
ROOT = Path("runs/bank")


@app.command()
def build(
    task: TaskName = "mnist5k",
    network: Net = None,
    partition: Part = None,
    most: Most = None,
    folder: Folder = ROOT,
    jobs: Annotated[int, typer.Option(help="Processes, each of which trains one model.", min=1)] = 1,
    threads: Annotated[
        int, typer.Option(help="Processor threads for each; results depend on their number.", min=1)
    ] = 1,
) -> int:
    """Train the models that are not there yet.

    A finished model is on disk at once; a run that was stopped or killed goes on when the same command is given again.
    """
    console = consoles.messages()
    with Interrupt(console, RESUMES):
        from molehunt import bank
        from molehunt.bank.rows import folder_of
        from molehunt.commands.fetching import ensure
        from molehunt.tasks import get_task

        with given():
            network = network or get_task(task).network
            listed = bank.entries(task, network, partition, most=most)
            there = bank.read_rows(listed, folder_of(folder, task, network))
        ensure(task, console)
        with watching(console) as watch, given((ValueError, FloatingPointError, OSError)):
            watch.stage(f"Training {len(listed) - len(there)} of {len(listed)} models", len(listed) - len(there))

            def tell(row: bank.Row, done: int, total: int) -> None:
                del done, total
                rate = "" if row.asr is None else f", attack success {row.asr:.1%}"
                missed = [gate["name"] for gate in row.gates if not gate["passed"]]
                rate += f", misses {' and '.join(missed)}" if missed else ""
                watch.done(f"{row.name} {row.kind}", f"accuracy {row.accuracy:.1%}{rate}")

            bank.build(listed, folder_of(folder, task, network), processes=jobs, threads=threads, report=tell)
    return list_(task, network, folder)


@app.command("list")
def list_(task: TaskName = "mnist5k", network: Net = None, folder: Folder = ROOT) -> int:
    """Show how many models of each kind are there, and how many backdoors pass the gates."""
    from rich import box
    from rich.table import Table

    from molehunt import bank
    from molehunt.bank.rows import backdoored, folder_of
    from molehunt.tasks import get_task

    with given():
        network = network or get_task(task).network
        listed = bank.entries(task, network)
        rows = {row.name: row for row in bank.read_rows(listed, folder_of(folder, task, network))}
    working = backdoored(rows.values())
    groups: dict[tuple[str, str, str], list[bank.Entry]] = defaultdict(list)
    for entry in listed:
        groups[entry.partition, "planted" if entry.planted else "clean", entry.kind].append(entry)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("partition", "", "kind", "wanted", "here", "accuracy", "backdoor works"):
        table.add_column(title, justify="left" if title in {"partition", "", "kind"} else "right")
    for (part, truth, kind), members in groups.items():
        here = [rows[entry.name] for entry in members if entry.name in rows]
        mean = f"{sum(row.accuracy for row in here) / len(here):.1%}" if here else ""
        works = str(sum(row.name in working for row in here)) if truth == "planted" and here else ""
        table.add_row(part, truth, kind, str(len(members)), str(len(here)), mean, works)
    consoles.result().print(table)
    return DONE


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Name of a model, such as calibrate-clean-007.", show_default=False)],
    task: TaskName = "mnist5k",
    network: Net = None,
    folder: Folder = ROOT,
) -> int:
    """Show everything that is known of one model, as JSON."""
    import json
    from dataclasses import asdict

    from molehunt import bank
    from molehunt.bank.rows import backdoored, clean_accuracy, folder_of
    from molehunt.tasks import get_task

    with given():
        network = network or get_task(task).network
        listed = bank.entries(task, network)
        found = [entry for entry in listed if entry.name == name]
        every = bank.read_rows(listed, folder_of(folder, task, network)) if found else ()
    rows = [row for row in every if row.name == name]
    if not found:
        raise InputError(f"the bank has no model {legible(name, 80)!r}; names are such as calibrate-clean-007")
    if not rows:
        raise InputError(f"{name} is not trained yet: molehunt bank build --task {task} --network {network}")
    document = asdict(rows[0])
    if rows[0].planted:
        # The accuracy gate is of the model among others, so no row can hold it.
        gate = clean_accuracy(rows[0], every)
        document["gates"] += [] if gate is None else [asdict(gate)]
        document["backdoored"] = name in backdoored(every)
    consoles.result().print(json.dumps(document, indent=1), soft_wrap=True)
    return DONE
