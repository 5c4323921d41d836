"""What each defense's repair is worth on hidden images, whether or not the verdict took it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from molehunt.findings import Finding, Verdict
from molehunt.game.answers import Logits, accuracy, asr, measure
from molehunt.game.scoring import Truth
from molehunt.tasks import Images
from molehunt.tensor_file import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Removal:
    """A repaired model beside the submitted one.

    Attributes:
        defense: that repaired it.
        accuracy: clean accuracy before and after, in [0, 1].
        asr: attack success rate of the true trigger before and after, in [0, 1]; None on a clean model.
        taken: whether the verdict hands this one back.
    """

    defense: str
    accuracy: tuple[float, float]
    asr: tuple[float, float] | None
    taken: bool


def removals(
    verdict: Verdict,
    truth: Truth,
    images: Images,
    logits: Logits,
    assemble: Callable[[Mapping[str, Tensor]], Logits],
) -> tuple[Removal, ...]:
    """Measure the repair of every defense that offered one that runs, in the order of the outcomes.

    Args:
        verdict: with its outcomes.
        truth: what was hidden.
        images: hidden images, labeled.
        logits: the submitted model.
        assemble: makes a model of repaired weights.
    """
    offers = [o for o in verdict.outcomes if isinstance(o, Finding) and o.repaired is not None]
    if not offers:
        return ()
    taken = (verdict.details.get("repair") or {}).get("taken")
    before = _rates(logits, truth, images)
    found = []
    for offer in offers:
        try:
            repaired = assemble(offer.repaired or {})
        except CheckpointError:
            # It fits no network, or answers with what is no number: it was not taken, and nothing can be said of it.
            continue
        after = _rates(repaired, truth, images)
        rates = None if before[1] is None or after[1] is None else (before[1], after[1])
        found.append(
            Removal(defense=offer.defense, accuracy=(before[0], after[0]), asr=rates, taken=offer.defense == taken)
        )
    return tuple(found)


def _rates(logits: Logits, truth: Truth, images: Images) -> tuple[float, float | None]:
    answers = measure(logits, images, truth.trigger)
    if answers.stamped is None or truth.target is None:
        return accuracy(answers.plain, answers.y), None
    return accuracy(answers.plain, answers.y), asr(answers.stamped, answers.y, truth.target)
