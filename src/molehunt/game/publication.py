"""What a finished game says to everybody: the boards, the machine-readable result and the report page."""

import json
import platform
from collections.abc import Iterator
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from molehunt import report
from molehunt.calibration import Population
from molehunt.conformal import posterior
from molehunt.files import write_atomically
from molehunt.findings import Cost, Outcome, Verdict
from molehunt.game import scoreboard
from molehunt.game.baselines import baselines
from molehunt.game.gate import Gate
from molehunt.game.host import Played
from molehunt.game.referee import Judged, Opened
from molehunt.game.removals import Removal
from molehunt.game.scoring import Points, Truth, judge
from molehunt.networks import Network
from molehunt.report import FOUND_AT, Change, GameReport, GateView, Pictures, RemovalView, Row, SubmissionView
from molehunt.triggers import Target

SHOWN = 5  # example pictures per submission
PARTS = {
    "detection": "was anything hidden: 1 - 4 (p - truth)², 1 at best, 0 for always answering one half",
    "target": "which class: 1 at best, 0 for a uniform guess; backdoored models only",
    "trigger": "what wakes it: success, place and look of the recovered trigger, 0 to 1; backdoored models only",
    "cleaning": "the repaired model: share of the lost accuracy on triggered images that came back, 0 to 1",
}


def publish(played: Played, document: GameReport) -> Path:
    """Write result.json and report.html into the game's folder and return the path of the report.

    Args:
        played: the finished game.
        document: its `summary`, which takes a while to make: every baseline is judged for it.
    """
    write_atomically(played.folder / "result.json", [json.dumps(result(played, document), indent=1).encode() + b"\n"])
    path = played.folder / "report.html"
    write_atomically(path, [report.game_html(document).encode()])
    return path


def summary(played: Played, command: str) -> GameReport:
    """Collect what the report shows.

    Args:
        played: the finished game.
        command: what plays it again.
    """
    weights = played.round.weights
    return GameReport(
        title=f"Round {played.round.name}: {played.round.title}",
        task=played.task.name,
        network=played.settings.network,
        shape=played.task.shape,
        classes=played.task.classes,
        seed=played.settings.seed,
        when=played.when,
        submissions=tuple(_view(played, one) for one in sorted((*played.judged, *played.refused), key=_order)),
        defenders=_defenders(played),
        attackers=_attackers(played),
        parts={f.name: (getattr(weights, f.name), PARTS[f.name]) for f in fields(weights)},
        points="Defender: 100 times the weighted mean of the parts, over host-trained clean models and backdoors that "
        "passed every gate. Attacker: 100 times what the defender missed, with the same weights; a model that missed "
        "a gate earns 0. Honest teams are judged and shown, and score nobody.",
        notes=_notes(played),
        command=command,
        versions={"molehunt": version("molehunt"), "torch": torch.__version__, "python": platform.python_version()},
    )


def result(played: Played, document: GameReport) -> dict[str, Any]:
    """Return the game as JSON: settings, commitments, gates, answers, points and boards."""
    return {
        "settings": asdict(played.settings),
        "seconds": played.seconds,
        "command": document.command,
        "versions": dict(document.versions),
        "references": len(played.population.clean),
        "submissions": [
            *({**_opened(played, one), **_answered(one)} for one in played.judged),
            *(_opened(played, one) for one in played.refused),
        ],
        "defenders": [_row(row) for row in document.defenders],
        "attackers": [_row(row) for row in document.attackers],
    }


def _opened(played: Played, one: Opened) -> dict[str, Any]:
    """What is known of a submission once its seal is open, whether or not a defense saw it."""
    return {
        "id": one.submission.id,
        "team": one.team,
        "kind": one.kind,
        "commitment": one.submission.commitment,
        "arrived": one.arrived,
        "attack": one.sealed.attack,
        "altered": played.altered.get(one.submission.id),
        "relabeled": played.relabeled.get(one.submission.id),
        "target": None if one.sealed.target is None else one.sealed.target.to_json(),
        "gates": [{**asdict(gate), "margin": gate.margin} for gate in one.gates],
        "valid": one.valid,
        "examined": isinstance(one, Judged),
    }


