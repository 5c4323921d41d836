from dataclasses import replace

import pytest
import torch

from game import planted
from molehunt.findings import Abstention, Finding, Outcome, Verdict
from molehunt.game.baselines import baselines


def fused(*outcomes: Outcome) -> Verdict:
    return Verdict(p=0.7, q=torch.full((4,), 0.25), outcomes=outcomes, repaired={"w": torch.ones(1)})


def cleanse(score: float) -> Finding:
    scores = torch.tensor([0.0, 0.1, 3.0, -0.5])
    return Finding(defense="neural_cleanse", score=score, class_scores=scores, trigger=planted.pixel(), target=2)


def test_a_shrug_says_nothing() -> None:
    shrug = baselines(fused(cleanse(3.0)))["always 0.5"]
    assert shrug.p == 0.5
    assert shrug.q.tolist() == [0.25] * 4
    assert shrug.trigger is None
    assert shrug.repaired is None


@pytest.mark.parametrize(("index", "p"), [(2.01, 0.99), (2.0, 0.01), (-1.0, 0.01)])
def test_neural_cleanse_by_the_book(index: float, p: float) -> None:
    plain = baselines(fused(cleanse(index)))["Neural Cleanse, index > 2"]
    assert plain.p == pytest.approx(p)
    # nine tenths, and a tenth of 1/4
    assert plain.q.tolist() == pytest.approx([0.025, 0.025, 0.925, 0.025])
    assert plain.target == 2
    assert plain.repaired is None


def test_the_paper_speaks_of_raw_norms() -> None:
    for raw, p in ((2.5, 0.99), (1.0, 0.01)):
        outcome = replace(cleanse(2.0), details={"raw_index": raw})
        assert baselines(fused(outcome))["Neural Cleanse, index > 2"].p == pytest.approx(p)


def test_neural_cleanse_that_did_not_answer_is_a_shrug() -> None:
    plain = baselines(fused(Abstention(defense="neural_cleanse", reason="no images")))["Neural Cleanse, index > 2"]
    assert plain.p == 0.5
    assert plain.trigger is None


def test_without_repair_the_rest_of_the_verdict_stands() -> None:
    same = baselines(fused(cleanse(3.0)))["fused, no repair"]
    assert same.p == 0.7
    assert same.repaired is None
