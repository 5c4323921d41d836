"""The defenders' side of a game: every defense looks at references and submissions, and every answer is kept."""

import hashlib
import json
import queue
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

from molehunt import calibration, combine, findings, meta_files
from molehunt.asking import ask
from molehunt.calibration import Population
from molehunt.defenses import Defense, scoring
from molehunt.examination import Inspect, divide, examine
from molehunt.files import write_atomically
from molehunt.game.delivery import Delivery
from molehunt.game.referee import Referee, read_verdict
from molehunt.game.rules import get_round
from molehunt.game.submission import Submission
from molehunt.metas import Meta
from molehunt.networks import Network
from molehunt.suspect import Suspect
from molehunt.tasks import Images

A = TypeVar("A")
B = TypeVar("B")


class Watch(Protocol):
    """What a game tells those who look on."""

    def stage(self, title: str, total: int) -> None:
        """Begin a stage of so many pieces."""
        ...

    def done(self, title: str, text: str) -> None:
        """End a piece of the stage, with one line of what came of it."""
        ...


class Examiners:
    """The defenses of one game, and those who run them side by side."""

    def __init__(
        self,
        delivery: Delivery,
        defenses: Mapping[str, Defense],
        inspectors: Sequence[Inspect],
        watch: Watch,
        metas: tuple[Meta, ...] | None = None,
    ) -> None:
        """Name who asks whom.

        Args:
            delivery: what of the game's submissions a defense may see; it knows settings, task and folder.
            defenses: what is asked, by name.
            inspectors: each runs one defense at a time; as many are asked at once.
            watch: is told how far things are.
            metas: meta-classifiers for models of the game; None for those of the package, if there are any.
        """
        self.delivery, self.defenses, self.inspectors, self.watch = delivery, defenses, inspectors, watch
        self.settings, self.folder, self.task = delivery.settings, delivery.folder, delivery.task
        self.round = get_round(self.settings.round)
        self.metas = metas or meta_files.shipped(self.task.name, self.settings.network)

    def population(self, referee: Referee) -> Population:
        """Return the clean scores to compare with: those shipped for this task and network, else the references'."""
        asked = scoring(self.defenses)
        shipped = calibration.shipped(self.task.name, self.settings.network, asked)
        # Who looks at training sets has scored no shipped model: those are of the weights board. Beside others that
        # have, its score is left out, for a few references would be all that is left to compare the others with.
        if shipped is not None:
            return shipped
        path = self.folder / "references" / "population.json"
        if path.exists():
            return calibration.load(path)
        self.watch.stage("The defenses look at the clean references", len(referee.references))
        rows = []

        def look(i: int, inspect: Inspect) -> dict[str, findings.Outcome]:
            # Each reference meets clean images drawn for it, as each game draws its own.
            clean, _ = self.task.secret(self.settings.seed_for(f"split of reference {i + 1}"))
            training = self.delivery.clean(f"reference {i + 1}")
            suspect = self._suspect(referee.references[i], divide(clean)[0], training)
            # What a repair does to a clean model is no score: nothing to compare with comes of it.
            return dict(examine(suspect, asked, self._kept(self.folder / "references" / f"outcomes-{i}", inspect)))

        for i, outcomes in enumerate(self.together(look, range(len(referee.references)))):
            rows.append(outcomes)
            self.watch.done(f"reference {i + 1}", _scores(outcomes))
        network = self.settings.network
        recipe = calibration.recorded(network, self.task)
        population = calibration.population(rows, task=self.task.name, network=network, recipe=recipe)
        calibration.save(population, path)
        return population

    def verdicts(
        self,
        submissions: Sequence[Submission],
        referee: Referee,
        population: Population,
        seen: Images,
        held_out: Images,
    ) -> None:
        """Run every defense on these submissions and write the answers down, with their hash, before any is judged."""
        refused = " that was not refused" if self.settings.board == "data" else ""
        self.watch.stage(f"The defenses examine every submission{refused}", len(submissions))

        def answer(submission: Submission, inspect: Inspect) -> float:
            folder = self.folder / "verdicts" / submission.id
            path = folder / "verdict.json"
            if not path.exists():
                training = self.delivery.seen(submission)
                suspect = self._suspect(referee.model(submission), seen, training)

                def fuse(outcomes: Iterable[findings.Outcome]) -> findings.Verdict:
                    return combine.verdict(
                        outcomes,
                        population,
                        classes=self.task.num_classes,
                        suspect=suspect,
                        held_out=held_out,
                        recipe=submission.manifest.recipe,
                    )

                kept = self._kept(folder, inspect)
                verdict = ask(suspect, self.defenses, kept, fuse, every_repair=self.round.repairs_all)
                findings.save(verdict, path)
            return read_verdict(path).p

        for submission, p in zip(submissions, self.together(answer, submissions), strict=True):
            self.watch.done(submission.id[:8], f"p = {p:.2f}")
        written = {
            s.id: hashlib.sha256((self.folder / "verdicts" / s.id / "verdict.json").read_bytes()).hexdigest()
            for s in submissions
        }
        write_atomically(self.folder / "answers.json", [json.dumps(written, indent=1).encode() + b"\n"])

    def _suspect(self, model: Network, clean: Images, training: Images | None) -> Suspect:
        return Suspect.of(model, self.task, clean=clean, training=training, metas=self.metas)

    def _kept(self, folder: Path, inspect: Inspect) -> Inspect:
        """Put each answer on disk before the next defense begins, and read what is there."""

        def kept(name: str, defense: Defense, seen: Suspect) -> findings.Outcome:
            path = folder / f"{name}.json"
            if not path.exists():
                findings.save(inspect(name, defense, seen), path)
            return findings.load(path)  # type: ignore[return-value]  # written above: an outcome

        return kept

    def together(self, work: Callable[[A, Inspect], B], items: Iterable[A]) -> Iterator[B]:
        """Do work on several items at once, each with an inspector of its own; results in the order of the items."""
        free: queue.SimpleQueue[Inspect] = queue.SimpleQueue()
        for inspect in self.inspectors:
            free.put(inspect)

        def one(item: A) -> B:
            inspect = free.get()
            try:
                return work(item, inspect)
            finally:
                free.put(inspect)

        pool = ThreadPoolExecutor(len(self.inspectors))
        try:
            yield from pool.map(one, items)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _scores(outcomes: Mapping[str, findings.Outcome]) -> str:
    return ", ".join(
        f"{name} {o.score:.2f}"
        for name, o in outcomes.items()
        if isinstance(o, findings.Finding) and o.score is not None
    )
