"""What the built-in defenses made of the same models, for a defense that wants to know where it stands."""

from collections.abc import Sequence
from pathlib import Path

import torch

from molehunt.bank.code import place_of
from molehunt.bank.roster import Entry
from molehunt.bank.scores import REPAIRS, population, read_scored
from molehunt.defenses import DEFENSES
from molehunt.testing import auc


def aucs(listed: Sequence[Entry], folder: Path, *, but: str) -> dict[str, float | None]:
    """Return the AUC of the built-in defenses from scores that are saved already; nothing is run.

    Args:
        listed: the models.
        folder: of their bank.
        but: a defense that is left out. Pure repairs are too: they have no score.

    Returns:
        By name the AUC in [0, 1]; None where a model has no score by the code of today, or none of a kind has.

    Raises:
        ValueError: a file holds no scores, or a defense answered in different settings.
    """
    found: dict[str, float | None] = {}
    for name, kind in DEFENSES.items():
        if name == but or name in REPAIRS:
            continue
        found[name] = None
        kept = [read_scored(folder / place_of(name, kind) / f"{entry.name}.json") for entry in listed]
        known = [scored for scored in kept if scored is not None and name in scored.settings]
        if len(known) == len(listed):
            scores = population(listed, folder, known)
            clean, planted = scores.column(name), [row[0] for row in scores.table([name], planted=True)]
            if clean and planted:
                both = torch.tensor([*clean, *planted], dtype=torch.float64)
                found[name] = auc(both, torch.arange(len(both)) >= len(clean))
    return found
