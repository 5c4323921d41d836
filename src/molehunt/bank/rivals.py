"""What the built-in defenses made of the same models, for a defense that wants to know where it stands."""

from collections.abc import Sequence
from pathlib import Path

import torch

from molehunt.bank.code import place_of
from molehunt.bank.roster import Entry
from molehunt.bank.scores import answerable, kept, population, with_finders
from molehunt.defenses import DEFENSES, SCORELESS
from molehunt.testing import auc


def aucs(listed: Sequence[Entry], folder: Path, *, but: str) -> dict[str, float | None]:
    """Return the AUC of the built-in defenses from scores that are saved already; nothing is run.

    Args:
        listed: the models.
        folder: of their bank.
        but: a defense that is left out. So are pure repairs, which have no score, and those that need evidence which
            no bank has, such as the training set.

    Returns:
        By name the AUC in [0, 1]; None where a model was not scored by the code of today as it is now, with as many
        threads, or where no model of a kind has a score. Models on which a defense abstained count for nothing.

    Raises:
        ValueError: a file holds no scores, or a defense answered in different settings.
    """
    found: dict[str, float | None] = {}
    for name, kind in DEFENSES.items():
        if name == but or name in SCORELESS or not answerable(listed[0], kind()):
            continue
        found[name] = None
        done = kept(listed, folder, with_finders({name: kind()}), place=place_of(name, kind))
        if len(done) == len(listed) and any(name in scored.settings for scored in done.values()):
            scores = population(listed, folder, [done[entry.name] for entry in listed])
            clean, planted = scores.column(name), [row[0] for row in scores.table([name], planted=True)]
            if clean and planted:
                both = torch.tensor([*clean, *planted], dtype=torch.float64)
                found[name] = auc(both, torch.arange(len(both)) >= len(clean))
    return found
