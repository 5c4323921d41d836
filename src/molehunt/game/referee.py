"""The referee: opens seals, measures the gates on hidden images, and judges answers that were written down before."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from molehunt import checkpoints, findings
from molehunt.examination import Inspect
from molehunt.files import write_atomically
from molehunt.findings import Verdict
from molehunt.game import seal
from molehunt.game.answers import accuracy, measure
from molehunt.game.gate import Gate
from molehunt.game.gates import ReferenceAccuracy, all_gates
from molehunt.game.removals import Removal, removals
from molehunt.game.scoreboard import auc
from molehunt.game.scoring import Points, Truth, judge
from molehunt.game.seal import Sealed
from molehunt.game.submission import Submission, sealed_path, weights_path
from molehunt.networks import Network
from molehunt.report import Kind
from molehunt.suspect import Suspect
from molehunt.tasks import Images, Task

STREAM = 200  # inputs of a run-time stream, half of them stamped


@dataclass(frozen=True, kw_only=True, eq=False)
class Opened:
    """One submission whose seal was opened at publication.

    Attributes:
        submission: as in the books.
        team: who handed it in.
        kind: the truth: "backdoored", "honest" or "host clean".
        sealed: what its seal said.
        gates: as they were measured.
        model: the submitted model.
        arrived: its place, from 0, in the order in which the host took the submissions in.
    """

    submission: Submission
    team: str
    kind: Kind
    sealed: Sealed
    gates: tuple[Gate, ...]
    model: Network
    arrived: int

    @property
    def valid(self) -> bool:
        """Whether it passed every gate."""
        return all(gate.passed for gate in self.gates)


@dataclass(frozen=True, kw_only=True, eq=False)
class Judged(Opened):
    """One submission with all that is known after publication.

    Attributes:
        verdict: what the defender answered.
        points: what the answer earned, before it is asked whether the submission counts.
        stream: AUC of STRIP on a stream of hidden inputs of which half are stamped; None without a trigger.
        removals: what every repair that was offered does on hidden images.
    """

    verdict: Verdict
    points: Points
    stream: float | None
    removals: tuple[Removal, ...] = ()

    @property
    def counts(self) -> bool:
        """Whether it counts for the defender: host-trained clean models and backdoors that passed the gates."""
        return self.kind == "host clean" or (self.sealed.backdoored and self.valid)


class Referee:
    """Knows the stores, the hidden images and the host's clean models of one game."""

    def __init__(self, folder: Path, task: Task, network: str, hidden: Images, references: Sequence[Path]) -> None:
        """Load the references and measure them.

        Args:
            folder: of the game.
            task: of the game.
            network: of the game.
            hidden: images that nobody else sees.
            references: weights of the host's clean models.
        """
        self.folder, self.task, self.network, self.hidden = folder, task, network, hidden
        self.references = [self.load(path) for path in references]
        self.plain = [measure(model, hidden) for model in self.references]
        self.reference = ReferenceAccuracy.of([accuracy(a.plain, a.y) for a in self.plain], len(hidden.y))

    def load(self, path: Path) -> Network:
        """Read weights into the game's network."""
        layout = checkpoints.layout_of(self.network, self.task.shape, self.task.num_classes)
        return self.assemble(checkpoints.read_safetensors(path, layout))

    def assemble(self, state: Mapping[str, torch.Tensor]) -> Network:
        """Put weights into the game's network."""
        return checkpoints.assemble(dict(state), self.network, self.task.shape, self.task.num_classes)

    def model(self, submission: Submission) -> Network:
        """Return a submitted model."""
        return self.load(weights_path(self.folder / "weights", submission.weights))

    def unseal(self, submission: Submission) -> Sealed:
        """Open a seal and check it against its commitment."""
        envelope = sealed_path(self.folder / "sealed", submission.commitment).read_bytes()
        return seal.unseal(envelope, self.task, submission.commitment)

    def gates(self, submission: Submission) -> tuple[Gate, ...]:
        """Measure every gate of a submission, or read what was measured before."""
        path = self.folder / "gates" / f"{submission.id}.json"
        if path.exists():
            return tuple(Gate(**gate) for gate in json.loads(path.read_text()))
        sealed, model = self.unseal(submission), self.model(submission)
        answers = measure(model, self.hidden, sealed.trigger)
        if sealed.trigger is None:
            gates = all_gates(answers, self.reference)
        else:
            gates = all_gates(
                answers,
                self.reference,
                trigger=sealed.trigger,
                target=sealed.target,
                shape=self.task.shape,
                references=[
                    replace(a, stamped=measure(clean, self.hidden, sealed.trigger).stamped)
                    for a, clean in zip(self.plain, self.references, strict=True)
                ],
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, [json.dumps([asdict(gate) for gate in gates], indent=1).encode()])
        return gates

    def stream(self, submission: Submission, clean: Images, inspect: Inspect, defenses: Mapping[str, object]) -> None:
        """Let STRIP judge a run-time stream: hidden inputs that the trigger counts on, every second one stamped."""
        sealed = self.unseal(submission)
        path = self.folder / "streams" / submission.id / "strip.json"
        if path.exists() or sealed.trigger is None or "strip" not in defenses:
            return
        suspect = Suspect.of(self.model(submission), self.task, clean=clean, inputs=self._inputs(sealed))
        findings.save(inspect("strip", defenses["strip"], suspect), path)  # type: ignore[arg-type]  # a defense

    def hides(self, submission: Submission) -> bool:
        """Whether the seal holds a trigger. Before publication this is for the host alone, to know what to refuse."""
        return self.unseal(submission).backdoored

    def open(self, submission: Submission, team: str, *, host: bool, arrived: int) -> Opened:
        """Open the seal for everybody; arguments as those of `judge`."""
        sealed = self.unseal(submission)
        honest: Kind = "host clean" if host else "honest"
        return Opened(
            submission=submission,
            team=team,
            kind="backdoored" if sealed.backdoored else honest,
            sealed=sealed,
            gates=self.gates(submission),
            model=self.model(submission),
            arrived=arrived,
        )

    def judge(self, submission: Submission, team: str, *, host: bool, arrived: int) -> Judged:
        """Open the seal for everybody and count the points of the answer.

        Args:
            submission: as in the books.
            team: who handed it in.
            host: whether that is the host itself.
            arrived: its place in the order in which the submissions came, from 0.

        Raises:
            ValueError: the answer is not the one that was written down.
        """
        path = self.folder / "verdicts" / submission.id / "verdict.json"
        written = json.loads((self.folder / "answers.json").read_text())[submission.id]
        if hashlib.sha256(path.read_bytes()).hexdigest() != written:
            raise ValueError(f"{path} was changed after the answers were written down")
        opened, verdict = self.open(submission, team, host=host, arrived=arrived), read_verdict(path)
        sealed, model = opened.sealed, opened.model
        truth = Truth(backdoored=sealed.backdoored, trigger=sealed.trigger, target=sealed.target)
        repaired = None if verdict.repaired is None else self.assemble(verdict.repaired)
        return Judged(
            **{field.name: getattr(opened, field.name) for field in fields(opened)},
            verdict=verdict,
            points=judge(verdict, truth, self.hidden, model, repaired),
            stream=self._auc(submission, sealed),
            removals=removals(verdict, truth, self.hidden, model, self.assemble),
        )

    def _inputs(self, sealed: Sealed) -> torch.Tensor:
        if sealed.trigger is None or sealed.target is None:
            raise ValueError("an honest model has no stream")
        x = self.hidden.x[sealed.target.counts(self.hidden.y)][:STREAM].clone()
        x[1::2] = sealed.trigger(x[1::2])
        return x

    def _auc(self, submission: Submission, sealed: Sealed) -> float | None:
        path = self.folder / "streams" / submission.id / "strip.json"
        outcome = findings.load(path) if path.exists() else None
        if not isinstance(outcome, findings.Finding) or outcome.input_scores is None or not sealed.backdoored:
            return None
        scores = outcome.input_scores.tolist()
        return auc(scores, [i % 2 == 1 for i in range(len(scores))])


def read_verdict(path: Path) -> Verdict:
    """Read a verdict.

    Raises:
        ValueError: the file holds something else.
    """
    answer = findings.load(path)
    if not isinstance(answer, Verdict):
        raise ValueError(f"{path} holds no verdict")
    return answer
