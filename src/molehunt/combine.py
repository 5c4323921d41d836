"""From many outcomes to one verdict: calibrated fusion, the likeliest class, the best trigger, a measured repair.

It claims no more than the reference models support, and says when it cannot tell. What becomes of scores is `fusion`'s.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from molehunt.calibration import Population, dtype_remark, recipe_remark, settings, statistic
from molehunt.conformal import INDICATIVE, indicative, posterior
from molehunt.defenses._statistics import median, spread
from molehunt.findings import Abstention, Failure, Finding, Outcome, Verdict
from molehunt.fusion import fuse, uncovered
from molehunt.repair import Recovered, choose, success
from molehunt.suspect import Suspect
from molehunt.tasks import Images

UNIFORM = 0.02
"""Share of q that is spread evenly over all classes, so that no class is ever ruled out."""
INDICATIVE_RANGE = (0.21, 0.79)
"""Without reference models p stays in here: within what the scanner calls "could not tell"."""


@dataclass(kw_only=True)
class _Evidence:
    """What the scores say, before it becomes a verdict."""

    p: float
    p_values: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def verdict(
    answers: Iterable[Outcome],
    population: Population | None = None,
    *,
    classes: int,
    prior: float = 0.5,
    suspect: Suspect | None = None,
    held_out: Images | None = None,
    recipe: str | None = "",
) -> Verdict:
    """Fuse the outcomes of all defenses on one model into one verdict.

    p is the posterior probability (`conformal.posterior`) given the combined conformal p-value of all defenses that
    have reference scores in the same settings. Abstentions, failures and defenses without comparable references are
    left out and named in `details["skipped"]`; they are never read as "clean". If nothing is left, p is the prior
    and `details["could_not_tell"]` is true. Without any reference population Neural Cleanse's index alone is
    compared with simulated clean models; then `details["indicative"]` says so and p stays within `INDICATIVE_RANGE`.

    q is `class_probabilities`. The trigger is, among those for the likeliest class (among all where there is none for
    it), the one with the largest held-out success rate minus half its weight. A repair is taken if p is at least
    `REPAIR_FROM` and it loses at most `DROP` of clean accuracy on the held-out images; among several the one under
    which the recovered trigger that still works best works least.

    The verdict does not depend on the order of the outcomes.

    Args:
        answers: what the defenses answered, one outcome each.
        classes: K.
        population: reference models of the suspect's task, network and recipe, without the suspect; None if there are
            none.
        prior: share of backdoored models among those that are asked about, in (0, 1).
        suspect: the model, for measuring candidates and repairs; without it both are taken on trust, and said.
        held_out: clean labeled images that no defense has seen.
        recipe: name of the recipe by which the model says it was trained; None where nothing says so, which the
            verdict then says. By default recipes are not compared.

    Returns:
        The verdict. `details` hold: `prior`, `could_not_tell`, `combined_p_value`, `references` (their counts),
        `skipped` (reason by defense), `candidates` (one row each), `repair` (what was done, accuracy before and
        after), `calibration` (recipe and number formats on both sides), `warnings` (sentences: what keeps suspect and
        references from being alike), and `indicative` where it applies.

    Raises:
        ValueError: a defense that answers twice, class scores of another length, a prior outside (0, 1), or references
            of another task.
    """
    outcomes = tuple(answers)
    names = [o.defense for o in outcomes]
    if len(set(names)) != len(names):
        raise ValueError(f"every defense answers once, got {names}")
    if not 0.0 < prior < 1.0:
        raise ValueError(f"the prior must lie strictly between 0 and 1, got {prior}")
    if population is not None and suspect is not None and population.task != suspect.task.name:
        raise ValueError(f"the references are of task {population.task!r}, the suspect of {suspect.task.name!r}")
    findings = sorted((o for o in outcomes if isinstance(o, Finding)), key=lambda f: f.defense)
    evidence = _weigh(findings, population, prior, classes)
    if population is not None:
        _compare(evidence, findings, population, recipe, suspect)
    evidence.skipped |= {o.defense: _silence(o) for o in outcomes if not isinstance(o, Finding)}
    q = class_probabilities(findings, evidence.p_values, classes)
    recovered = [
        Recovered(
            defense=f.defense,
            trigger=f.trigger,
            target=f.target,
            asr=success(f.trigger, f.target, suspect, held_out, f.sources),
            sources=f.sources,
            handicap=_handicap(f, findings, evidence.p_values),
        )
        for f in findings
        if f.trigger is not None and f.target is not None
    ]
    likeliest = [c for c in recovered if c.target == int(q.argmax())] or recovered
    best = max(likeliest, key=lambda c: (c.merit, c.defense)) if likeliest else None
    repaired, repair = choose(findings, evidence.p, recovered, suspect, held_out)
    return Verdict(
        p=evidence.p,
        q=q,
        trigger=best.trigger if best else None,
        target=best.target if best else None,
        sources=best.sources if best else None,
        repaired=repaired,
        outcomes=outcomes,
        p_values=evidence.p_values,
        details={
            "prior": prior,
            "could_not_tell": not evidence.p_values,
            **evidence.details,
            "skipped": evidence.skipped,
            "warnings": evidence.warnings,
            "candidates": [
                {
                    "defense": c.defense,
                    "target": c.target,
                    "sources": c.sources,
                    "asr": c.asr,
                    "weight": c.weight,
                    "chosen": c is best,
                }
                for c in recovered
            ],
            "repair": repair,
        },
    )


def _handicap(finding: Finding, findings: Sequence[Finding], p_values: Mapping[str, float]) -> float:
    """What a trigger of some classes alone has to make up for.

    Of two triggers that work the one that does so on all classes explains more; unless the search by single classes is
    the one that finds the model remarkable.
    """
    if not finding.sources:
        return 0.0
    others = [p_values.get(f.defense, 1.0) for f in findings if f.trigger is not None and not f.sources]
    return 0.5 if others and p_values.get(finding.defense, 1.0) >= min(others) else 0.0


def class_probabilities(findings: Sequence[Finding], p_values: Mapping[str, float], classes: int) -> Tensor:
    """Return q (K,): softmax of the class-level evidence, mixed with `UNIFORM`; uniform where there is none.

    A defense's class scores are taken in robust standard deviations from their median, cut at 5, and weighted by one
    minus its p-value (by one half where it has none): what is no different on clean models says little about classes.

    Raises:
        ValueError: class scores of another length.
    """
    total = torch.zeros(classes, dtype=torch.float64)
    for finding in findings:
        if finding.class_scores is None:
            continue
        if len(finding.class_scores) != classes:
            raise ValueError(f"{finding.defense}: expected {classes} class scores, got {len(finding.class_scores)}")
        scores = finding.class_scores.double().cpu()
        scale = spread(scores)
        if scale > 0:
            z = ((scores - median(scores)) / scale).clamp(-5.0, 5.0)
            total += (1.0 - p_values.get(finding.defense, 0.5)) * z
    return (1.0 - UNIFORM) * total.softmax(0) + UNIFORM / classes


def _weigh(findings: Sequence[Finding], population: Population | None, prior: float, classes: int) -> _Evidence:
    """Turn raw scores into p, and say on what it rests."""
    evidence = _Evidence(p=prior)
    scored = {f.defense: score for f in findings if (score := statistic(f)) is not None}
    if population is None:
        _weigh_alone(evidence, findings, scored, prior, classes)
        return evidence
    comparable: dict[str, float] = {}
    for finding in findings:
        if finding.defense not in scored:
            continue  # a pure repair has no opinion, and owes none
        if reason := _incomparable(finding, population):
            evidence.skipped[finding.defense] = reason
        else:
            comparable[finding.defense] = scored[finding.defense]
            if fewer := _fewer_looked(finding, population):
                evidence.warnings.append(
                    f"{finding.defense} judged triggers that {fewer[0]} looked for; on the reference models {fewer[1]} "
                    "did, where more is found. So its p-value errs towards a clean model."
                )
    fused = fuse(comparable, population, prior=prior)
    evidence.p, evidence.p_values = fused.p, dict(fused.p_values)
    evidence.skipped |= dict.fromkeys(fused.dropped, "no reference model has a score of this and of all other defenses")
    evidence.details = {
        "combined_p_value": fused.p_value,
        "references": {"clean": fused.clean, "planted": fused.planted},
        "log_odds": {"start": fused.start, "raised": dict(fused.contributions)},
    }
    return evidence


def _compare(
    evidence: _Evidence,
    findings: Sequence[Finding],
    population: Population,
    recipe: str | None,
    suspect: Suspect | None,
) -> None:
    """Say how far the references stand for the suspect: rank means little among models that were made otherwise."""
    counted = [f for f in findings if f.defense in evidence.p_values]
    dtypes = sorted({str(f.record.get("dtype", population.dtype)) for f in counted})
    evidence.details["calibration"] = {
        "recipe": {"suspect": recipe or None, "references": population.recipe_name},
        "dtype": {"suspect": dtypes, "references": population.dtype},
    }
    if not counted:
        return  # where no score was compared, nothing depends on how comparable it would have been
    told = None if recipe == "" else recipe_remark(population, recipe, suspect.task if suspect else None)
    evidence.warnings += [remark for remark in (told, dtype_remark(population, dtypes)) if remark is not None]


def _weigh_alone(
    evidence: _Evidence, findings: Sequence[Finding], scored: Mapping[str, float], prior: float, classes: int
) -> None:
    """Without reference models: Neural Cleanse's index against simulated ones, and no claim beyond "could not tell"."""
    evidence.details = {"combined_p_value": None, "references": {"clean": 0, "planted": 0}, "calibration": None}
    evidence.skipped |= dict.fromkeys(scored, "there are no reference models to compare its score with")
    evidence.warnings.append(
        "No calibration for this network: there are no scores of clean models of this network and task, in these "
        "settings, to compare with."
    )
    norms = {f.defense: f.record.get("configuration", {}).get("norms", "log") for f in findings}
    name = "neural_cleanse"
    if name not in scored or norms[name] != "log" or classes < 3:
        return
    del evidence.skipped[name]
    p_value = indicative(scored[name], classes)
    least, most = INDICATIVE_RANGE
    evidence.p_values[name] = p_value
    evidence.p = min(max(posterior(p_value, INDICATIVE, prior=prior), min(least, prior)), max(most, prior))
    evidence.details |= {
        "combined_p_value": p_value,
        "indicative": "Indicative only: Neural Cleanse's anomaly index was compared with simulated clean models of "
        f"{classes} classes, so p stays between {least} and {most}.",
    }


