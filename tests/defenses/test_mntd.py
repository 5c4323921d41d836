"""MNTD: a few forward passes of the suspect, read by meta-classifiers that were trained before."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from molehunt.calibration import settings
from molehunt.defenses.mntd import MNTD
from molehunt.engine import Run
from molehunt.findings import Abstention, Failure, Finding
from molehunt.metas import Meta, Settings
from molehunt.runner import inspect
from molehunt.suspect import Access, Suspect
from molehunt.testing import DEFENSE_CHECKS, Trial, planted

METAS = (Access.METAS,)


@pytest.fixture(scope="module")
def trial() -> Trial:
    return Trial(MNTD())


@pytest.mark.parametrize("check", DEFENSE_CHECKS)
def test_the_contract(trial: Trial, check: str) -> None:
    DEFENSE_CHECKS[check](trial)


@pytest.fixture(scope="module")
def suspect() -> Suspect:
    return planted(grants=METAS).suspect


def found(suspect: Suspect) -> Finding:
    finding = inspect(MNTD(), suspect, seed=0)
    assert isinstance(finding, Finding), finding
    return finding


def test_the_score_is_the_mean_of_the_largest_logits(suspect: Suspect) -> None:
    finding = found(suspect)
    assert suspect.metas is not None
    logits = torch.cat([meta.scores([suspect.model]) for meta in suspect.metas]).double()
    assert finding.score == pytest.approx(float(logits.amax(1).mean()))
    assert finding.details["logits"] == pytest.approx(logits.amax(1).tolist())
    assert finding.details["spread"] == pytest.approx(float(logits.amax(1).std()))
    assert finding.details["queries"] == sum(len(meta.queries) for meta in suspect.metas)
    assert finding.class_scores is not None
    assert torch.allclose(finding.class_scores, logits.mean(0))


def test_one_logit_for_all_classes_names_no_target(suspect: Suspect) -> None:
    rng = torch.Generator().manual_seed(0)
    plain = Meta(suspect.task.shape, suspect.classes, (0.5,) * 3, (0.3,) * 3, Settings(per_class=False), rng)
    finding = found(replace(suspect, metas=(plain,)))
    assert finding.class_scores is None
    assert finding.details["spread"] is None
    assert finding.score == pytest.approx(float(plain.scores([suspect.model])[0]))


class Forgetful(nn.Module):
    """A network with dropout, which somebody left in training mode."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.drop = inner, nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(self.drop(x))
        return out


def test_dropout_is_off_as_it_is_not_in_the_authors_code(suspect: Suspect) -> None:
    # Past `Suspect.of`, which would put it into evaluation mode by itself.
    asked = replace(suspect, model=Forgetful(copy.deepcopy(suspect.model)).train())
    once, twice = (MNTD()(asked, Run(rng=torch.Generator())).score for _ in range(2))
    assert once == twice == pytest.approx(found(suspect).score)


def test_meta_classifiers_of_another_task_are_refused(suspect: Suspect) -> None:
    rng = torch.Generator().manual_seed(0)
    for shape, classes in (((3, 8, 8), 10), (suspect.task.shape, 4)):
        other = Meta(shape, classes, (0.5,) * 3, (0.3,) * 3, Settings(), rng)
        outcome = inspect(MNTD(), replace(suspect, metas=(other,)), seed=0)
        assert isinstance(outcome, Failure)
        assert "the task has (3, 12, 12) and 10" in outcome.message
    outcome = inspect(MNTD(), replace(suspect, metas=()), seed=0)
    assert isinstance(outcome, Failure)
    assert "at least one" in outcome.message


def test_without_meta_classifiers_it_abstains_and_says_so(suspect: Suspect) -> None:
    outcome = inspect(MNTD(), replace(suspect, metas=None), seed=0)
    assert isinstance(outcome, Abstention)
    assert "needs trained meta-classifiers" in outcome.reason


def test_scores_by_other_meta_classifiers_are_not_comparable(suspect: Suspect) -> None:
    assert suspect.metas is not None
    one, again = settings(found(suspect)), settings(found(suspect))
    fewer = settings(found(replace(suspect, metas=suspect.metas[:1])))
    assert one == again
    assert one != fewer
    assert len(one["metas"]) == 64
