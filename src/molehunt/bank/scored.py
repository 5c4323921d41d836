"""What the defenses answered about one model of a bank, and what of it still holds."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

import molehunt
from molehunt import strict_json
from molehunt.bank.code import digest
from molehunt.bank.rows import Row
from molehunt.defenses import DEFENSES, Defense
from molehunt.runner import configuration
from molehunt.suspect import Access

FINDERS = ("abs", "neural_cleanse")
"""Built-in defenses that look for triggers; what they find others judge."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What the defenses answered about one model.

    Attributes:
        name: of the model.
        weights: SHA-256 of its weights.
        asked: by defense that was asked, its configuration.
        code: by defense that was asked, the SHA-256 of its code (`bank.code.digest`).
        scores: raw statistic by defense that answered; None for a pure repair.
        settings: by defense with a score, what must be equal for scores to be comparable.
        repairs: by defense that repaired the model, `accuracy` and, for a planted model, `asr`, on the public
            validation split: before and after, in [0, 1]; and `curve`, where the defense measured one: accuracy on its
            held-out images when 0, 1, 2 ... channels are pruned.
        abstained: by defense, why it had no opinion.
        failed: by defense, what went wrong. It is no score: such a model is scored again.
        costs: by defense that answered, seconds, images forward and backward, peak memory in bytes.
        dtype: number format of the matrix work; None where nothing answered.
        threads: torch threads.
        versions: of the programs.
    """

    name: str
    weights: str
    asked: dict[str, Any]
    code: dict[str, str]
    scores: dict[str, float | None]
    settings: dict[str, Any]
    repairs: dict[str, dict[str, list[float]]]
    abstained: dict[str, str]
    failed: dict[str, str]
    costs: dict[str, dict[str, Any]]
    dtype: str | None
    threads: int
    versions: dict[str, str]


def read_scored(path: Path) -> Scored | None:
    """Return what was answered about one model; None if there is no file, or one of an older format.

    Raises:
        ValueError: the file holds no scores.
    """
    if not path.exists():
        return None
    kept = strict_json.loads(path.read_bytes())
    if not isinstance(kept, dict) or not {"name", "weights", "scores"} <= kept.keys():
        raise ValueError(f"{path} holds no scores of a model; delete it to score the model again")
    return Scored(**kept) if kept.keys() == {f.name for f in fields(Scored)} else None


def codes(defenses: Mapping[str, Defense]) -> dict[str, str]:
    """SHA-256 of the code of every defense, in hexadecimal."""
    return {name: digest(type(defense)) for name, defense in defenses.items()}


def may_search(defenses: Iterable[str]) -> set[str]:
    """Names of those that may look for triggers: the built-in finders, and whoever is not built in."""
    return set(defenses) - (DEFENSES.keys() - set(FINDERS))


def judges(defense: Defense) -> bool:
    """Whether what a defense says may depend on the triggers that others found."""
    return any(Access.CANDIDATES in need for need in defense.needs)


def lacking(kept: Scored | None, row: Row, asked: Mapping[str, Defense], metas: str | None) -> set[str]:
    """Names of those whose answer is not there, or of other weights, settings, code, threads or programs.

    Who judges the triggers that others find is among them where anybody is that may look for triggers, for then there
    may be other triggers.

    Args:
        kept: what is on disk; None for nothing.
        row: of the model today.
        asked: who is asked about it today.
        metas: SHA-256 of the meta-classifiers that are granted; None where none are.
    """
    # Another release may score otherwise, and a file of scores has one number for each program.
    today = {"molehunt": molehunt.__version__, "torch": torch.__version__}
    if (
        kept is None
        or kept.weights != row.weights
        or kept.threads != torch.get_num_threads()
        or any(kept.versions.get(name, text) != text for name, text in today.items())
    ):
        return set(asked)
    # Through JSON, as the file went: a tuple comes back as a list.
    told = json.loads(json.dumps({name: configuration(defense) for name, defense in asked.items()}))
    code = codes(asked)
    missing = {
        name
        for name, defense in asked.items()
        if kept.asked.get(name) != told[name]
        or kept.code.get(name) != code[name]
        or name in kept.failed
        or _other_metas(kept, name, defense, metas)
    }
    # Who had no opinion then and is not asked now changes nothing.
    then = may_search([name for name in kept.asked if name not in kept.abstained or name in asked])
    if missing & may_search(asked) or then != may_search(asked):
        missing |= {name for name, defense in asked.items() if judges(defense)}
    return missing


def _other_metas(kept: Scored, name: str, defense: Defense, metas: str | None) -> bool:
    """Whether a score came of other meta-classifiers than are granted now, or silence of none being granted then."""
    if not any(Access.METAS in need for need in defense.needs):
        return False
    if name in kept.abstained:
        return metas is not None
    return name in kept.settings and kept.settings[name].get("metas") != metas


_BY_NAME = ("asked", "code", "scores", "settings", "repairs", "abstained", "failed", "costs")
"""Fields of `Scored` that have an entry per defense."""


def restricted(kept: Scored, asked: Mapping[str, Defense]) -> Scored:
    """What is known of a model without what others said than those that are asked."""
    parts: dict[str, Any] = {
        part: {name: value for name, value in getattr(kept, part).items() if name in asked} for part in _BY_NAME
    }
    return replace(kept, **parts)


def renewed(kept: Scored | None, fresh: Scored, asked: Mapping[str, Defense]) -> Scored:
    """What is known of a model once those that were lacking have answered: beside it what the others said before.

    Args:
        kept: what was on disk; None for nothing.
        fresh: what was answered now.
        asked: who was to be asked; what others said is dropped.

    Raises:
        ValueError: both were computed in different number formats.
    """
    if kept is None or not set(asked) - fresh.asked.keys():
        return fresh
    if None not in (kept.dtype, fresh.dtype) and kept.dtype != fresh.dtype:
        raise ValueError(
            f"{kept.name} was scored in {kept.dtype}, and now in {fresh.dtype}; delete its scores to start again"
        )
    parts: dict[str, Any] = {}
    for part in _BY_NAME:
        before, now = getattr(kept, part), getattr(fresh, part)
        said = {name: (now if name in fresh.asked else before) for name in asked}
        # In the order in which they are asked, whoever answered when.
        parts[part] = {name: said[name][name] for name in asked if name in said[name]}
    versions = {**kept.versions, **fresh.versions}
    return replace(fresh, **parts, versions=versions, dtype=fresh.dtype or kept.dtype)