def _incomparable(finding: Finding, population: Population) -> str | None:
    """Say why a score cannot be compared with the references'; None if it can."""
    if reason := uncovered(finding.defense, population):
        return reason
    here, there = settings(finding), population.defenses[finding.defense]
    if here == there or _fewer_looked(finding, population):
        return None
    if {**here, "producers": None} == {**there, "producers": None}:
        found = [_named(one) for one in (here, there)]
        return f"it judges triggers that {found[0]} looked for; on the reference models {found[1]} did"
    if {**here, "metas": None} == {**there, "metas": None}:
        return "it asked other meta-classifiers than on the reference models"
    return "the reference models were scored in another configuration"


LARGEST = frozenset({"strip", "sentinet"})
"""Built-in defenses whose score is the largest over what they judge: the more have looked, the higher it is."""


def _fewer_looked(finding: Finding, population: Population) -> tuple[str, str] | None:
    """Who looked for the triggers that a defense judges, here and on the references, where some looked there alone.

    Then the references' scores are at least what they would be after the same searches, so a p-value among them is too
    large and never too small: it can be had, and errs towards a clean model. None in all other cases.
    """
    here, there = settings(finding), population.defenses[finding.defense]
    some, all_ = set(here.get("producers", ())), set(there.get("producers", ()))
    same = {**here, "producers": None} == {**there, "producers": None}
    if finding.defense in LARGEST and same and some and some < all_:
        return _named(here), _named(there)
    return None


def _named(one: Mapping[str, Any]) -> str:
    return " and ".join(one.get("producers", ())) or "nobody"


def _silence(outcome: Outcome) -> str:
    """Say why a defense gave no finding."""
    if isinstance(outcome, Failure):
        return f"failed ({outcome.kind}): {outcome.message}"
    return f"abstained: {outcome.reason}" if isinstance(outcome, Abstention) else ""