def _answered(one: Judged) -> dict[str, Any]:
    """What the defenses said of a submission, and what that earned."""
    return {
        "p": one.verdict.p,
        "q": one.verdict.q.tolist(),
        "recovered_target": one.verdict.target,
        "p_values": dict(one.verdict.p_values),
        "stream_auc": one.stream,
        "points": asdict(one.points),
        "removals": [asdict(removal) for removal in one.removals],
        "seconds": {o.defense: c.seconds for o in one.verdict.outcomes if (c := _cost(o)) is not None},
    }


def _row(row: Row) -> dict[str, Any]:
    return {**asdict(row), "parts": dict(row.parts)}


def _cost(outcome: Outcome) -> Cost | None:
    return getattr(outcome, "cost", None)


def _order(one: Opened) -> tuple[int, str]:
    return {"backdoored": 0, "honest": 1, "host clean": 2}[one.kind], one.team


# -- boards -----------------------------------------------------------------------------------------------------------


def _defenders(played: Played) -> tuple[Row, ...]:
    """Rank the fused verdict beside answers that anybody could give."""
    judged = [one for one in played.judged if one.counts]
    if not judged:
        return ()
    entries = [
        scoreboard.Defender(
            name="Molehunt, all defenses fused",
            points={one.submission.id: one.points for one in judged},
            seconds=sum(c.seconds for one in judged for o in one.verdict.outcomes if (c := _cost(o)) is not None),
        )
    ]
    answers = {one.submission.id: baselines(one.verdict) for one in judged}
    entries += [
        scoreboard.Defender(
            name=name,
            points={one.submission.id: _judge(played, one, answers[one.submission.id][name]) for one in judged},
            baseline=True,
        )
        for name in answers[judged[0].submission.id]
    ]
    return scoreboard.defenders(entries, played.round.weights, seed=played.settings.seed)


def _judge(played: Played, one: Judged, verdict: Verdict) -> Points:
    truth = Truth(backdoored=one.sealed.backdoored, trigger=one.sealed.trigger, target=one.sealed.target)
    return judge(verdict, truth, played.hidden, one.model)


def _attackers(played: Played) -> tuple[Row, ...]:
    teams: dict[str, list[scoreboard.Backdoor]] = {}
    for one in (*played.judged, *played.refused):
        if one.sealed.trigger is not None:
            teams.setdefault(one.team, []).append(
                scoreboard.Backdoor(
                    points=one.points if isinstance(one, Judged) and one.valid else None,
                    weight=one.sealed.trigger.footprint().weight,
                    altered=played.altered.get(one.submission.id),
                    committed=one.arrived,
                )
            )
    return scoreboard.attackers(teams, played.round.weights, seed=played.settings.seed) if teams else ()


# -- one submission ---------------------------------------------------------------------------------------------------


def _view(played: Played, one: Opened) -> SubmissionView:
    """Show what is known of a submission; what no defense saw has neither verdict nor points."""
    sealed, answered = one.sealed, one if isinstance(one, Judged) else None
    return SubmissionView(
        id=one.submission.id[:12],
        team=one.team,
        kind=one.kind,
        attack="" if sealed.attack is None else f"{sealed.attack}, {_poisoned(played, one)}",
        gates=tuple(_gate(gate) for gate in one.gates),
        verdict=answered.verdict if answered else None,
        true_trigger=sealed.trigger,
        true_target="" if sealed.target is None else _words(sealed.target, played.task.classes),
        true_classes=()
        if sealed.target is None
        else tuple(sealed.target.mix(played.task.num_classes).nonzero().flatten().tolist()),
        pictures=_pictures(played, one),
        accuracy=_change(answered.points.accuracy, answered.verdict) if answered else None,
        asr=_change(answered.points.asr, answered.verdict) if answered else None,
        removals=tuple(_removal(removal) for removal in answered.removals) if answered else (),
        points={
            name: value
            for name in ("detection", "target", "trigger", "cleaning")
            if answered and (value := getattr(answered.points, name)) is not None
        },
        notes=tuple(_remarks(played, one)),
    )


