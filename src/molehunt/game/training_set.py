"""A training set that is handed over on the data board: rows of the public training split, some of them altered.

Every team hands over equally many rows, as many as it may alter; those that it leaves alone are listed as they are. So
honest and backdoored sets of a task are files of one size, and nothing outside tells how much was altered.

Pixels are 8-bit numbers, as in the public data. Float32 would be four times the size and would give every altered row
away: its values would lie between the 256 levels on which those of all other rows lie. The price is that a change of
less than half a level, 1/510, vanishes. No value can be out of range or not finite, which needs no check then.
"""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from molehunt.attacks import Poisoned
from molehunt.files import Refused
from molehunt.game.rules import Limits
from molehunt.strict_json import show
from molehunt.tasks import Images, Task
from molehunt.tensor_file import Entry, encode, read_entry, read_header
from molehunt.tensor_file import Limits as FileLimits

HEADER = 2**10
"""Largest header in bytes; it lists three tensors."""
DTYPES = {"rows": "I32", "x": "U8", "y": "I32"}


class TrainingSetError(Refused):
    """A handed-over training set is refused; the message says what is wrong with it and, where it helps, what to do."""


class Changes(NamedTuple):
    """What a set changes in the public training split.

    Attributes:
        altered: rows that differ in pixels or label.
        relabeled: rows among them that have another label.
    """

    altered: int
    relabeled: int


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingSet:
    """Rows of the public training split with the pixels and labels that they are to have.

    Attributes:
        rows: int32 (n,), which rows, in rising order and each once.
        x: uint8 (n, C, H, W), their pixels: 255 is 1.
        y: int32 (n,), their labels.
    """

    rows: Tensor
    x: Tensor
    y: Tensor

    @classmethod
    def of(
        cls, poisoned: Poisoned | None, clean: Images, rng: torch.Generator, limits: Limits | None = None
    ) -> "TrainingSet":
        """Make the set that a team hands over.

        Args:
            poisoned: what the attack made of the clean split; None for an honest set.
            clean: the public training split, as the task loads it.
            rng: draws which unaltered rows fill the list.
            limits: of the round.

        Raises:
            ValueError: more rows are altered than the rules allow, a row is altered that the attack did not name,
                pixels leave [0, 1], or nothing is left of the trigger in 8 bits.
        """
        count, allowed = len(clean.y), (limits or Limits()).rows(len(clean.y))
        if poisoned is None:
            altered, x, y = torch.zeros(count, dtype=torch.bool), clean.x, clean.y
        else:
            altered, (x, y) = poisoned.altered, poisoned.stamped()
            _check_attack(altered, x, y, clean, allowed)
        rest = (~altered).nonzero().squeeze(1)
        filling = rest[torch.randperm(len(rest), generator=rng)[: allowed - int(altered.sum())]]
        rows = torch.cat((altered.nonzero().squeeze(1), filling)).sort().values
        return cls(rows=rows.to(torch.int32), x=_levels(x[rows]), y=y[rows].to(torch.int32))

    def encode(self) -> Iterator[bytes]:
        """Write the set in its only spelling, piece by piece."""
        return encode({"rows": self.rows, "x": self.x, "y": self.y})

    @property
    def digest(self) -> str:
        """SHA-256 of the file, in hexadecimal: the name that the set goes by."""
        sha = hashlib.sha256()
        for piece in self.encode():
            sha.update(piece)
        return sha.hexdigest()

    def changes(self, clean: Images) -> Changes:
        """Compare the set with the public training split; for the host and the team, never for a defense."""
        rows = self.rows.long()
        relabeled = self.y != clean.y[rows]
        moved = (self.x != _levels(clean.x[rows])).flatten(1).any(1)
        return Changes(altered=int((moved | relabeled).sum()), relabeled=int(relabeled.sum()))

    def delivered(self, clean: Images, rng: torch.Generator) -> Images:
        """Merge the rows into the public training split and shuffle the whole: what is trained on, and may be seen.

        Args:
            clean: the public training split, as the task loads it.
            rng: of the host; its order is secret, so that no place tells which rows were handed over.

        Returns:
            As many images as the split has; nothing says which they are.
        """
        order = torch.randperm(len(clean.y), generator=rng)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        x, y = clean.x[order], clean.y[order]  # copies: the split itself stays as it is
        at = place[self.rows.long()]
        x[at] = self.x.to(torch.float32).div_(255)  # as the task reads its own bytes
        y[at] = self.y.long()
        return Images(x, y)


