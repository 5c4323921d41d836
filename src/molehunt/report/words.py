"""Plain words and numbers: what terminal, JSON and page say in the same way."""

import math
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from molehunt.findings import Abstention, Failure, Finding, Outcome, Verdict
from molehunt.legible import BLANK as BLANK
from molehunt.legible import legible as legible
from molehunt.triggers import Several, Trigger

Answer = Literal["found", "clear", "unsure"]

FOUND_AT = 0.8
CLEAR_AT = 0.2


def spoke(verdict: Verdict) -> bool:
    """Whether any defense had an opinion that the fusion could use. A pure repair has none."""
    if verdict.details.get("could_not_tell"):
        return False
    return any(
        isinstance(o, Finding)
        and any(v is not None for v in (o.score, o.class_scores, o.input_scores, o.sample_scores, o.trigger))
        for o in verdict.outcomes
    )


def answer(verdict: Verdict, found_at: float = FOUND_AT, clear_at: float = CLEAR_AT) -> Answer:
    """Call a model backdoored ("found"), clean ("clear"), or neither ("unsure").

    If no defense had an opinion the answer is "unsure" whatever p says: silence is not "clean".

    Args:
        verdict: the verdict.
        found_at: p from which the answer is "found".
        clear_at: p up to which the answer is "clear".

    Raises:
        ValueError: the two thresholds do not lie in order within [0, 1].
    """
    if not 0.0 <= clear_at < found_at <= 1.0:
        raise ValueError(f"clear-at must lie below found-at, both in [0, 1], got {clear_at} and {found_at}")
    if not spoke(verdict):
        return "unsure"
    if verdict.p >= found_at:
        return "found"
    return "clear" if verdict.p <= clear_at else "unsure"


def sentence(verdict: Verdict, classes: tuple[str, ...], found_at: float, clear_at: float) -> str:
    """Say in one or two sentences what a verdict means."""
    if not spoke(verdict):
        return "Could not tell: no defense had an opinion that counts, which is not the same as clean."
    chance = f"probability {probability(verdict.p)}"
    match answer(verdict, found_at, clear_at):
        case "clear":
            return f"Probably nothing is hidden in this model ({chance})."
        case "unsure":
            return f"Could not tell whether something is hidden ({chance})."
        case "found":
            best = int(verdict.q.argmax())
            name = legible(classes[best], 40)
            sources = _sources(verdict, classes)
            from_ = f", from {sources}" if sources and verdict.target == best else ""
            return (
                f"Something is very probably hidden in this model ({chance}). "
                f"The likeliest target is “{name}” ({share(float(verdict.q[best]))}){from_}."
            )


def way(verdict: Verdict, classes: tuple[str, ...]) -> str:
    """Say what class the recovered trigger is for, and from which it works; empty where nothing was recovered."""
    if verdict.target is None:
        return ""
    sources = _sources(verdict, classes)
    return f"for “{legible(classes[verdict.target], 40)}”" + (f", on {sources} alone" if sources else "")


def _sources(verdict: Verdict, classes: tuple[str, ...]) -> str:
    names = " or ".join(f"“{legible(classes[k], 40)}”" for k in verdict.sources or ())
    return f"pictures of {names}" if names else ""


def judged(kind: str, said: Answer) -> tuple[str, str]:
    """Compare an answer with the truth of a published game.

    Returns:
        A tone ("good", "bad" or "open") and the words.
    """
    backdoored = kind == "backdoored"
    match said:
        case "unsure":
            return "open", "Undecided"
        case "found":
            return ("good", "Caught") if backdoored else ("bad", "False alarm")
        case "clear":
            return ("bad", "Slipped through") if backdoored else ("good", "Rightly cleared")


def trigger_words(trigger: Trigger) -> str:
    """Describe a trigger by what it may change."""
    if isinstance(trigger, Several):
        parts = "; ".join(dict.fromkeys(trigger_words(part) for part in trigger.triggers))
        return f"One of {len(trigger.triggers)} triggers, by what is in the picture: {parts}"
    print_ = trigger.footprint()
    match print_.kind:
        case "patch":
            # The mask of a recovered patch is never quite zero, so its area as such would be the whole picture.
            area = print_.weight / print_.opacity if print_.opacity else 0.0
            return f"Patch on {share(area)} of the picture, opacity {print_.opacity:.2f}"
        case "blend":
            return f"Picture blended over everything, opacity {print_.opacity:.2f}"
        case "sticker":
            return f"Sticker, on each picture seen otherwise, on up to {share(print_.area)} of it"
        case "warp":
            return f"Warp that moves pixels by up to {print_.displacement:.1f}"
        case "reflection":
            return f"Reflection over everything, opacity {print_.opacity:.2f}"
        case "quantize":
            return f"Rounding of colors that changes values by up to {print_.linf:.2f}"
        case "network":
            where = "" if print_.area == 1.0 else f" on {share(print_.area)} of the picture, elsewhere on each,"
            return f"Network that draws on each picture its own,{where} and changes values by up to {print_.linf:.2f}"
        case kind:
            return f"{legible(kind, 20).capitalize()} that changes values by up to {print_.linf:.2f}"


def remarks(verdict: Verdict) -> list[str]:
    """Say what the fusion has to say besides p and q: its references, warnings, what is certified, and the repair."""
    details = verdict.details
    said = []
    references = details.get("references")
    if isinstance(references, Mapping) and references.get("clean"):
        text = f"Compared with {references['clean']} clean"
        text += f" and {references['planted']} backdoored" if references.get("planted") else ""
        said.append(f"{text} reference models.")
    if isinstance(details.get("indicative"), str):
        said.append(legible(details["indicative"], 400))
    said += [legible(str(warning), 400) for warning in details.get("warnings", ())]
    said += [f"{legible(name, 40)}: {legible(text, 1000)}" for name, text in certificates(verdict).items()]
    repair = details.get("repair")
    if isinstance(repair, Mapping) and repair.get("why"):
        taken = f"Repair by {legible(str(repair['taken']), 40)}" if repair.get("taken") else "No repair"
        said.append(f"{taken}: {legible(str(repair['why']), 300)}")
    return said


