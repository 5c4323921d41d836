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

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from molehunt.calibration import Population
from molehunt.defenses import Defense
from molehunt.engine import Engine
from molehunt.examination import Inspect, divide
from molehunt.files import write_atomically
from molehunt.game import entries
from molehunt.game.attacker import Team, teams
from molehunt.game.delivery import Delivery
from molehunt.game.entries import Settings
from molehunt.game.examiners import Examiners, Watch
from molehunt.game.referee import STREAM, Judged, Opened, Referee
from molehunt.game.rules import Round, get_round
from molehunt.game.submission import Submission, ingest, open_stored_set
from molehunt.metas import Meta, digest
from molehunt.runner import generator
from molehunt.suspect import Access
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Played:
    """A finished game.

    Attributes:
        settings: what was played.
        task: of the game.
        round: of the game.
        judged: every submission that was examined, in the order of the books.
        refused: on the data board, the submissions that hide a trigger and whose model, as the host trained it, missed
            a gate, in the order of the books; no defense saw them.
        defenses: what ran, by name.
        population: the clean scores behind the probabilities.
        hidden: the referee's images.
        stream: how many inputs a run-time stream had.
        altered: on the data board, the share of the training rows in which the set of a submission differs from the
            public one, by id; else empty.
        relabeled: the same of the rows whose label differs.
        seconds: wall time of this call; less than the whole when an interrupted game went on.
        when: when it ended, as text.
        folder: where everything lies.
    """

    settings: Settings
    task: Task
    round: Round
    judged: tuple[Judged, ...]
    refused: tuple[Opened, ...]
    defenses: Mapping[str, Defense]
    population: Population
    hidden: Images
    stream: int
    altered: Mapping[str, float]
    relabeled: Mapping[str, float]
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
        metas: tuple[Meta, ...] | None = None,
    ) -> None:
        """Open or make the folder of a game.

        Args:
            settings: the game.
            folder: where it is kept; an existing one must hold the same game.
            defenses: what runs on every submission, by name.
            inspectors: each runs one defense at a time, all of them at once: as many models are examined together.
            engine: where networks are trained.
            watch: who looks on.
            metas: meta-classifiers that MNTD asks; None for those of the package, if there are any.

        Raises:
            ValueError: the folder holds another game, or an unknown task, network or round is named.
        """
        self.settings, self.folder, self.defenses = settings, folder, defenses
        self.engine, self.watch = engine, watch
        self.task = get_task(settings.task)
        self.delivery = Delivery(settings=settings, folder=folder, task=self.task)
        self.examiners = Examiners(self.delivery, defenses, inspectors, watch, metas)
        self.round = get_round(settings.round)
        recipe_for(settings.network, self.task)
        wanted = {**asdict(settings), "defenses": {name: repr(d) for name, d in defenses.items()}}
        if self.examiners.metas and any(Access.METAS in need for d in defenses.values() for need in d.needs):
            wanted["metas"] = digest(self.examiners.metas)
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
        refused = self._gates(books, referee)
        population = self.examiners.population(referee)
        examined = [entry for entry in books if entry.submission.id not in refused]
        self.examiners.verdicts([e.submission for e in examined], referee, population, seen, held_out)
        judged = self._publish(examined, len(refused), referee, seen)
        turned_away = []
        for team, submission, arrived in books:
            if submission.id in refused:
                turned_away.append(referee.open(submission, team.name, host=_is_host(team), arrived=arrived))
                self.watch.done(team.name, "backdoored, refused: missed a gate")
        altered, relabeled = self._changes(books)
        return Played(
            settings=self.settings,
            task=self.task,
            round=self.round,
            judged=judged,
            refused=tuple(turned_away),
            defenses=self.defenses,
            population=population,
            hidden=hidden,
            stream=STREAM,
            altered=altered,
            relabeled=relabeled,
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

    def _changes(self, books: list[Entry]) -> tuple[dict[str, float], dict[str, float]]:
        """Measure the shares of the training split that every handed-over set alters, and to which it gives a label."""
        if self.settings.board == "weights":
            return {}, {}
        clean, altered, relabeled = self.task.load("train"), {}, {}
        for _, submission, _ in books:
            assert submission.training is not None  # what is taken in is of the board that is played
            changes = open_stored_set(self.folder / "sets", submission.training, self.task).changes(clean)
            altered[submission.id] = changes.altered / len(clean.y)
            relabeled[submission.id] = changes.relabeled / len(clean.y)
        return altered, relabeled

    def _gates(self, books: list[Entry], referee: Referee) -> set[str]:
        """Measure the gates; return the ids of the sets that hide a trigger and miss one: they are refused.

        A submitted model that misses a gate is examined all the same, so that nobody learns before publication which
        those are. That a set was refused is known at once, and with it that something was hidden in it; nobody is asked
        about it any more.
        """
        self.watch.stage("The referee measures the gates on hidden images", len(books))
        refused = set()
        for _, submission, _ in books:
            gates = referee.gates(submission)
            if self.settings.board == "data" and not all(g.passed for g in gates) and referee.hides(submission):
                refused.add(submission.id)
            # How many gates there were says whether something is hidden; the public learns it at publication.
            self.watch.done(submission.id[:8], "measured")
        return refused

    def _publish(self, books: list[Entry], refused: int, referee: Referee, seen: Images) -> tuple[Judged, ...]:
        """Open the seals of what was examined, check them against their commitments, and count the points."""
        self.watch.stage("Seals are opened, points are counted", len(books) + refused)

        def stream(submission: Submission, inspect: Inspect) -> None:
            referee.stream(submission, seen, inspect, self.defenses)

        judged = []
        streams = self.examiners.together(stream, [entry.submission for entry in books])
        for (team, submission, arrived), _ in zip(books, streams, strict=True):
            one = referee.judge(submission, team.name, host=_is_host(team), arrived=arrived)
            judged.append(one)
            self.watch.done(
                team.name, f"{one.kind}, p = {one.verdict.p:.2f}" + ("" if one.valid else ", missed a gate")
            )
        return tuple(judged)


def _is_host(team: Team) -> bool:
    return team.name.startswith(HOST)


def _write(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, [json.dumps(document, indent=1).encode() + b"\n"])