def read(source: BinaryIO | bytes, size: int, task: Task, limits: Limits | None = None) -> TrainingSet:
    """Read a stranger's training set: its header first, and no number before everything else fits.

    Args:
        source: the file, positioned at its first byte, or its bytes.
        size: its length in bytes.
        task: what the set is for.
        limits: of the round.

    Raises:
        TrainingSetError: other tensors, dtypes or shapes than the rules ask for; rows that are not there, out of order
            or listed twice; a label that is no class.
        CheckpointError: it is no safetensors file, or one that does not describe exactly its bytes.
    """
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    count = len(task.load("train").y)
    allowed = (limits or Limits()).rows(count)
    shapes = {"rows": (allowed,), "x": (allowed, *task.shape), "y": (allowed,)}
    numbers = allowed * (8 + task.shape[0] * task.shape[1] * task.shape[2])
    entries, begin = read_header(
        stream, size, limits=FileLimits(file=8 + HEADER + numbers, header=HEADER, tensors=3, rank=4)
    )
    _check_header(entries, shapes, task, limits or Limits(), count)
    rows, y, x = (read_entry(stream, begin, name, entries[name], DTYPES[name]) for name in ("rows", "y", "x"))
    if int(rows.min()) < 0 or int(rows.max()) >= count:
        wrong = rows[(rows < 0) | (rows >= count)][0]
        raise TrainingSetError(f"row {int(wrong)} does not exist; the training split of {task.name} has {count} rows")
    steps = rows[1:] - rows[:-1]
    if bool((steps <= 0).any()):
        at = int((steps <= 0).nonzero()[0])
        kind = "is listed twice" if int(steps[at]) == 0 else f"comes after row {int(rows[at])}"
        raise TrainingSetError(f"row {int(rows[at + 1])} {kind}; rows are listed in rising order, each once")
    if int(y.min()) < 0 or int(y.max()) >= task.num_classes:
        at = int(((y < 0) | (y >= task.num_classes)).nonzero()[0])
        raise TrainingSetError(
            f"row {int(rows[at])} has the label {int(y[at])}; {task.name} has the classes 0 to {task.num_classes - 1}"
        )
    return TrainingSet(rows=rows, x=x, y=y)


def _check_header(
    entries: dict[str, Entry], shapes: dict[str, tuple[int, ...]], task: Task, limits: Limits, count: int
) -> None:
    if entries.keys() != shapes.keys():
        raise TrainingSetError(f"it holds {show(sorted(entries))}; expected exactly rows, x and y")
    for name, dtype in DTYPES.items():
        if entries[name].dtype != dtype:
            what = "; pixels are handed over as 8-bit numbers" if name == "x" else ""
            raise TrainingSetError(f"{name} has dtype {entries[name].dtype}, expected {dtype}{what}")
    given = entries["rows"].shape
    if len(given) == 1 and given != shapes["rows"]:
        raise TrainingSetError(
            f"it lists {given[0]} rows, expected {shapes['rows'][0]}: {limits.altered:.0%} of the {count} training "
            f"rows of {task.name} may be altered, and every set lists that many"
        )
    for name, shape in shapes.items():
        if entries[name].shape != shape:
            raise TrainingSetError(f"{name} has shape {show(list(entries[name].shape))}, expected {list(shape)}")


def _check_attack(altered: Tensor, x: Tensor, y: Tensor, clean: Images, allowed: int) -> None:
    """Refuse what the host would refuse, or what could not work, in the words of the attack."""
    count = int(altered.sum())
    if count > allowed:
        raise ValueError(
            f"the attack alters {count} of {len(altered)} training rows, covers included; on the data board at most "
            f"{allowed} may be altered: lower its rates"
        )
    if x.shape != clean.x.shape or not (float(x.min()) >= 0.0 and float(x.max()) <= 1.0):  # a NaN is not in there
        raise ValueError(f"the attack makes something other than {tuple(clean.x.shape)} pixels in [0, 1]")
    moved = (_levels(x) != _levels(clean.x)).flatten(1).any(1)
    if bool(((moved | (y != clean.y)) & ~altered).any()):
        raise ValueError("the attack changes rows that it does not name as altered")
    if not bool(moved.any()):
        raise ValueError(
            "nothing is left of the trigger in 8 bits: it changes no pixel by more than 1/510; make it stronger"
        )


def _levels(x: Tensor) -> Tensor:
    """Round pixels in [0, 1] to the 256 levels of public data, uint8."""
    return (x * 255).round_().to(torch.uint8)
