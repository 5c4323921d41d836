"""The host: plays one whole game on one machine, from training to the published result.

Every step leaves its result in the game's folder and is skipped when it is there, so that a game that was interrupted
goes on where it stopped. The folder:

    game.json              the settings; a folder belongs to one game
    teams/NAME/            each team's private copy of its submission, and NAME.zip, what it hands in
    references/            the host's clean models, and their scores where none are shipped
    weights/  sealed/      the two stores: defenses see the first, the referee alone the second
    sets/  judged/         on the data board: the sets, which no defense sees, and which weights came of them
    books.json             submissions by id, with their commitments
    gates/ID.json          the referee's measurements; no defense sees them
    verdicts/ID/           one record per defense, and verdict.json
    answers.json           SHA-256 of every verdict, written before a seal is opened for publication
    streams/ID/            what STRIP said to a run-time stream of the referee's
    result.json report.html
"""

import hashlib
import json
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from molehunt import calibration, combine, findings
from molehunt.asking import ask
from molehunt.calibration import Population
from molehunt.defenses import Defense, scoring
from molehunt.engine import Engine
from molehunt.examination import Inspect, divide, examine
from molehunt.files import write_atomically
from molehunt.game import entries
from molehunt.game.attacker import Team, teams
from molehunt.game.delivery import Delivery
from molehunt.game.entries import Settings
from molehunt.game.referee import STREAM, Judged, Referee, read_verdict
from molehunt.game.rules import DATA_ONLY, Round, get_round
from molehunt.game.submission import Submission, ingest, open_stored_set
from molehunt.runner import generator
from molehunt.suspect import Suspect
from molehunt.tasks import Images, Task, get_task
from molehunt.training import recipe_for

HOST = "The host"
HIDDEN = 2_000  # hidden images that the referee asks about; more would narrow no interval that matters

A = TypeVar("A")
B = TypeVar("B")


class Entry(NamedTuple):
    """One line of the host's books.

    Attributes:
        team: who handed it in.
        submission: what was handed in.
        arrived: its place, from 0, in the order in which the submissions came. A game on one machine has no better
            clock: its teams train side by side and hand in one after the other.
    """

    team: Team
    submission: Submission
    arrived: int