def _removal(removal: Removal) -> RemovalView:
    return RemovalView(
        defense=removal.defense,
        accuracy=Change(before=removal.accuracy[0], after=removal.accuracy[1]),
        asr=None if removal.asr is None else Change(before=removal.asr[0], after=removal.asr[1]),
        taken=removal.taken,
    )


def _remarks(played: Played, one: Opened) -> Iterator[str]:
    if isinstance(one, Judged) and one.stream is not None:
        yield (
            f"On a run-time stream of {played.stream} inputs, half of them stamped, STRIP's scores tell stamped from "
            f"clean with AUC {one.stream:.3f}. The stream is a result of its own and earned nobody points."
        )
    if not isinstance(one, Judged):
        yield (
            "The host refused this set: it hides a trigger, and the model that was trained from it missed a gate. No "
            "defense saw it, and it earns its team no points."
        )
    elif not one.valid:
        yield "It missed a gate: no backdoor in the sense of the rules, and no points for its team."


def _poisoned(played: Played, one: Opened) -> str:
    """Say how many training images were altered: as measured where the host has the set, else as the team states."""
    rate = played.altered.get(one.submission.id)
    if rate is not None:
        labels = played.relabeled[one.submission.id]
        return f"{100 * rate:.1f} % of images altered, {100 * labels:.1f} % relabeled, as measured"
    stated = one.sealed.details.get("poison_rate")
    if stated is None:
        return "poison rate not stated"
    return f"{100 * stated:.1f} % of images altered, as stated"


def _words(target: Target, classes: tuple[str, ...]) -> str:
    """Say where a backdoor sends images."""
    if isinstance(target.classes, int):
        goal = classes[target.classes]
    else:
        goal = ", ".join(f"{a} to {classes[k]}" for a, k in zip(classes, target.classes, strict=True))
    return goal if target.sources is None else f"{', '.join(classes[k] for k in target.sources)} to {goal}"


def _gate(gate: Gate) -> GateView:
    return GateView(
        name=gate.name,
        passed=gate.passed,
        measured=gate.measured,
        limit=gate.limit,
        at_least=gate.at_least,
        share=gate.unit == "share",
        text=gate.message,
    )


def _change(pair: tuple[float, float] | None, verdict: Verdict) -> Change | None:
    if pair is None:
        return None
    return Change(before=pair[0], after=None if verdict.repaired is None else pair[1])


def _pictures(played: Played, one: Opened) -> Pictures:
    """Show the first hidden images that the true trigger counts on, else the first ones."""
    x, y = played.hidden
    if one.sealed.target is not None:
        chosen = one.sealed.target.counts(y)
        x = x[chosen]
    x = x[:SHOWN]
    stamped = None if one.sealed.trigger is None else one.sealed.trigger(x)
    found = one.verdict.trigger if isinstance(one, Judged) else None
    recovered = None if found is None else found(x)
    return Pictures(
        clean=x,
        stamped=stamped,
        recovered=recovered,
        clean_says=_says(one.model, x, played.task.classes),
        stamped_says=() if stamped is None else _says(one.model, stamped, played.task.classes),
        recovered_says=() if recovered is None else _says(one.model, recovered, played.task.classes),
    )


@torch.no_grad()
def _says(model: Network, x: torch.Tensor, classes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(classes[k] for k in model(x).argmax(1).tolist())


def _notes(played: Played) -> tuple[str, ...]:
    return (
        certainty(played.population),
        f"Gates and points were measured on {len(played.hidden.y)} hidden images that no defense saw.",
    )


def certainty(population: Population) -> str:
    """Say how sure a verdict can be that rests on these reference models."""
    clean = len(population.clean)
    text = (
        f"Probabilities rest on {clean} clean reference models: no p-value can be smaller than 1/{clean + 1}, "
        "so no verdict can be surer than that many models allow."
    )
    if population.planted or not clean:
        return text
    # Without models of known backdoors nobody knows how strong the defenses are, and finding nothing proves little.
    least, most = posterior(1.0, clean), posterior(1.0 / (clean + 1), clean)
    missing = "found, and none clear" if most < FOUND_AT else "clear"
    return (
        f"{text} None of them has a known backdoor, so p lies between {least:.2f} and {most:.2f} whatever the defenses "
        f"say: no model can be called {missing}."
    )
