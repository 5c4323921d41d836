"""What the rows of `rab_curves.py` say: figures, a section of RAB's page and its picture; `rab_curves.py collect`."""

import statistics
from collections.abc import Sequence
from typing import Any

from molehunt.charts.words import DASHED, share
from molehunt.defenses.rab import RADII
from molehunt.figures import REST, SAID, Axes, Picture, chart
from molehunt.tasks import TASKS
from pages import PAGES, put, span, written
from record import Figure, rows, spread, write

NAME, RESULT = "rab-curves", "rounds_3_4"
PAGE, HEADING, PICTURE = PAGES / "rab.md", "Certified curves", "rab_curves.png"
MARGIN = 0.01  # of certified accuracy, that few passes may cost at most
GOAL = 3.5  # times as many members per second
HOW = """\
Two classes of MNIST or CIFAR-10, the optimizer and passes of the official examples, one pixel as the trigger. `python
benchmarks/rab_curves.py speed` times training, `passes` compares 2 passes with 20 at 100 networks, `curves` and `color`
make the curves; all with `--state FOLDER`, where finished networks are kept. `collect` writes this section."""
SIDES = {"loader": "a float32 loop with a data loader", "tensor": "the same loop, pictures in one tensor"}


def enough(sigmas: Sequence[float]) -> bool:
    """Whether few passes are as good as many, by the rows of `passes`.

    Raises:
        ValueError: there is no such row for one of the sizes of noise.
    """
    found = {row["sigma"]: row for row in rows(NAME) if row["what"] == "passes" and row["images"] is None}
    if lacking := [sigma for sigma in sigmas if sigma not in found]:
        raise ValueError(f"no comparison of passes at sigma {lacking}: run `rab_curves.py passes`, or name --epochs")
    return all(holds(found[sigma]) for sigma in sigmas)


def holds(row: dict[str, Any]) -> bool:
    """Whether certified accuracy is at no radius lower by more than the margin, sampling included."""
    return all(low > -MARGIN for low in row["lower_95_one_sided"])


def whole(what: str) -> list[dict[str, Any]]:
    """Rows of a kind that used all pictures."""
    return [row for row in rows(NAME) if row["what"] == what and row["images"] is None]


def ratios(kept: Sequence[dict[str, Any]], side: str) -> list[float]:
    """Members per second of ours, by those of another way, per repeat."""
    rates = [[row[one]["members"] / row[one]["seconds"] for one in ("ours", side)] for row in kept]
    return [ours / theirs for ours, theirs in rates]


def name_of(row: dict[str, Any]) -> str:
    """An ensemble in words."""
    classes = TASKS[row["task"]].classes
    return f"{row['task']}, {' against '.join(classes[k] for k in row['pair'])}"


def value(row: dict[str, Any], part: str, what: str, radius: float) -> float:
    """A point of a curve."""
    found: float = row[part][what][row["at"].index(radius)]
    return found


def table() -> str:
    """The section of the page: picture, curves, passes and rates; or that nothing was measured yet."""
    kept = whole("curve")
    parts = ["\n".join(lines) for lines in (_curves(kept), _passes(), _rates()) if lines]
    if (made := picture_of(kept)) is not None:
        parts.insert(0, f"![{made.alt}]({PICTURE})")
    return written(parts, HOW)


def _curves(kept: Sequence[dict[str, Any]]) -> list[str]:
    """A table of curves, and how to read it."""
    if not kept:
        return []
    head = ["pictures", "N", "sigma", "passes", "asked", "right, %", "reaches", *(f"{radius:g}" for radius in RADII)]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in kept:
        for part in ("clean", "triggered"):
            cells = [name_of(row), str(row["members"]), f"{row['sigma']:g}", str(row["epochs"]), part]
            cells += [f"{100 * row[part]['right']:.1f}", f"{row['most']:.2f}"]
            for radius in RADII:
                cells.append(" / ".join(f"{100 * value(row, part, what, radius):.1f}" for what in ("rate", "accuracy")))
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Certified rate / certified accuracy in %, by the total l2 norm of a change of the training pictures, labels "
        "kept.\n*Reaches*: what unanimous votes certify. The poison changes labels too, which no radius covers; of its "
        "pictures the total norm is:\n",
    ]
    totals = dict.fromkeys(f"- {name_of(row)}: {row['poison']:.2f}, on {row['poisoned']} rows." for row in kept)
    lines += totals
    return lines


def _passes() -> list[str]:
    """Whether few passes are enough, by size of noise."""
    lines = []
    for row in whole("passes"):
        few, many = row["passes"]
        lines.append(
            f"- sigma {row['sigma']:g}, N = {row['members']}: {few} passes in place of {many} change certified "
            f"accuracy by {100 * min(row['difference']):+.2f} points at worst (95 % one-sided: "
            f"{100 * min(row['lower_95_one_sided']):+.2f}), so they are {'' if holds(row) else 'not '}enough."
        )
    return lines


