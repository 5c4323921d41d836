"""Baselines: answers that anybody could give, on every board so that points can be read."""

from dataclasses import replace

import torch

from molehunt.findings import Finding, Verdict

INDEX = 2.0
"""The paper's threshold for Neural Cleanse's anomaly index."""
SURE = 0.99
"""What "yes" means as a probability."""


def baselines(fused: Verdict) -> dict[str, Verdict]:
    """Return the baselines' verdicts on one model, by the name that the board shows.

    * "always 0.5" answers even odds, no class and no trigger, and repairs nothing.
    * "Neural Cleanse, index > 2" answers 0.99 if the anomaly index of the raw norms exceeds 2 and 0.01 if not, gives
      nine tenths of q to the class with the smallest mask, hands in its trigger and repairs nothing. Without a finding
      of Neural Cleanse it is "always 0.5".
    * "fused, no repair" is the fused verdict with the submitted weights: what cleaning adds or spoils.

    Args:
        fused: the verdict with the outcomes of all defenses.
    """
    classes = len(fused.q)
    uniform = torch.full((classes,), 1.0 / classes, dtype=torch.float64)
    shrug = Verdict(p=0.5, q=uniform)
    plain = shrug
    for outcome in fused.outcomes:
        if isinstance(outcome, Finding) and outcome.defense == "neural_cleanse" and outcome.score is not None:
            q = uniform
            if outcome.class_scores is not None:
                q = 0.1 * uniform
                q[int(outcome.class_scores.argmax())] += 0.9
            # The paper's rule is about raw norms; the score may be made of their logarithms.
            index = float(outcome.details.get("raw_index", outcome.score))
            p = SURE if index > INDEX else 1.0 - SURE
            plain = Verdict(p=p, q=q, trigger=outcome.trigger, target=outcome.target)
    return {
        "always 0.5": shrug,
        "Neural Cleanse, index > 2": plain,
        "fused, no repair": replace(fused, repaired=None),
    }
