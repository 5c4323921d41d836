"""The host's gates at home: a submission measured on the public validation split, against references trained here.

A submission of the data board is trained here first, as the host will do it with another seed.

The host measures the same gates by the same functions, with references of its own and on hidden images, so what passes
here by a margin passes there.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from molehunt import checkpoints
from molehunt.datasets import cache
from molehunt.files import write_atomically
from molehunt.game.answers import Logits, accuracy, measure
from molehunt.game.attacker import Report, train_model
from molehunt.game.gate import Gate
from molehunt.game.gates import ReferenceAccuracy, all_gates
from molehunt.game.rules import Limits
from molehunt.game.seal import Sealed
from molehunt.game.training_set import TrainingSet
from molehunt.networks import Network
from molehunt.runner import generator
from molehunt.tasks import Images, Task
from molehunt.tensor_file import CheckpointError, encode
from molehunt.training import recipe_for


@dataclass(frozen=True, kw_only=True)
class References:
    """Where the clean reference models of one task and network are kept, and how they are made.

    They are trained once per user and kept in the cache. Equal task, network and recipe name the same models: the
    i-th is trained from seed i.

    Attributes:
        task: what they are for.
        network: a key of `NETWORKS`; the recipe is its default.
    """

    task: Task
    network: str

    @property
    def folder(self) -> Path:
        """The folder in the cache."""
        told = json.dumps([asdict(self.task), recipe_for(self.network, self.task).to_json()], sort_keys=True)
        name = f"{self.task.name.partition(':')[0]}-{self.network}-{hashlib.sha256(told.encode()).hexdigest()[:16]}"
        return cache.root() / "references" / name

    def missing(self, count: int) -> tuple[int, ...]:
        """Numbers of those among the first so many that have to be trained first."""
        return tuple(i for i in range(count) if self._read(i) is None)

    def get(self, number: int, *, report: Report | None = None, check: Callable[[], None] | None = None) -> Network:
        """Return a reference model, from the cache or trained now.

        Args:
            number: which one, from 0.
            report: called with (images done, images in all).
            check: called often; raises to stop. The training goes on at the next call.

        Raises:
            DataError: the data could not be had, or the cache cannot be written to.
        """
        return _once(
            self._path(number),
            self.task,
            self.network,
            None,
            rng=generator(number, f"reference {self.task.name} {self.network}"),
            report=report,
            check=check,
        )

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}.safetensors"

    def _read(self, number: int) -> Network | None:
        return _read(self._path(number), self.task, self.network)


@dataclass(frozen=True, kw_only=True, eq=False)
class Judged:
    """The model that the host would train from a handed-over training set, but for the host's secret seed.

    It is trained once and kept in the cache by the content of the set, the task and the network.

    Attributes:
        task: what it is for.
        network: a key of `NETWORKS`; the recipe is its default.
        training: the set.
    """

    task: Task
    network: str
    training: TrainingSet

    @cached_property
    def seen(self) -> Images:
        """The training split with the set merged into it, shuffled: what is trained on, and what a defense sees."""
        return self.training.delivered(self.task.load("train"), generator(0, f"shuffle {self.training.digest}"))

    @property
    def path(self) -> Path:
        """The file in the cache."""
        references = References(task=self.task, network=self.network)
        return cache.root() / "judged" / references.folder.name / f"{self.training.digest}.safetensors"

    @property
    def missing(self) -> bool:
        """Whether it has to be trained first."""
        return _read(self.path, self.task, self.network) is None

    def get(self, *, report: Report | None = None, check: Callable[[], None] | None = None) -> Network:
        """Return the model, from the cache or trained now; arguments and errors as in `References.get`."""
        rng = generator(0, f"judged {self.training.digest}")
        return _once(self.path, self.task, self.network, self.seen, rng=rng, report=report, check=check)


def poison_budget(training: TrainingSet, clean: Images, limits: Limits | None = None) -> Gate:
    """Say how much of the training split a set alters, and how many labels; a set over the limit is never read.

    Args:
        training: the set.
        clean: the public training split.
        limits: of the round.
    """
    limits, changes, count = limits or Limits(), training.changes(clean), len(clean.y)
    return Gate(
        name="altered rows",
        passed=changes.altered <= limits.rows(count),
        measured=changes.altered / count,
        limit=limits.rows(count) / count,
        at_least=False,
        message=f"{changes.altered} of {count} training rows differ, {changes.relabeled} of them in their label",
    )


def _once(
    path: Path,
    task: Task,
    network: str,
    images: Images | None,
    *,
    rng: torch.Generator,
    report: Report | None,
    check: Callable[[], None] | None,
) -> Network:
    """Return the model that is kept in a file, or train it now and keep it."""
    if (kept := _read(path, task, network)) is not None:
        return kept
    # The lock makes a second process wait for this model instead of training it too; others can be trained meanwhile.
    with cache.lock(f"model-{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"):
        if (kept := _read(path, task, network)) is not None:
            return kept
        path.parent.mkdir(parents=True, exist_ok=True)
        state = path.with_suffix(".training")
        model, _ = train_model(
            task,
            network,
            recipe_for(network, task),
            None,
            rng=rng,
            images=images,
            report=report,
            checkpoint=state,
            check=check,
        )
        write_atomically(path, encode(checkpoints.canonical(model.state_dict())))
        state.unlink(missing_ok=True)
        return model


def _read(path: Path, task: Task, network: str) -> Network | None:
    if not path.exists():
        return None
    try:
        return checkpoints.load(path, network, task.shape, task.num_classes)
    except CheckpointError:
        return None  # damaged: it can be trained again


def check(
    model: Logits,
    sealed: Sealed,
    references: Sequence[Logits],
    images: Images,
    *,
    shape: tuple[int, int, int],
    limits: Limits | None = None,
) -> tuple[Gate, ...]:
    """Measure every gate that applies to a submission.

    Args:
        model: the submitted model.
        sealed: its opened seal.
        references: clean models of the same task and network.
        images: clean labeled images: the public validation split.
        shape: (C, H, W) of the pictures.
        limits: of the round.

    Raises:
        ValueError: too few references for a backdoor, or none.
    """
    answers = measure(model, images, sealed.trigger)
    plain = [measure(reference, images) for reference in references]
    standard = ReferenceAccuracy.of([accuracy(a.plain, a.y) for a in plain], len(images.y))
    if sealed.trigger is None:
        return all_gates(answers, standard, limits=limits)
    stamped = [
        replace(a, stamped=measure(reference, images, sealed.trigger).stamped)
        for a, reference in zip(plain, references, strict=True)
    ]
    return all_gates(
        answers,
        standard,
        trigger=sealed.trigger,
        target=sealed.target,
        shape=shape,
        references=stamped,
        limits=limits,
    )