def certificates(verdict: Verdict) -> dict[str, str]:
    """By defense that certifies, what is certified and what is not, in its own words."""
    found = {}
    for outcome in verdict.outcomes:
        certificate = outcome.details.get("certificate") if isinstance(outcome, Finding) else None
        words = certificate.get("words") if isinstance(certificate, Mapping) else None
        if isinstance(words, str) and words.strip():
            found[outcome.defense] = words
    return found


def says(outcome: Outcome, verdict: Verdict, classes: tuple[str, ...]) -> str:
    """Say in a few words what a defense answered, and why it did not count if it did not."""
    told = _says(outcome, classes)
    skipped = verdict.details.get("skipped")
    if isinstance(outcome, Finding) and isinstance(skipped, Mapping) and outcome.defense in skipped:
        told += f" (its score did not count: {legible(str(skipped[outcome.defense]), 200)})"
    return told


def _says(outcome: Outcome, classes: tuple[str, ...]) -> str:
    match outcome:
        case Abstention():
            return f"No opinion: {legible(outcome.reason, 300)}"
        case Failure():
            reason = {
                "raised": "it broke",
                "time": "out of time",
                "memory": "out of memory",
                "died": "its process died",
                "cancelled": "it was stopped",
            }.get(outcome.kind, legible(outcome.kind, 20))
            return f"Failed, {reason}: {legible(outcome.message, 300)}"
        case Finding():
            return _found(outcome, classes)


def _found(finding: Finding, classes: tuple[str, ...]) -> str:
    """Say what a finding holds."""
    parts = []
    if finding.target is not None and 0 <= finding.target < len(classes):
        parts.append(f"recovered a trigger for “{legible(classes[finding.target], 40)}”")
    elif _points(finding.class_scores, len(classes)) and finding.class_scores is not None:
        parts.append(f"points to “{legible(classes[int(finding.class_scores.argmax())], 40)}”")
    if finding.input_scores is not None:
        parts.append(f"scored {count(len(finding.input_scores))} inputs")
    if finding.sample_scores is not None:
        parts.append(f"scored {count(len(finding.sample_scores))} training samples")
    if finding.repaired is not None:
        parts.append("repaired the weights")
    if finding.radius is not None:
        parts.append(f"certified radius {number(finding.radius)}")
    text = "; ".join(parts)
    return text[:1].upper() + text[1:]


def _points(scores: Tensor | None, classes: int) -> bool:
    """Whether class scores point anywhere: there is one per class, and not all are equal."""
    return scores is not None and len(scores) == classes and bool(scores.max() > scores.min())


def share(value: float) -> str:
    """A share in [0, 1] in percent: one decimal, and never rounded to a whole that it is not."""
    percent = 100.0 * value
    text = f"{percent:.1f}"
    if (text == "100.0" and value < 1.0) or (text in {"0.0", "-0.0"} and value != 0.0):
        return "> 99.9 %" if value > 0.5 else ("< 0.1 %" if value > 0 else "0.0 %")
    return f"{text} %"


def probability(value: float) -> str:
    """A probability: two decimals, three near the ends."""
    if value < 0.001:
        return "< 0.001"
    if value > 0.999:
        return "> 0.999"
    return f"{value:.3f}" if value < 0.01 or value > 0.99 else f"{value:.2f}"


def p_value(value: float) -> str:
    """A p-value: two digits that count, because it is the small ones that matter."""
    return "< 0.001" if value < 0.001 else f"{value:.2g}"


def number(value: float) -> str:
    """Any number with three digits that count, and a real minus sign."""
    if not math.isfinite(value):
        return "not finite"
    text = f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return text.replace("-", "−")


def points(value: float) -> str:
    """Points with one decimal and a real minus sign."""
    return f"{round(value, 1) + 0.0:.1f}".replace("-", "−")  # the sum takes the sign off a zero


def part(value: float) -> str:
    """A part of the points: two decimals and a real minus sign."""
    return f"{value:.2f}".replace("-", "−")


def count(value: int) -> str:
    """A whole number, with k and M above ten thousand."""
    if value < 10_000:
        return f"{value:,}"
    return f"{value / 1e3:,.0f} k" if value < 1_000_000 else f"{value / 1e6:,.1f} M"


def seconds(value: float) -> str:
    """A duration."""
    if value < 0.1:
        return f"{1000 * value:.0f} ms"
    if value < 120:
        return f"{value:.1f} s"
    return f"{int(value) // 60} min {int(value) % 60:02d} s"


def size(value: int) -> str:
    """Bytes, in MiB or GiB; a dash where nothing was measured."""
    if value <= 0:
        return "–"
    return f"{value / 2**20:,.0f} MiB" if value < 2**30 else f"{value / 2**30:.1f} GiB"


def measure(value: float | None, as_share: bool) -> str:
    """A gate's value, in percent where it is a share; a dash where there is none."""
    if value is None:
        return "–"
    return share(value) if as_share else number(value)


def margin(value: float | None, as_share: bool) -> str:
    """A gate's room to spare, with its sign, in percentage points where the values are shares."""
    if value is None:
        return "–"
    text = f"{100 * value:+.1f} pt" if as_share else f"{value:+.3g}"
    return text.replace("-", "−")
