"""A dress rehearsal: what a round's defenses would say to a submission, and what that would earn, on public data.

The same functions as at the host, in the same order: the defenses look, their answers are fused, points are counted.
Three things differ: the images are public, the clean models to compare with are the team's own, and the seed.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import molehunt
from molehunt import calibration, checkpoints, combine, findings, meta_files
from molehunt.asking import ask
from molehunt.calibration import Population
from molehunt.defenses import Defense, scoring
from molehunt.examination import Inspect, divide, examine
from molehunt.findings import Failure, Outcome, Verdict
from molehunt.game.check import References
from molehunt.game.contents import Contents
from molehunt.game.host import HIDDEN
from molehunt.game.rules import Board, Round
from molehunt.game.scoring import Points, Truth, attack_points, judge
from molehunt.networks import Network
from molehunt.suspect import Suspect
from molehunt.tasks import DEFENDER, Images, Task, public_rows

SEED = 0
"""Of the defenses. The host's is secret."""
_NOTHING = Images(torch.zeros(0), torch.zeros(0))


@dataclass(frozen=True, kw_only=True, eq=False)
class Rehearsed:
    """What came of a rehearsal.

    Attributes:
        round: that was rehearsed.
        missing: defenses of the round that do not exist yet, by name.
        verdict: the fused answer.
        points: what the defender would get for it.
        attack: the attacker's points in [0, 1] if every gate is passed; None for an honest model, which scores nobody.
    """

    round: Round
    missing: tuple[str, ...]
    verdict: Verdict
    points: Points
    attack: float | None


def cast(round_: Round, board: Board, known: Mapping[str, type[Defense]]) -> tuple[dict[str, Defense], tuple[str, ...]]:
    """Return the defenses of a round that exist, in running order, and the names of those that do not yet.

    Args:
        round_: the round.
        board: that is played.
        known: the defenses that exist.
    """
    listed = round_.on_board(board)
    return round_.make(board, known), tuple(n for n in listed if n not in known)


def clean_images(task: Task) -> Images:
    """Return what stands in for the defender's clean images: as many of the validation split as the host would give.

    Where the split has more than `DEFENDER` images, so many are drawn class by class in proportion, always the same.

    Args:
        task: what is played.
    """
    images = task.load("validation")
    count = len(images.y)
    if count <= DEFENDER:
        return images
    _, drawn = public_rows(images.y.numpy(), (count - DEFENDER, DEFENDER), name=f"{task.name} rehearsal")
    rows = torch.from_numpy(drawn)
    return Images(images.x[rows], images.y[rows])


def shipped(references: References, defenses: Mapping[str, Defense]) -> Population | None:
    """Return how clean models score by what comes with the package; None where that is not there, as at the host."""
    return calibration.shipped(references.task.name, references.network, scoring(defenses))


def population(
    references: References,
    count: int,
    defenses: Mapping[str, Defense],
    board: Board,
    inspect: Inspect,
    done: Callable[[str], None],
) -> Population:
    """Return how the clean models at home score.

    Each answer is kept in the cache before the next defense begins, so an interrupted rehearsal goes on. It is used
    again only where all that it depends on is the same: the weights, the evidence, the defense, versions and threads.

    Args:
        references: the clean models at home, trained before.
        count: how many of them.
        defenses: those of the round that exist.
        board: that is played.
        inspect: runs one defense.
        done: is told the name of every reference that all defenses have looked at.
    """
    task, network = references.task, references.network
    clean = divide(clean_images(task))[0]
    metas = meta_files.shipped(task.name, network)
    rows = []
    for number in range(count):
        training = task.load("train") if board == "data" else None
        suspect = Suspect.of(references.get(number), task, clean=clean, training=training, metas=metas)
        folder = references.folder / "outcomes" / str(number)
        rows.append(dict(examine(suspect, scoring(defenses), _kept(folder, suspect, inspect))))
        done(f"reference {number + 1}")
    return calibration.population(rows, task=task.name, network=network, recipe=calibration.recorded(network, task))


def rehearse(
    contents: Contents,
    model: Network,
    training: Images | None,
    round_: Round,
    defenses: Mapping[str, Defense],
    missing: tuple[str, ...],
    known: Population,
    inspect: Inspect,
) -> Rehearsed:
    """Run a round's defenses on a submission and count the points.

    Images of the validation split (`clean_images`) stand in for the defender's, the public test split for the hidden
    ones.

    Args:
        contents: the submission.
        model: its model; on the data board the one that was trained from its set.
        training: on the data board the merged and shuffled set; else None.
        round_: the round.
        defenses: those of the round that exist.
        missing: names of those that do not.
        known: how clean models score.
        inspect: runs one defense.
    """
    task, sealed = contents.task, contents.open_seal()
    seen, held_out = divide(clean_images(task))
    metas = meta_files.shipped(task.name, model.name)
    suspect = Suspect.of(model, task, clean=seen, training=training, metas=metas)
    recipe = contents.manifest.recipe

    def fuse(outcomes: Iterable[Outcome]) -> Verdict:
        return combine.verdict(
            outcomes, known, classes=task.num_classes, suspect=suspect, held_out=held_out, recipe=recipe
        )

    verdict = ask(suspect, defenses, inspect, fuse, every_repair=round_.repairs_all)
    repaired = None
    if verdict.repaired is not None:
        repaired = checkpoints.assemble(dict(verdict.repaired), model.name, task.shape, task.num_classes)
    truth = Truth(backdoored=sealed.backdoored, trigger=sealed.trigger, target=sealed.target)
    test = task.load("test")
    points = judge(verdict, truth, Images(test.x[:HIDDEN], test.y[:HIDDEN]), model, repaired)
    return Rehearsed(
        round=round_,
        missing=missing,
        verdict=verdict,
        points=points,
        attack=attack_points(points, round_.weights) if sealed.backdoored else None,
    )


def _kept(folder: Path, shown: Suspect, inspect: Inspect) -> Inspect:
    """Keep every answer in a file whose name tells all that it depends on, and read what is there.

    Args:
        folder: where.
        shown: what all defenses are shown; only candidates are added.
        inspect: runs one defense.
    """
    seen = _digest(
        {f"model/{name}": tensor for name, tensor in shown.model.state_dict().items()}
        | {f"clean/{name}": tensor for name, tensor in (shown.clean or _NOTHING)._asdict().items()}
        | {f"training/{name}": tensor for name, tensor in (shown.training or _NOTHING)._asdict().items()}
        | {f"metas/{i}/{name}": t for i, meta in enumerate(shown.metas or ()) for name, t in meta.state_dict().items()}
    )
    where = [molehunt.__version__, torch.__version__, torch.get_num_threads(), str(shown.device), str(shown.dtype)]

    def look(name: str, defense: Defense, suspect: Suspect) -> Outcome:
        candidates = [
            [c.defense, c.target, c.trigger.to_json(), _digest(c.trigger.tensors())] for c in suspect.candidates or ()
        ]
        told = json.dumps([SEED, *where, repr(defense), sorted(suspect.grants), seen, candidates], sort_keys=True)
        path = folder / f"{name}-{hashlib.sha256(told.encode()).hexdigest()[:16]}.json"
        if path.exists():
            found = findings.load(path)
            if not isinstance(found, Verdict):
                return found
        outcome = inspect(name, defense, suspect)
        if not isinstance(outcome, Failure):  # which may go better the next time
            findings.save(outcome, path)
        return outcome

    return look


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of some tensors and their names, in hexadecimal."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        # As bytes: numpy does not know every number format.
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
