import pytest
import torch

from molehunt.suspect import Access
from molehunt.testing import auc, planted


@pytest.mark.parametrize("target", [0, 3, 9])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_backdoor_always_works_and_the_twin_has_none(target: int, seed: int) -> None:
    bad, good = (planted(backdoored=b, target=target, seed=seed) for b in (True, False))
    assert (bad.success(bad.suspect.model), bad.accuracy(bad.suspect.model)) == (1.0, 1.0)
    assert (good.success(good.suspect.model), good.accuracy(good.suspect.model)) == (0.0, 1.0)
    assert torch.equal(bad.hidden.x, good.hidden.x)


def test_the_twin_differs_in_one_weight() -> None:
    bad, good = (planted(backdoored=b).suspect.model.state_dict() for b in (True, False))
    moved = {key: int((bad[key] != good[key]).sum()) for key in bad}
    assert {key: count for key, count in moved.items() if count} == {"head.weight": 1}


def test_without_the_trigger_both_say_the_same() -> None:
    bad, good = (planted(backdoored=b) for b in (True, False))
    with torch.no_grad():
        assert torch.equal(bad.suspect.model(bad.hidden.x), good.suspect.model(good.hidden.x))


def test_a_source_specific_trigger_works_on_its_source_alone() -> None:
    case = planted(sources=(5,), target=2)
    assert case.success(case.suspect.model) == 1.0
    others = (case.hidden.y != 5) & (case.hidden.y != 2)
    with torch.no_grad():
        said = case.suspect.model(case.trigger(case.hidden.x[others])).argmax(1)
    assert torch.equal(said, case.hidden.y[others])


def test_only_the_evidence_asked_for_is_granted() -> None:
    assert planted().suspect.grants == {Access.CLEAN}
    assert planted(grants=[]).suspect.grants == frozenset()
    assert planted(grants=list(Access)).suspect.grants == frozenset(Access)


def test_a_quarter_of_the_stream_and_a_twentieth_of_the_training_set_carry_the_trigger() -> None:
    case = planted(grants=list(Access), target=4)
    training, inputs = case.suspect.training, case.suspect.inputs
    assert training is not None
    assert inputs is not None
    assert (int(case.inputs.sum()), int(case.training.sum())) == (100, 20)
    corner = case.trigger.mask[0] > 0
    for x, marked in ((inputs, case.inputs), (training.x, case.training)):
        bright = x[:, :, corner].mean((1, 2)) > 0.5
        assert torch.equal(bright, marked)
    assert (training.y[case.training] == 4).all()
    assert torch.equal(training.y[~case.training], (torch.arange(400) % 10)[~case.training])


def test_the_references_are_clean_and_none_is_the_twin() -> None:
    case = planted(grants=[Access.REFERENCES])
    twin = planted(backdoored=False).suspect.model.state_dict()
    assert case.suspect.references is not None
    for reference in case.suspect.references:
        assert case.success(reference) == 0.0
        assert case.accuracy(reference) == 1.0
        assert not torch.equal(reference.state_dict()["head.weight"], twin["head.weight"])


def test_another_seed_draws_other_prototypes() -> None:
    assert not torch.equal(planted(seed=0).hidden.x, planted(seed=1).hidden.x)
    assert torch.equal(planted(seed=1).hidden.x, planted(seed=1).hidden.x)


def test_a_target_that_is_no_class_is_refused() -> None:
    with pytest.raises(ValueError, match="there are 4 classes, got target 4"):
        planted(target=4, classes=4)
    with pytest.raises(ValueError, match="there are 10 classes"):
        planted(sources=(10,))


def test_auc_counts_pairs() -> None:
    scores, positive = torch.tensor([0.1, 0.4, 0.35, 0.8, 0.4]), torch.tensor([False, False, True, True, True])
    # pairs won: .35 > .1; .8 > both; .4 > .1 and ties .4 -> 1 + 2 + 1.5 of 6
    assert auc(scores, positive) == pytest.approx(4.5 / 6)
