"""What becomes of handed-over training sets: the models that are judged, and what a defense gets to see."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from molehunt.engine import Engine
from molehunt.game import entries
from molehunt.game.entries import Settings
from molehunt.game.submission import Submission
from molehunt.runner import generator
from molehunt.tasks import Images, Task


@dataclass(frozen=True, kw_only=True, eq=False)
class Delivery:
    """The training sets of a game on the data board; on the weights board there are none.

    Attributes:
        settings: of the game.
        folder: of the game.
        task: of the game.
    """

    settings: Settings
    folder: Path
    task: Task

    def train(self, submissions: Sequence[Submission], engine: Engine) -> Iterator[Submission]:
        """Train the model that is judged from every set; yields the submissions with its weights, in their order.

        Raises:
            ValueError: a submission is of the weights board.
        """
        handed = [self._handed(submission) for submission in submissions]
        for submission, digest in zip(submissions, engine.map(entries.train_handed, handed), strict=True):
            yield replace(submission, weights=digest)

    def seen(self, submission: Submission) -> Images | None:
        """Return the set as a defense sees it; None on the weights board.

        It is merged into the public one and shuffled, so that no defense learns which rows were handed over.
        """
        return None if submission.training is None else self._handed(submission).images()

    def clean(self, purpose: str) -> Images | None:
        """Return the set on which a clean reference was trained, in an order of its own; None on the weights board.

        Args:
            purpose: what it is for; decides the order.
        """
        if self.settings.board == "weights":
            return None
        x, y = self.task.load("train")
        order = torch.randperm(len(y), generator=generator(self.settings.seed_for(f"shuffle {purpose}"), "shuffle"))
        return Images(x[order], y[order])

    def _handed(self, submission: Submission) -> entries.Handed:
        if submission.training is None:
            raise ValueError(f"submission {submission.id} holds no training set")
        return entries.Handed(
            settings=self.settings, folder=self.folder, id=submission.id, training=submission.training
        )
