"""What the defenses saw of one backdoored model: docs/reference/defenses/NAME.png, and its words on the page NAME.md.

    python benchmarks/charts.py                         all of them
    python benchmarks/charts.py --defense strip         one; may be repeated. The others are asked too, for STRIP judges
                                                        what they found

A network is trained on mnist5k by its default recipe; 4 % of its training images carry a 4x4 square and the label 1.
Every defense that has a chart is run on it in the usual order, with default settings; only spectral signatures does not
train again, which would not be seen. The defender's clean images are those of a game with the same seed; the training
set is the poisoned one. The target is 1, where spectral signatures points on mnist5k even when 7 is
poisoned instead: classes differ by nature.
"""

import argparse
import re
from functools import partial
from pathlib import Path

import torch

from molehunt import meta_files
from molehunt.attacks import BadNets
from molehunt.charts import CHARTS, chart_of
from molehunt.defenses import DEFENSES, Defense
from molehunt.defenses.spectral_signatures import SpectralSignatures
from molehunt.examination import examine
from molehunt.findings import Finding, Outcome
from molehunt.game.answers import accuracy, asr, measure
from molehunt.game.attacker import train_model
from molehunt.runner import generator, inspect
from molehunt.suspect import Suspect
from molehunt.tasks import get_task
from molehunt.training import recipe_for
from molehunt.triggers import Target

PAGES = Path(__file__).parent.parent / "docs/reference/defenses"
TASK, TARGET = "mnist5k", 1
ATTACK = BadNets(target=TARGET, size=4, poison_rate=0.04)


def backdoored(seed: int) -> Suspect:
    """Train the model, say how well its backdoor works on the test split, and grant the evidence."""
    task = get_task(TASK)
    rng = generator(seed, "charts")
    model, poisoned = train_model(task, task.network, recipe_for(task.network, task), ATTACK, rng=rng)
    assert poisoned is not None
    told = measure(model.eval(), task.load("test"), poisoned.trigger)
    assert told.stamped is not None
    success = asr(told.stamped, told.y, Target(classes=TARGET))
    print(f"accuracy {accuracy(told.plain, told.y):.4f}, ASR {success:.4f}, {int(poisoned.altered.sum())} poisoned")
    metas = meta_files.shipped(TASK, task.network)
    return Suspect.of(model, task, clean=task.secret(seed)[0], training=poisoned.stamped(), metas=metas)


def answers(suspect: Suspect, seed: int) -> dict[str, Outcome]:
    """Run every defense that has a chart, those that find triggers first."""
    asked: dict[str, Defense] = {name: DEFENSES[name]() for name in CHARTS}
    asked["spectral_signatures"] = SpectralSignatures(retrain=False)
    ask = partial(_asked, seed)
    return dict(examine(suspect, asked, ask))


def _asked(seed: int, name: str, defense: Defense, suspect: Suspect) -> Outcome:
    outcome = inspect(defense, suspect, name=name, seed=seed)
    took = f"{outcome.cost.seconds:.1f} s" if isinstance(outcome, Finding) and outcome.cost else outcome
    print(f"{name}: {took}", flush=True)
    return outcome


def draw(finding: Finding, classes: tuple[str, ...]) -> None:
    """Write the picture of a finding, and its words into the page that shows it."""
    picture = chart_of(finding, classes)
    assert picture is not None, f"{finding.defense} has no chart"
    name = finding.defense
    (PAGES / f"{name}.png").write_bytes(picture.png)
    page = PAGES / f"{name}.md"
    line = f"![{picture.alt}]({name}.png)"
    page.write_text(re.sub(rf"!\[[^\]]*\]\({name}\.png\)", lambda _: line, page.read_text()))
    print(f"{name}.png, {len(picture.png) / 1000:.1f} kB: {picture.alt}", flush=True)


def main() -> None:
    """Train, ask, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--defense", action="append", choices=CHARTS, help="the only picture to write; default: all")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    suspect = backdoored(arguments.seed)
    found = answers(suspect, arguments.seed)
    for name in arguments.defense or CHARTS:
        outcome = found[name]
        if not isinstance(outcome, Finding):
            raise SystemExit(f"{name} found nothing: {outcome}")
        draw(outcome, suspect.task.classes)


if __name__ == "__main__":
    main()
