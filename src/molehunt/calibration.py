"""Reference populations: how the defenses score models whose truth is known, kept as JSON.

Scores are comparable only where task, network, recipe and the settings of the defense are the same, so a population
records all of them.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from molehunt import strict_json
from molehunt.defenses.contract import Defense
from molehunt.files import write_atomically
from molehunt.findings import Finding, Outcome
from molehunt.runner import configuration
from molehunt.tasks import Task
from molehunt.training.recipes import RECIPES, recipe_for

FORMAT = 1


def statistic(finding: Finding) -> float | None:
    """Return the one number of a finding that is calibrated; None for a pure repair.

    It is the score, or else the largest class score: the maximum over classes lies inside the statistic, so that
    looking at K classes needs no further correction.
    """
    if finding.score is not None:
        return finding.score
    return None if finding.class_scores is None else float(finding.class_scores.max())


def settings(finding: Finding) -> dict[str, Any]:
    """Return what must be equal for two scores of one defense to be comparable.

    That is its `configuration`, whether it had a `stream`, for one that judges the triggers that others find, who
    looked for them (`producers`, see `examination.examine`), and for one that has meta-classifiers, which (`metas`).
    """
    configuration = finding.record.get("configuration", {})
    found: dict[str, Any] = {"configuration": dict(configuration), "stream": finding.input_scores is not None}
    if "producers" in finding.record:
        found["producers"] = sorted(finding.record["producers"])
    if "metas" in finding.record:
        found["metas"] = finding.record["metas"]
    return found


@dataclass(frozen=True, kw_only=True)
class Reference:
    """One reference model and how the defenses scored it.

    Attributes:
        seed: it was trained with; with the recipe enough to make it again.
        scores: raw statistic by defense; None where the defense abstained or failed. Missing is not 0.
        accuracy: clean accuracy, in [0, 1]; None if not measured.
        attack: family of what is hidden in it, such as `badnets`; None for a clean model.

    Raises:
        ValueError: a score that is not finite.
    """

    seed: int
    scores: Mapping[str, float | None] = field(default_factory=dict)
    accuracy: float | None = None
    attack: str | None = None

    def __post_init__(self) -> None:
        for name, score in self.scores.items():
            if score is not None and not math.isfinite(score):
                raise ValueError(f"the {name} score of reference {self.seed} must be finite, got {score}")


@dataclass(frozen=True, kw_only=True)
class Population:
    """Reference models of one task, one network and one recipe, each defense in one configuration.

    Attributes:
        task: name of the task.
        network: name of the network.
        recipe: how the models were trained: a recipe's name, or what `recorded` gives, its name and settings.
        models: the models, clean and known-backdoored ones.
        defenses: by defense, the settings under which it scored them (see `settings`).
        versions: of the programs that trained and scored.
        dtype: number format of the matrix work in scoring.
    """

    task: str
    network: str
    recipe: Any = ""
    models: tuple[Reference, ...] = ()
    defenses: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    dtype: str = "float32"

    @property
    def recipe_name(self) -> str | None:
        """Name of the recipe; None where none is recorded."""
        name = self.recipe.get("name") if isinstance(self.recipe, Mapping) else self.recipe
        return name if isinstance(name, str) and name else None

    @property
    def clean(self) -> tuple[Reference, ...]:
        """The clean models."""
        return tuple(m for m in self.models if m.attack is None)

    @property
    def planted(self) -> tuple[Reference, ...]:
        """The models with a known backdoor."""
        return tuple(m for m in self.models if m.attack is not None)

    def column(self, defense: str) -> list[float]:
        """Scores of one defense on the clean models that have one."""
        return [s for m in self.clean if (s := m.scores.get(defense)) is not None]

    def table(self, defenses: Sequence[str], *, planted: bool = False) -> list[list[float]]:
        """Scores of several defenses, one row per clean (or per planted) model that has all of them."""
        rows = [[m.scores.get(d) for d in defenses] for m in (self.planted if planted else self.clean)]
        return [[s for s in row if s is not None] for row in rows if None not in row]

    def families(self, defenses: Sequence[str]) -> dict[str, list[list[float]]]:
        """Rows of `table` for the planted models, by the family of attacks; only families that have a row."""
        names = sorted({str(m.attack) for m in self.planted})
        parts = {name: replace(self, models=tuple(m for m in self.planted if m.attack == name)) for name in names}
        return {name: rows for name, part in parts.items() if (rows := part.table(defenses, planted=True))}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, document: Any) -> "Population":
        """Make a population again from what `to_json` gave.

        Raises:
            ValueError: another format, other fields, or wrong types.
        """
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError(f"expected a reference population of format {FORMAT}")
        expected = {"format", *(f.name for f in fields(cls))}
        if document.keys() != expected:
            raise ValueError(f"a population has the fields {sorted(expected)}, got {sorted(document)}")
        try:
            models = tuple(
                Reference(
                    seed=int(row["seed"]),
                    attack=None if row["attack"] is None else str(row["attack"]),
                    accuracy=None if row["accuracy"] is None else float(row["accuracy"]),
                    scores={str(k): None if v is None else float(v) for k, v in row["scores"].items()},
                )
                for row in document["models"]
            )
            return cls(
                task=str(document["task"]),
                network=str(document["network"]),
                recipe=document["recipe"],
                models=models,
                defenses={str(k): dict(v) for k, v in document["defenses"].items()},
                versions={str(k): str(v) for k, v in document["versions"].items()},
                dtype=str(document["dtype"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a reference population: {type(error).__name__}: {error}") from None


def population(
    rows: Iterable[Mapping[str, Outcome]],
    *,
    task: str,
    network: str,
    recipe: Any = "",
    models: Sequence[Reference] | None = None,
) -> Population:
    """Collect a population from what the defenses answered about every reference model.

    Args:
        rows: per model its outcomes by defense.
        task: name of the task.
        network: name of the network.
        recipe: how the models were trained: a recipe's name, or what `recorded` gives, its name and settings.
        models: what is known of each model (seed, accuracy, attack), in the order of the rows; their scores are filled
            in. By default all are clean and numbered from 0.

    Raises:
        ValueError: another number of models than rows, or a defense ran in different settings or number formats.
    """
    listed = list(rows)
    known = list(models) if models is not None else [Reference(seed=i) for i in range(len(listed))]
    if len(known) != len(listed):
        raise ValueError(f"expected one row per model, got {len(listed)} rows for {len(known)} models")
    scored: list[Reference] = []
    defenses: dict[str, dict[str, Any]] = {}
    versions: dict[str, str] = {}
    dtypes: set[str] = set()
    for model, row in zip(known, listed, strict=True):
        scores: dict[str, float | None] = dict(model.scores)
        for name, outcome in row.items():
            scores[name] = statistic(outcome) if isinstance(outcome, Finding) else None
            if not isinstance(outcome, Finding) or scores[name] is None:
                continue
            if defenses.setdefault(name, settings(outcome)) != settings(outcome):
                raise ValueError(f"{name} scored the reference models in different settings")
            versions.update(outcome.record.get("versions", {}))
            dtypes.add(outcome.record.get("dtype", "float32"))
        scored.append(replace(model, scores=scores))
    if len(dtypes) > 1:
        raise ValueError(f"the reference models were scored in different number formats: {sorted(dtypes)}")
    return Population(
        task=task,
        network=network,
        recipe=recipe,
        models=tuple(scored),
        defenses=defenses,
        versions=versions,
        dtype=dtypes.pop() if dtypes else "float32",
    )


def recorded(name: str, task: Task) -> dict[str, Any]:
    """Return what a population keeps of a recipe: `name`, and its `settings` as they are today.

    Raises:
        ValueError: there is no such recipe.
    """
    return {"name": name, "settings": recipe_for(name, task).to_json()}


def recipe_remark(population: Population, recipe: str | None, task: Task | None = None) -> str | None:
    """Say in a sentence why a suspect's scores may differ from the references' by its recipe alone.

    Args:
        population: the references.
        recipe: the name that came with the suspect; None where nothing did.
        task: of the suspect; with it, settings that changed under an unchanged name are noticed where they are kept.

    Returns:
        The sentence, or None where the suspect names the recipe of the references. A name is a claim of whoever
        handed the model in: nothing here can tell whether it is true.
    """
    known = population.recipe_name
    if known is None:
        named = "is unknown" if recipe is None else f"is called {recipe!r}"
        return (
            f"Recipe of the reference models unknown: theirs was not recorded, this model's {named}. A model that was "
            "trained otherwise than they were may score higher or lower by that alone."
        )
    if recipe is None:
        return (
            f"Recipe unknown: nothing says how this model was trained. The reference models were trained by {known!r}; "
            "a model that was trained otherwise may score higher or lower by that alone."
        )
    if recipe != known:
        return (
            f"No calibration for the recipe of this model: it names {recipe!r}, the reference models were trained by "
            f"{known!r}. It may score higher or lower by that alone."
        )
    settings = population.recipe.get("settings") if isinstance(population.recipe, Mapping) else None
    if task is None or settings is None or known not in RECIPES or settings == recipe_for(known, task).to_json():
        return None
    return (
        f"The recipe {known!r} has other settings today than when the reference models were trained: a model of today "
        "may score higher or lower by that alone."
    )


def dtype_remark(population: Population, dtypes: Iterable[str]) -> str | None:
    """Say in a sentence that scores were computed in another number format than the references'; None if not.

    Args:
        population: the references.
        dtypes: number formats in which the suspect's scores were computed, such as "bfloat16".
    """
    others = sorted(set(dtypes) - {population.dtype})
    if not others:
        return None
    return (
        f"Another number format: the defenses worked in {' and '.join(others)} here, on the reference models in "
        f"{population.dtype}. Scores shift a little by that alone, so a p-value near a threshold may change."
    )


def save(population: Population, path: Path) -> None:
    """Write a population as JSON; either the whole new file is there afterwards or the old one."""
    write_atomically(path, [json.dumps(population.to_json(), indent=1, allow_nan=False).encode() + b"\n"])


def digest(population: Population) -> str:
    """SHA-256 of a population, in hexadecimal: of its JSON with sorted keys, so however its file is laid out."""
    text = json.dumps(population.to_json(), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def load(path: Path) -> Population:
    """Read what `save` wrote.

    Raises:
        ValueError: the file is no such population.
    """
    return Population.from_json(strict_json.loads(path.read_bytes(), limit=2**26))


def shipped(task: str, network: str, defenses: Mapping[str, Defense] | None = None) -> Population | None:
    """Return the population that comes with the package for a task and a network; None if there is none.

    Args:
        task: name of the task.
        network: name of the network.
        defenses: those that will be asked, by name. If one of them has other settings than when it scored the shipped
            models, its score could not be compared, so the answer is None: score references anew. So it is where none
            of them has scored the shipped models.
    """
    path = files("molehunt").joinpath("populations", f"{task}-{network}.json".replace(":", "-"))
    if not path.is_file():
        return None
    found = Population.from_json(strict_json.loads(path.read_bytes(), limit=2**26))
    for name, defense in (defenses or {}).items():
        if name in found.defenses and configuration(defense) != found.defenses[name]["configuration"]:
            return None
    if defenses and not defenses.keys() & found.defenses.keys():
        return None
    return found
