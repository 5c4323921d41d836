"""The matrix: every attack against every defense, each cell measured; one that was not run says so, never "safe"."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import molehunt
from molehunt import calibration, checkpoints, combine
from molehunt.attacks import Crafter
from molehunt.bank import code
from molehunt.defenses import REPAIRS, Defense
from molehunt.examination import Inspect, divide, examine
from molehunt.files import write_atomically
from molehunt.findings import Abstention, Failure, Finding, Outcome
from molehunt.game.answers import Logits, accuracy, asr, measure
from molehunt.game.attacker import attack_class
from molehunt.game.check import References, check
from molehunt.game.likeness import compare, soft_iou, trigger_points
from molehunt.game.rules import Limits
from molehunt.game.seal import Sealed
from molehunt.game.submission import read_submission
from molehunt.game.training_set import TrainingSet
from molehunt.game.workshop import Plan, drawing, make
from molehunt.metas import Meta, digest
from molehunt.networks import Network, default_device, fast_dtype
from molehunt.runner import configuration, generator
from molehunt.suspect import Suspect
from molehunt.tasks import Images, Task
from molehunt.triggers import Patch, Target, Trigger

FORMAT = "molehunt matrix 1"
Status = Literal["score", "repair", "no p-value", "not granted", "failed"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What one defense made of one attack.

    Attributes:
        defense: its name.
        status: "score" where a p-value could be had, "repair" for a repair, "no p-value" where it answered and there
            are no clean references for its score; "not granted" where it abstained, "failed" where it failed.
        p: conformal p-value of its score among clean reference models, in (0, 1]; small is suspicious.
        score: raw, higher is more suspicious.
        target: whether the class that it names is the true target; None where it names none.
        trigger: R, how well it recovered the trigger, in [0, 1]; None where it recovered none.
        accuracy: of the repaired model on hidden images, in [0, 1].
        asr: of the true trigger on the repaired model, in [0, 1].
        seconds: that it took.
        said: why there is nothing, where there is nothing.
    """

    defense: str
    status: Status
    p: float | None = None
    score: float | None = None
    target: bool | None = None
    trigger: float | None = None
    accuracy: float | None = None
    asr: float | None = None
    seconds: float | None = None
    said: str = ""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One attack, and what every defense made of it.

    Attributes:
        attack: its name.
        seed: of its model and of the hidden images.
        accuracy: on hidden images, in [0, 1].
        asr: the same.
        missed: names of the gates that it missed.
        p: probability of the fused verdict that something is hidden.
        target: whether the fused verdict's likeliest class is a true target; None where no class is likelier.
        cells: one per defense.
        key: all that decided it, as JSON values.
    """

    attack: str
    seed: int
    accuracy: float
    asr: float
    missed: tuple[str, ...]
    p: float
    target: bool | None
    cells: tuple[Cell, ...]
    key: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Line":
        """The other way.

        Raises:
            ValueError: it is no such document.
        """
        try:
            told = {**document}
            if told.pop("format") != FORMAT:
                raise ValueError(f"expected {FORMAT!r}")
            cells = tuple(Cell(**cell) for cell in told.pop("cells"))
            return cls(**{**told, "missed": tuple(told["missed"]), "cells": cells})
        except (KeyError, TypeError) as error:
            raise ValueError(f"no line of a matrix: {error}") from error


@dataclass(frozen=True, kw_only=True, eq=False)
class Matrix:
    """What is to be played.

    Attributes:
        task: what the models are for.
        network: a key of `NETWORKS`.
        defenses: whom to ask, by name.
        folder: where models and finished lines are kept.
        inspecting: from a seed to what runs a defense, as in `examination.examine`.
        population: clean reference models, or None: then no score has a p-value.
        metas: meta-classifiers, or None.
        training: whether the training set of an attack that poisons one is handed over, too.
        references: clean models that the gates compare with.
    """

    task: Task
    network: str
    defenses: Mapping[str, Defense]
    folder: Path
    inspecting: Callable[[int], Inspect]
    population: calibration.Population | None
    metas: Sequence[Meta] | None
    training: bool
    references: Sequence[Network]

    def line(
        self,
        attack: str,
        settings: Mapping[str, Any],
        seed: int,
        *,
        report: Callable[[int, int], None] | None = None,
        check: Callable[[], None] | None = None,
    ) -> Line:
        """Train an attack's model, ask every defense, and keep the line; one that is kept already is read.

        Args:
            attack: a key of `ATTACKS`.
            settings: of it.
            seed: from 0.
            report: how far the training is.
            check: called often; raises to stop.

        Raises:
            ValueError: the attack does not fit the task or the network.
            FloatingPointError: the training diverged.
        """
        plan = Plan(task=self.task, network=self.network, attack=attack, settings=settings, team="Matrix", seed=seed)
        key = self._key(plan)
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
        path = self.folder / f"{attack}-{seed}-{name}.json"
        kept = read(path)
        if kept is not None and kept.key == key and not any(cell.status == "failed" for cell in kept.cells):
            return kept
        mine = self.folder / "models" / f"{attack}-{seed}-{plan.digest[:12]}"
        archive = mine.with_name(mine.name + ".zip")
        if not archive.exists():
            make(plan, mine, report=report, check=check)
        contents = read_submission(archive, task=self.task)
        sealed = contents.open_seal()
        model = checkpoints.assemble(contents.state, self.network, self.task.shape, self.task.num_classes)
        made = self._judge(plan, model, sealed, key)
        write_atomically(path, [json.dumps(made.to_json()).encode()])
        return made

    def _key(self, plan: Plan) -> dict[str, Any]:
        told = {
            name: {"settings": configuration(defense), "code": code.digest(type(defense))}
            for name, defense in self.defenses.items()
        }
        population = None if self.population is None else json.dumps(self.population.to_json(), sort_keys=True)
        key = {
            "plan": plan.digest,
            "defenses": told,
            "training": self.training,
            "references": len(self.references),
            "population": None if population is None else hashlib.sha256(population.encode()).hexdigest(),
            "metas": None if not self.metas else digest(self.metas),
            "threads": torch.get_num_threads(),
            "dtype": str(fast_dtype(default_device())),
            "version": molehunt.__version__,
        }
        # As it is read back: tuples become lists.
        as_read: dict[str, Any] = json.loads(json.dumps(key))
        return as_read

    def _judge(self, plan: Plan, model: Network, sealed: Sealed, key: Mapping[str, Any]) -> Line:
        trigger, goal = sealed.trigger, sealed.target
        if trigger is None or goal is None:
            raise ValueError(f"{plan.attack} hides nothing, so no defense can find it")
        clean, hidden = self.task.secret(plan.seed)
        seen, held = divide(clean)
        suspect = Suspect.of(
            model,
            self.task,
            clean=seen,
            training=self._handed(plan),
            metas=tuple(self.metas) if self.metas else None,
        )
        outcomes = dict(examine(suspect, self.defenses, self.inspecting(plan.seed)))
        verdict = combine.verdict(
            outcomes.values(), self.population, classes=self.task.num_classes, suspect=suspect, held_out=held,
            recipe=self.network,
        )  # fmt: skip
        before = measure(model, hidden, trigger)
        assert before.stamped is not None, "there is a trigger"
        gates = check(model, sealed, self.references, hidden, shape=self.task.shape, limits=Limits())
        mix = goal.mix(self.task.num_classes)
        # An indicative p-value comes from simulated models, not from references.
        known = {} if "indicative" in verdict.details else verdict.p_values
        weighed = _Weighing(self, model, hidden, trigger, goal, known, verdict.details["skipped"])
        return Line(
            attack=plan.attack,
            seed=plan.seed,
            accuracy=accuracy(before.plain, before.y),
            asr=asr(before.stamped, before.y, goal),
            missed=tuple(gate.name for gate in gates if not gate.passed),
            p=verdict.p,
            target=None if (likeliest := _largest(verdict.q)) is None else bool(mix[likeliest] > 0),
            cells=tuple(weighed.cell(name, outcome) for name, outcome in outcomes.items()),
            key=key,
        )

    def _handed(self, plan: Plan) -> Images | None:
        """The set that an attack would hand over, as a defense gets to see it; None for one that hands over none."""
        if not self.training or plan.hidden is None or isinstance(plan.hidden, Crafter):
            return None
        public = self.task.load("train")
        poisoned = plan.hidden(public, self.task, drawing(plan))  # the very set that the model was trained on
        rng = generator(plan.seed, f"matrix set {plan.attack}")
        return TrainingSet.of(poisoned, public, rng, Limits(altered=1.0)).delivered(public, rng)


@dataclass(frozen=True, eq=False)
class _Weighing:
    """Makes cells of one attack's outcomes."""

    matrix: Matrix
    model: Logits
    hidden: Images
    trigger: Trigger
    goal: Target
    p_values: Mapping[str, float]
    skipped: Mapping[str, str]

    def cell(self, name: str, outcome: Outcome) -> Cell:
        if isinstance(outcome, Abstention):
            return Cell(defense=name, status="not granted", said=outcome.reason)
        if isinstance(outcome, Failure):
            return Cell(defense=name, status="failed", said=f"{outcome.kind}: {outcome.message}"[:300])
        told: dict[str, Any] = {
            "defense": name,
            "score": outcome.score,
            "target": self.named(outcome),
            "trigger": self.recovered(outcome),
            "seconds": None if outcome.cost is None else outcome.cost.seconds,
        }
        if outcome.repaired is not None:
            told["accuracy"], told["asr"] = self.after(outcome.repaired)
        if name in self.p_values:
            return Cell(status="score", p=self.p_values[name], **told)
        if outcome.repaired is not None or name in REPAIRS:
            return Cell(status="repair", **told)
        return Cell(status="no p-value", said=self.skipped.get(name, ""), **told)

    def named(self, finding: Finding) -> bool | None:
        """Whether the class that a finding points at is a true target."""
        target = finding.target
        if target is None and finding.class_scores is not None:
            target = _largest(finding.class_scores)
        return None if target is None else bool(self.goal.mix(self.matrix.task.num_classes)[target] > 0)

    def recovered(self, finding: Finding) -> float | None:
        """R of a recovered trigger."""
        if finding.trigger is None:
            return None
        likeness = compare(finding.trigger, self.trigger, self.goal, self.hidden, self.model)
        iou = soft_iou(finding.trigger, self.trigger) if isinstance(self.trigger, Patch) else None
        return trigger_points(likeness, iou)

    def after(self, repaired: Mapping[str, Tensor]) -> tuple[float, float]:
        """Accuracy and ASR of the repaired model."""
        task = self.matrix.task
        state = checkpoints.canonical(repaired)
        model = checkpoints.assemble(state, self.matrix.network, task.shape, task.num_classes)
        told = measure(model, self.hidden, self.trigger)
        assert told.stamped is not None, "there is a trigger"
        return accuracy(told.plain, told.y), asr(told.stamped, told.y, self.goal)


def read(path: Path) -> Line | None:
    """Read a finished line; None where there is none, or none that this version can read."""
    try:
        return Line.from_json(json.loads(path.read_bytes()))
    except (OSError, ValueError):
        return None


def references(
    task: Task, network: str, *, report: Callable[[int, int], None] | None, check: Callable[[], None] | None
) -> list[Network]:
    """The clean models of the gates, from the cache or trained now."""
    kept = References(task=task, network=network)
    return [kept.get(number, report=report, check=check).eval() for number in range(Limits().references)]


def target_of(attack: str, classes: int, seed: int) -> dict[str, Any]:
    """Settings that draw the target class, where an attack has one: else 0 would be right by default everywhere."""
    default = getattr(attack_class(attack)(), "target", None)
    if type(default) is not int:
        return {}
    return {"target": int(torch.randint(classes, (), generator=generator(seed, f"matrix target {attack}")))}


def _largest(scores: Tensor) -> int | None:
    """Where the largest of some scores is; None where several are as large, which names no class."""
    first, second = scores.double().topk(2).values.tolist()
    return int(scores.argmax()) if first > second else None
