"""The host: plays one whole game on one machine, from training to the published report.

Every step leaves its result in the game's folder and is skipped when it is there, so that a game that was interrupted
goes on where it stopped. The folder:

    game.json              the settings; a folder belongs to one game
    teams/NAME/            each team's private copy of its submission, and NAME.zip, what it hands in
    references/            the host's clean models
    weights/  sealed/      the two stores: defenses see the first, the referee alone the second
    books.json             submissions by id, with their commitments
    gates/ID.json          the referee's measurements; no defense sees them
    verdicts/ID/           one record per defense, and verdict.json
    answers.json           SHA-256 of every verdict, written before any seal is opened for publication
    result.json report.html
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from molehunt import calibration, checkpoints, combine, findings
from molehunt.calibration import Population
from molehunt.defenses import Defense
from molehunt.examination import Inspect, examine
from molehunt.files import write_atomically
from molehunt.findings import Verdict
from molehunt.game import seal
from molehunt.game.answers import Answers, accuracy, measure
from molehunt.game.attacker import Team, describe, teams, train_model
from molehunt.game.gates import Gate, ReferenceAccuracy, all_gates
from molehunt.game.manifest import Manifest
from molehunt.game.rules import Round, get_round
from molehunt.game.scoring import Points, Truth, judge
from molehunt.game.seal import Sealed
from molehunt.game.submission import Submission, ingest, pack, sealed_path, weights_path, write_submission
from molehunt.networks import Network
from molehunt.runner import generator
from molehunt.suspect import Suspect
from molehunt.tasks import Images, Task, get_task
from molehunt.training import recipe_for

HOST = "The host"
HIDDEN = 2_000  # hidden images that the referee asks about; more would narrow no interval that matters


class Watch(Protocol):
    """What a game tells those who look on."""

    def stage(self, title: str, total: int) -> None:
        """Begin a stage of so many pieces."""
        ...

    def piece(self, title: str) -> None:
        """Begin a piece of the stage."""
        ...

    def progress(self, done: int, total: int) -> None:
        """Tell how far the piece is."""
        ...

    def done(self, text: str) -> None:
        """End the piece, with one line of what came of it."""
        ...


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that a game depends on.

    Attributes:
        task: name of the task.
        network: name of the network that everybody trains.
        round: name of the round.
        seed: draws everything: data splits, teams' choices, weights, defenses.
        teams: how many teams play.
        clean: how many clean models the host slips in among the judged.
        references: how many clean models the host trains as references; at least five for the specificity gate.
    """

    task: str
    network: str
    round: str = "final"
    seed: int = 0
    teams: int = 7
    clean: int = 5
    references: int = 5

    def __post_init__(self) -> None:
        for name, least in (("teams", 1), ("clean", 0), ("references", 5)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Judged:
    """One submission with all that is known after publication."""

    submission: Submission
    team: str
    kind: str
    sealed: Sealed
    gates: tuple[Gate, ...]
    verdict: Verdict | None
    points: Points | None

    @property
    def valid(self) -> bool:
        """Whether it passed every gate."""
        return all(gate.passed for gate in self.gates)

    @property
    def counts(self) -> bool:
        """Whether it counts for the defender: host-trained clean models and backdoors that passed the gates."""
        return self.points is not None and (self.kind == "host clean" or (self.sealed.backdoored and self.valid))


@dataclass(frozen=True, kw_only=True, eq=False)
class Played:
    """A finished game."""

    settings: Settings
    task: Task
    round: Round
    judged: tuple[Judged, ...]
    defenses: Mapping[str, Defense]
    population: Population
    hidden: Images
    seconds: float
    folder: Path


def seed_of(settings: Settings, purpose: str) -> int:
    """Return a seed for one purpose that tells nothing about those for others."""
    digest = hashlib.sha256(f"molehunt {settings.seed} {settings.task} {purpose}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


def divide(clean: Images, share: float = 0.8) -> tuple[Images, Images]:
    """Part the defender's clean images: what the defenses see, and what the fusion keeps to measure their answers."""
    cut = int(share * len(clean.y))
    return Images(clean.x[:cut], clean.y[:cut]), Images(clean.x[cut:], clean.y[cut:])


class Host:
    """Plays a game in a folder; make one and call `play`."""

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        *,
        defenses: Mapping[str, Defense],
        inspect: Callable[[Callable[[int, int], None]], Inspect],
        watch: Watch,
        check: Callable[[], None],
    ) -> None:
        """Open or make the folder of a game.

        Args:
            settings: the game.
            folder: where it is kept; an existing one must hold the same game.
            defenses: what runs on every submission, by name.
            inspect: given a progress report, makes what runs one defense.
            watch: who looks on.
            check: called often; raises to stop.

        Raises:
            ValueError: the folder holds another game.
        """
        self.settings, self.folder, self.defenses = settings, folder, defenses
        self.inspect, self.watch, self.check = inspect, watch, check
        self.task = get_task(settings.task)
        self.round = get_round(settings.round)
        self.recipe = recipe_for(settings.network, self.task)
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
        defender, hidden = self.task.secret(seed_of(self.settings, "split"))
        hidden = Images(hidden.x[:HIDDEN], hidden.y[:HIDDEN])
        references = self._references()
        entries = self._submissions()
        books = self._ingest(entries)
        self._gates(books, references, hidden)
        population = self._population(references)
        self._verdicts(books, defender, population)
        judged = self._publish(books, hidden)
        return Played(
            settings=self.settings,
            task=self.task,
            round=self.round,
            judged=judged,
            defenses=self.defenses,
            population=population,
            hidden=hidden,
            seconds=time.monotonic() - start,
            folder=self.folder,
        )

    # -- training -----------------------------------------------------------------------------------------------------

    def _references(self) -> list[Network]:
        """Train the host's clean models."""
        self.watch.stage("The host trains clean reference models", self.settings.references)
        models = []
        for i in range(self.settings.references):
            path = self.folder / "references" / f"{i}.safetensors"
            with self._piece(f"reference {i + 1}") as say:
                if not path.exists():
                    model, _ = self._train(f"reference {i}", None)
                    write_atomically(path, checkpoints.encode(checkpoints.canonical(model.state_dict())))
                    say("trained")
                else:
                    say("kept from before")
                models.append(self._load(path))
        return models

    def _submissions(self) -> list[tuple[Team, Path]]:
        """Let every team, and the host among them, train and pack a submission."""
        rng = generator(seed_of(self.settings, "teams"), "teams")
        entries = [*teams(self.task, self.settings.teams, rng)]
        entries += [Team(name=f"{HOST} {i + 1}", attack=None) for i in range(self.settings.clean)]
        self.watch.stage("Teams train and submit", len(entries))
        packed = []
        for team in entries:
            name = team.name.lower().replace(" ", "-")
            path = self.folder / "teams" / f"{name}.zip"
            with self._piece(team.name) as say:
                if path.exists():
                    say("kept from before")
                else:
                    self._submit(team, self.folder / "teams" / name, path)
                    say(f"{path.stat().st_size / 2**20:.1f} MiB, sealed")
            packed.append((team, path))
        return packed

    def _submit(self, team: Team, folder: Path, path: Path) -> None:
        """Train one team's model and pack its submission; honest and backdoored ones take the same path."""
        model, poisoned = self._train(f"team {team.name}", team.attack)
        sealed = Sealed()
        if team.attack is not None and poisoned is not None:
            words = describe(team.attack)
            sealed = Sealed(
                attack=words.pop("attack"),
                target=poisoned.target,
                trigger=poisoned.trigger,
                details={"config": words, "poison_rate": float(poisoned.altered.double().mean())},
            )
        manifest = Manifest(
            team=team.name,
            round=self.round.name,
            task=self.task.name,
            network=self.settings.network,
            recipe=self.settings.network,
        )
        nonce = hashlib.sha256(f"nonce {seed_of(self.settings, team.name)}".encode()).digest()
        write_submission(folder, model, manifest, sealed, task=self.task, nonce=nonce)
        pack(folder, path, task=self.task)

    def _train(self, purpose: str, attack: Any) -> Any:
        return train_model(
            self.task,
            self.settings.network,
            self.recipe,
            attack,
            rng=generator(seed_of(self.settings, purpose), purpose),
            report=self.watch.progress,
            check=self.check,
        )

    # -- referee ------------------------------------------------------------------------------------------------------

    def _ingest(self, entries: list[tuple[Team, Path]]) -> list[tuple[Team, Submission]]:
        """Check every archive and split it; the order of the books is drawn, so that it tells nothing."""
        books = [
            (team, ingest(path, self.folder / "weights", self.folder / "sealed", task=self.task))
            for team, path in entries
        ]
        order = torch.randperm(len(books), generator=generator(seed_of(self.settings, "order"), "order"))
        books = [books[i] for i in order.tolist()]
        _write(
            self.folder / "books.json",
            [{"id": s.id, "weights": s.weights, "commitment": s.commitment} for _, s in books],
        )
        return books

    def _gates(self, books: list[tuple[Team, Submission]], references: list[Network], hidden: Images) -> None:
        """Let the referee open every seal and measure the gates on hidden images."""
        self.watch.stage("The referee measures the gates on hidden images", len(books))
        plain = [measure(model, hidden) for model in references]
        reference = ReferenceAccuracy.of([accuracy(a.plain, a.y) for a in plain], len(hidden.y))
        for _, submission in books:
            path = self.folder / "gates" / f"{submission.id}.json"
            with self._piece(submission.id[:8]) as say:
                if not path.exists():
                    sealed = self._unseal(submission)
                    answers = measure(self._model(submission), hidden, sealed.trigger)
                    on_clean = [
                        replace(a, stamped=measure(model, hidden, sealed.trigger).stamped)
                        for a, model in zip(plain, references, strict=True)
                        if sealed.trigger is not None
                    ]
                    gates = self._measure_gates(answers, reference, sealed, on_clean)
                    _write(path, [asdict(gate) for gate in gates])
                # Which gates there were says whether something is hidden; the public learns it at publication.
                say("measured")

    def _measure_gates(
        self, answers: Answers, reference: ReferenceAccuracy, sealed: Sealed, on_clean: list[Answers]
    ) -> tuple[Gate, ...]:
        if sealed.trigger is None:
            return all_gates(answers, reference)
        return all_gates(
            answers,
            reference,
            trigger=sealed.trigger,
            target=sealed.target,
            shape=self.task.shape,
            references=on_clean,
        )

    # -- defender -----------------------------------------------------------------------------------------------------

    def _population(self, references: list[Network]) -> Population:
        """Return the clean scores to compare with: shipped for this task and network, else made from references."""
        shipped = calibration.shipped(self.task.name, self.settings.network, self.defenses)
        if shipped is not None:
            return shipped
        path = self.folder / "references" / "population.json"
        if path.exists():
            return calibration.load(path)
        self.watch.stage("The defenses look at the clean references", len(references))
        rows = []
        for i, model in enumerate(references):
            with self._piece(f"reference {i + 1}") as say:
                defender, _ = self.task.secret(seed_of(self.settings, f"reference split {i}"))
                suspect = Suspect.of(model, self.task, clean=divide(defender)[0])
                outcomes = self._examine(suspect, self.folder / "references" / f"outcomes-{i}")
                rows.append(outcomes)
                say(_scores(outcomes))
        population = calibration.population(
            rows, task=self.task.name, network=self.settings.network, recipe=self.settings.network
        )
        calibration.save(population, path)
        return population

    def _verdicts(self, books: list[tuple[Team, Submission]], defender: Images, population: Population) -> None:
        """Run every defense on every submission and write the answers down, with their hash, before any is judged."""
        self.watch.stage("The defenses examine every submission", len(books))
        seen, held_out = divide(defender)
        hashes = {}
        for _, submission in books:
            folder = self.folder / "verdicts" / submission.id
            path = folder / "verdict.json"
            with self._piece(submission.id[:8]) as say:
                if not path.exists():
                    suspect = Suspect.of(self._model(submission), self.task, clean=seen)
                    outcomes = self._examine(suspect, folder)
                    verdict = combine.verdict(
                        outcomes.values(),
                        population,
                        classes=self.task.num_classes,
                        suspect=suspect,
                        held_out=held_out,
                    )
                    findings.save(verdict, path)
                answer = _verdict(path)
                hashes[submission.id] = hashlib.sha256(path.read_bytes()).hexdigest()
                say(f"p = {answer.p:.2f}")
        _write(self.folder / "answers.json", hashes)

    def _examine(self, suspect: Suspect, folder: Path) -> dict[str, findings.Outcome]:
        """Run every defense on one model; each answer is on disk before the next defense begins."""
        run = self.inspect(self.watch.progress)

        def kept(name: str, defense: Defense, seen: Suspect) -> findings.Outcome:
            path = folder / f"{name}.json"
            if path.exists():
                return findings.load(path)  # type: ignore[return-value]  # written below: an outcome
            self.check()
            outcome = run(name, defense, seen)
            findings.save(outcome, path)
            return outcome

        return dict(examine(suspect, self.defenses, kept))

    # -- publication --------------------------------------------------------------------------------------------------

    def _publish(self, books: list[tuple[Team, Submission]], hidden: Images) -> tuple[Judged, ...]:
        """Open every seal, check it against its commitment, and count the points."""
        self.watch.stage("Seals are opened, points are counted", len(books))
        answers = json.loads((self.folder / "answers.json").read_text())
        judged = []
        for team, submission in books:
            path = self.folder / "verdicts" / submission.id / "verdict.json"
            with self._piece(team.name) as say:
                if hashlib.sha256(path.read_bytes()).hexdigest() != answers[submission.id]:
                    raise ValueError(f"{path} was changed after the answers were written down")
                sealed, verdict = self._unseal(submission), _verdict(path)
                gates = tuple(
                    Gate(**g) for g in json.loads((self.folder / "gates" / f"{submission.id}.json").read_text())
                )
                truth = Truth(backdoored=sealed.backdoored, trigger=sealed.trigger, target=sealed.target)
                model = self._model(submission)
                repaired = None if verdict.repaired is None else self._with(verdict.repaired)
                kind = "host clean" if team.name.startswith(HOST) else "backdoored" if sealed.backdoored else "honest"
                one = Judged(
                    submission=submission,
                    team=team.name,
                    kind=kind,
                    sealed=sealed,
                    gates=gates,
                    verdict=verdict,
                    points=judge(verdict, truth, hidden, model, repaired),
                )
                judged.append(one)
                say(f"{kind}, p = {verdict.p:.2f}" + ("" if one.valid else ", missed a gate"))
        return tuple(judged)

    # -- small pieces -------------------------------------------------------------------------------------------------

    @contextmanager
    def _piece(self, title: str) -> Iterator[Callable[[str], None]]:
        self.check()
        self.watch.piece(title)
        words = [""]
        yield words.append
        self.watch.done(words[-1])

    def _load(self, path: Path) -> Network:
        layout = checkpoints.layout_of(self.settings.network, self.task.shape, self.task.num_classes)
        return self._with(checkpoints.read_safetensors(path, layout))

    def _with(self, state: Mapping[str, torch.Tensor]) -> Network:
        return checkpoints.assemble(dict(state), self.settings.network, self.task.shape, self.task.num_classes)

    def _model(self, submission: Submission) -> Network:
        return self._load(weights_path(self.folder / "weights", submission.weights))

    def _unseal(self, submission: Submission) -> Sealed:
        envelope = sealed_path(self.folder / "sealed", submission.commitment).read_bytes()
        return seal.unseal(envelope, self.task, submission.commitment)


def _verdict(path: Path) -> Verdict:
    answer = findings.load(path)
    if not isinstance(answer, Verdict):
        raise ValueError(f"{path} holds no verdict")
    return answer


def _scores(outcomes: Mapping[str, findings.Outcome]) -> str:
    return ", ".join(
        f"{name} {o.score:.2f}"
        for name, o in outcomes.items()
        if isinstance(o, findings.Finding) and o.score is not None
    )


def _write(path: Path, document: Any) -> None:
    write_atomically(path, [json.dumps(document, indent=1).encode() + b"\n"])