def _rates() -> list[str]:
    """Members per second, beside both loops."""
    lines, kept = [], whole("speed")
    for side, words in SIDES.items() if kept else ():
        found, goal = ratios(kept, side), f" (goal {GOAL:g})" if side == "loader" else ""
        lines.append(
            f"- Members per second, {kept[-1]['epochs']} passes on {name_of(kept[-1])}: "
            f"{statistics.median(found):.2f} ({span(found, 2)}) times those of {words}{goal}; "
            f"{kept[-1]['threads']} threads, {kept[-1]['dtype']}."
        )
    return lines


def picture_of(kept: Sequence[dict[str, Any]]) -> Picture | None:
    """Rate and accuracy over the radius, of the largest ensembles of the first task, by size of noise."""
    if not kept:
        return None
    most = max(row["members"] for row in kept if row["task"] == kept[0]["task"])
    shown = [row for row in kept if (row["task"], row["members"]) == (kept[0]["task"], most)]
    shown = list({row["sigma"]: row for row in sorted(shown, key=lambda row: float(row["sigma"]))}.values())
    told = [
        f"sigma {row['sigma']:g}: {share(value(row, 'clean', 'rate', 0.0))} at 0, of which "
        f"{share(value(row, 'clean', 'accuracy', 0.0))} of all are right, none from {row['most']:.2f} on"
        for row in shown
    ]
    alt = (
        f"RAB, {most} networks on {name_of(shown[0])}, share of test pictures whose vote is certified, by total l2 "
        f"norm of a change of the training pictures; {'; '.join(told)}"
    )

    def draw(axes: Axes) -> None:
        for row, style in zip(shown, ("-", DASHED, ":"), strict=False):
            for what, color, width in (("rate", REST, 4.0), ("accuracy", SAID, 1.8)):
                label = f"{'certified' if what == 'rate' else 'and right'}, sigma {row['sigma']:g}"
                axes.plot(row["at"], row["clean"][what], color=color, linewidth=width, linestyle=style, label=label)
        axes.set_xlim(0.0, 1.05 * max(row["most"] for row in shown))
        axes.set_ylim(-0.02, 1.05)
        axes.set_xlabel("total l2 norm of the change, labels kept")
        axes.set_ylabel("share of test pictures")

    return chart(draw, alt)


def figures() -> dict[str, Figure]:
    """All figures, by name."""
    made: dict[str, Figure] = {}
    for row in whole("curve"):
        title = f"RAB, {name_of(row)}, N = {row['members']}, sigma {row['sigma']:g}, {row['epochs']} passes"
        for radius in (r for r in RADII if r < row["most"]):
            made[f"{title}, certified accuracy at {radius:g}"] = Figure(
                value=value(row, "clean", "accuracy", radius),
                unit="share",
                goal=None,
                better="higher",
                command=f"python benchmarks/rab_curves.py {'color' if row['task'] == 'cifar10' else 'curves'}",
                note="; ".join(
                    f"{part}: rate {value(row, part, 'rate', radius):.4f}, accuracy "
                    f"{value(row, part, 'accuracy', radius):.4f}"
                    for part in ("clean", "triggered")
                ),
            )
    for row in whole("passes"):
        made[f"RAB, sigma {row['sigma']:g}, N = {row['members']}, certified accuracy of 2 passes less 20"] = Figure(
            value=min(row["difference"]),
            unit="share",
            goal=None,
            better="higher",
            spread=f"95 % one-sided from {min(row['lower_95_one_sided']):.4f}, smallest over the radii {row['at']}",
            command="python benchmarks/rab_curves.py passes",
        )
    timed = whole("speed")
    for side, words in SIDES.items():
        if timed:
            found = ratios(timed, side)
            made[f"RAB, {name_of(timed[-1])}, times as many members per second as {words}"] = Figure(
                value=statistics.median(found),
                unit="times",
                goal=GOAL if side == "loader" else None,
                better="higher",
                spread=spread(found),
                command="python benchmarks/rab_curves.py speed",
                note=f"{timed[-1]['epochs']} passes each, {timed[-1]['threads']} threads, {timed[-1]['dtype']}, load "
                f"{[row['busy'] for row in timed]}; accuracy "
                f"{timed[-1]['ours']['accuracy']:.4f} and {timed[-1][side]['accuracy']:.4f}",
            )
    return made


def collect() -> None:
    """Write the figures, the section of the page and its picture."""
    if (made := picture_of(whole("curve"))) is not None:
        (PAGE.parent / PICTURE).write_bytes(made.png)
    print(write(RESULT, figures()).read_text())
    put(PAGE, HEADING, table(), before="Figures")
