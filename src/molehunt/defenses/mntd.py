"""MNTD: ask a model a few tuned queries, and let classifiers of classifiers judge the answers."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from molehunt.engine import Run
from molehunt.findings import Finding
from molehunt.metas import Meta
from molehunt.suspect import Access, Suspect


@dataclass(frozen=True, kw_only=True)
class MNTD:
    """Let meta-classifiers, which were trained on clean and backdoored shadow models, read answers to their queries.

    Score: the mean over the meta-classifiers of their logits for "backdoored"; any finite number, higher is more
    suspicious, 0 where they are undecided. Where a meta-classifier has a logit per class, the largest counts.

    Class scores: the mean logit of each class being the target, over the meta-classifiers that have one per class; None
    where none has.

    It needs no picture and no gradient of the suspect, only its answers to some ten queries per meta-classifier. What
    it knows is what the shadow models were: a trigger of another family, another architecture, another recipe or longer
    training is outside of it, and then the score says little in either direction.

    `details` hold `logits`, by meta-classifier; `spread`, their standard deviation, None for one alone; and `queries`,
    how many pictures were asked about.

    Raises:
        ValueError: no meta-classifiers, or some for pictures or classes of another task.

    Reference:
        Xu, Wang, Li, Borisov, Gunter, Li, "Detecting AI Trojans Using Meta Neural Analysis", IEEE S&P 2021.

    Departures from the paper:
        Meta-classifiers are evidence, trained beforehand (`molehunt.shadows`), so that asking costs a few forward
        passes. Their logits are averaged; the paper averages AUCs over repeats. The suspect is in evaluation mode,
        where the authors' code leaves dropout on. How the meta-classifiers read answers is a setting of theirs; see
        `molehunt.metas.Settings`.
    """

    needs: ClassVar[tuple[frozenset[Access], ...]] = (frozenset({Access.METAS}),)

    @torch.no_grad()
    def __call__(self, suspect: Suspect, run: Run) -> Finding:
        """Ask the suspect; see the class."""
        metas: tuple[Meta, ...] | None = suspect.metas
        if not metas:
            raise ValueError("MNTD needs at least one trained meta-classifier")
        logits, by_class = [], []
        for place, meta in enumerate(metas):
            run.check()
            shape = tuple(meta.queries.shape[1:])
            if shape != suspect.task.shape or meta.classes != suspect.classes:
                raise ValueError(
                    f"meta-classifier {place} asks pictures {shape} about {meta.classes} classes, the task has "
                    f"{suspect.task.shape} and {suspect.classes}"
                )
            # The model as it was submitted: the shadow models answered in float32, too.
            said = meta.scores([suspect.model])[0].double()
            logits.append(float(said.max()))
            if said.ndim:
                by_class.append(said)
            run.report(place + 1, len(metas))
        values = torch.tensor(logits, dtype=torch.float64)
        details: dict[str, Any] = {
            "logits": logits,
            "spread": float(values.std()) if len(logits) > 1 else None,
            "queries": sum(len(meta.queries) for meta in metas),
        }
        return Finding(
            defense="mntd",
            score=float(values.mean()),
            class_scores=torch.stack(by_class).mean(0) if by_class else None,
            details=details,
        )