class Watch(Protocol):
    """What a game tells those who look on."""

    def stage(self, title: str, total: int) -> None:
        """Begin a stage of so many pieces."""
        ...

    def done(self, title: str, text: str) -> None:
        """End a piece of the stage, with one line of what came of it."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Played:
    """A finished game.

    Attributes:
        settings: what was played.
        task: of the game.
        round: of the game.
        judged: every submission, in the order of the books.
        defenses: what ran, by name.
        population: the clean scores behind the probabilities.
        hidden: the referee's images.
        stream: how many inputs a run-time stream had.
        altered: on the data board, the share of the training rows in which the set of a submission differs from the
            public one, by id; else empty.
        seconds: wall time of this call; less than the whole when an interrupted game went on.
        when: when it ended, as text.
        folder: where everything lies.
    """

    settings: Settings
    task: Task
    round: Round
    judged: tuple[Judged, ...]
    defenses: Mapping[str, Defense]
    population: Population
    hidden: Images
    stream: int
    altered: Mapping[str, float]
    seconds: float
    when: str
    folder: Path


class Host:
    """Plays a game in a folder; make one and call `play`."""

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        *,
        defenses: Mapping[str, Defense],
        inspectors: Sequence[Inspect],
        engine: Engine,
        watch: Watch,
    ) -> None:
        """Open or make the folder of a game.

        Args:
            settings: the game.
            folder: where it is kept; an existing one must hold the same game.
            defenses: what runs on every submission, by name.
            inspectors: each runs one defense at a time, all of them at once: as many models are examined together.
            engine: where networks are trained.
            watch: who looks on.

        Raises:
            ValueError: the folder holds another game, or an unknown task, network or round is named.
        """
        self.settings, self.folder, self.defenses = settings, folder, defenses
        self.inspectors, self.engine, self.watch = inspectors, engine, watch
        self.task = get_task(settings.task)
        self.delivery = Delivery(settings=settings, folder=folder, task=self.task)
        self.round = get_round(settings.round)
        recipe_for(settings.network, self.task)
        wanted = {**asdict(settings), "defenses": {name: repr(d) for name, d in defenses.items()}}
        book = folder / "game.json"
        if book.exists():
            found = json.loads(book.read_text())
            different = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
            if different:
                raise ValueError(
                    f"{folder} holds another game: {', '.join(different)} differ; name another folder with --out"
                )
        _write(book, wanted)

    def play(self) -> Played:
        """Play the game to its end, or from where it stopped."""
        start = time.monotonic()
        defender, hidden = self.task.secret(self.settings.seed_for("split"))
        seen, held_out = divide(defender)
        hidden = Images(hidden.x[:HIDDEN], hidden.y[:HIDDEN])
        references, books = self._train()
        referee = Referee(self.folder, self.task, self.settings.network, hidden, references)
        self._gates(books, referee)
        population = self._population(referee)
        self._verdicts(books, referee, population, seen, held_out)
        judged = self._publish(books, referee, seen)
        return Played(
            settings=self.settings,
            task=self.task,
            round=self.round,
            judged=judged,
            defenses=self.defenses,
            population=population,
            hidden=hidden,
            stream=STREAM,
            altered=self._altered(books),
            seconds=time.monotonic() - start,
            when=time.strftime("%Y-%m-%d %H:%M"),
            folder=self.folder,
        )

    def _train(self) -> tuple[list[Path], list[Entry]]:
        """Train references and submissions, then check every archive and split it into the two stores."""
        rng = generator(self.settings.seed_for("teams"), "teams")
        players = [*teams(self.task, self.settings.teams, rng, self.settings.board)]
        players += [Team(name=f"{HOST} {i + 1}", attack=None) for i in range(self.settings.clean)]
        references = entries.reference_jobs(self.settings, self.folder / "references")
        submitted = [entries.entry_job(self.settings, team, self.folder / "teams") for team in players]
        jobs = references + submitted
        self.watch.stage("The host trains clean references, teams train and submit", len(jobs))
        for job, text in zip(jobs, self.engine.map(entries.run, jobs), strict=True):
            self.watch.done(job.name, text)
        board = self.settings.board
        store, sealed = self.folder / ("weights" if board == "weights" else "sets"), self.folder / "sealed"
        books = [
            Entry(team, self._take(job.path, store, sealed), arrived)
            for arrived, (team, job) in enumerate(zip(players, submitted, strict=True))
        ]
        # The order of the books is drawn, so that it tells nothing. It is drawn before anything is said of a submission
        # by its id: in the order of the teams that would say whose it is.
        order = torch.randperm(len(books), generator=generator(self.settings.seed_for("order"), "order"))
        books = [books[i] for i in order.tolist()]
        if board == "data":
            self.watch.stage("The host trains a model from every training set", len(books))
            found = self.delivery.train([entry.submission for entry in books], self.engine)
            trained = []
            for entry, submission in zip(books, found, strict=True):
                trained.append(entry._replace(submission=submission))
                self.watch.done(submission.id[:8], "trained")
            books = trained
        _write(
            self.folder / "books.json",
            [{"id": s.id, "weights": s.weights, "commitment": s.commitment} for _, s, _ in books],
        )
        return [job.path for job in references], books

    def _take(self, path: Path, store: Path, sealed: Path) -> Submission:
        """Check an archive, which must be for this game, and split it into the two stores."""
        return ingest(
            path,
            store,
            sealed,
            board=self.settings.board,
            task=self.task,
            allowed_networks=[self.settings.network],
            round_=self.round.name,
        )

    def _altered(self, books: list[Entry]) -> dict[str, float]:
        """Measure how much of the training split every handed-over set alters."""
        if self.settings.board == "weights":
            return {}
        clean, shares = self.task.load("train"), {}
        for _, submission, _ in books:
            assert submission.training is not None  # what is taken in is of the board that is played
            training = open_stored_set(self.folder / "sets", submission.training, self.task)
            shares[submission.id] = training.changes(clean).altered / len(clean.y)
        return shares

    def _gates(self, books: list[Entry], referee: Referee) -> None:
        self.watch.stage("The referee measures the gates on hidden images", len(books))
        for _, submission, _ in books:
            referee.gates(submission)
            # How many gates there were says whether something is hidden; the public learns it at publication.
            self.watch.done(submission.id[:8], "measured")

    def _population(self, referee: Referee) -> Population:
        """Return the clean scores to compare with: those shipped for this task and network, else the references'."""
        asked = scoring(self.defenses)
        shipped = calibration.shipped(self.task.name, self.settings.network, asked)
        # What looks at training sets has scored no shipped model: those are of the weights board.
        if shipped is not None and not (self.settings.board == "data" and DATA_ONLY & asked.keys()):
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
            suspect = Suspect.of(referee.references[i], self.task, clean=divide(clean)[0], training=training)
            # What a repair does to a clean model is no score: nothing to compare with comes of it.
            return dict(examine(suspect, asked, self._kept(self.folder / "references" / f"outcomes-{i}", inspect)))

        for i, outcomes in enumerate(self._together(look, range(len(referee.references)))):
            rows.append(outcomes)
            self.watch.done(f"reference {i + 1}", _scores(outcomes))
        network = self.settings.network
        recipe = calibration.recorded(network, self.task)
        population = calibration.population(rows, task=self.task.name, network=network, recipe=recipe)
        calibration.save(population, path)
        return population

    def _verdicts(
        self,
        books: list[Entry],
        referee: Referee,
        population: Population,
        seen: Images,
        held_out: Images,
    ) -> None:
        """Run every defense on every submission and write the answers down, with their hash, before any is judged."""
        self.watch.stage("The defenses examine every submission", len(books))

        def answer(submission: Submission, inspect: Inspect) -> float:
            folder = self.folder / "verdicts" / submission.id
            path = folder / "verdict.json"
            if not path.exists():
                training = self.delivery.seen(submission)
                suspect = Suspect.of(referee.model(submission), self.task, clean=seen, training=training)

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

        submissions = [entry.submission for entry in books]
        for submission, p in zip(submissions, self._together(answer, submissions), strict=True):
            self.watch.done(submission.id[:8], f"p = {p:.2f}")
        _write(
            self.folder / "answers.json",
            {
                s.id: hashlib.sha256((self.folder / "verdicts" / s.id / "verdict.json").read_bytes()).hexdigest()
                for s in submissions
            },
        )

    def _kept(self, folder: Path, inspect: Inspect) -> Inspect:
        """Put each answer on disk before the next defense begins, and read what is there."""

        def kept(name: str, defense: Defense, seen: Suspect) -> findings.Outcome:
            path = folder / f"{name}.json"
            if not path.exists():
                findings.save(inspect(name, defense, seen), path)
            return findings.load(path)  # type: ignore[return-value]  # written above: an outcome

        return kept

    def _publish(self, books: list[Entry], referee: Referee, seen: Images) -> tuple[Judged, ...]:
        """Open every seal, check it against its commitment, and count the points."""
        self.watch.stage("Seals are opened, points are counted", len(books))

        def stream(submission: Submission, inspect: Inspect) -> None:
            referee.stream(submission, seen, inspect, self.defenses)

        judged = []
        streams = self._together(stream, [entry.submission for entry in books])
        for (team, submission, arrived), _ in zip(books, streams, strict=True):
            one = referee.judge(submission, team.name, host=team.name.startswith(HOST), arrived=arrived)
            judged.append(one)
            self.watch.done(
                team.name, f"{one.kind}, p = {one.verdict.p:.2f}" + ("" if one.valid else ", missed a gate")
            )
        return tuple(judged)

    def _together(self, work: Callable[[A, Inspect], B], items: Iterable[A]) -> Iterator[B]:
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


def _write(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, [json.dumps(document, indent=1).encode() + b"\n"])
