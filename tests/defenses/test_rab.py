"""RAB: votes of noisy networks, what they certify, and what they do not."""

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from molehunt.defenses._ensemble import answers, noise, parts, seed_of
from molehunt.defenses.rab import RAB
from molehunt.engine import Run
from molehunt.findings import Finding
from molehunt.suspect import Access, Suspect
from molehunt.tasks import Images
from molehunt.testing import planted

from . import tiny

TRAINING = (Access.TRAINING,)
QUICK: dict[str, Any] = {"members": 10, "steps": 40, "batch": 40}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def suspect(**evidence: Any) -> Suspect:
    """A small network with batch norm, and an honest training set."""
    given: dict[str, Any] = {"training": tiny.pictures(200, 1), **evidence}
    return Suspect.of(tiny.poisoned().model, tiny.task(), dtype=torch.float32, **given)


def run(defense: RAB, asked: Suspect, seed: int = 0) -> Finding:
    return defense(asked, Run(rng=rng(seed)))


# ------------------------------------------------------------------------------------- noise, parts, hashes


def test_noise_has_the_size_that_was_asked_for() -> None:
    normal, flat = (noise((400, 1, 10, 10), kind, 0.3, rng()) for kind in ("gaussian", "uniform"))
    assert float(normal.std()) == pytest.approx(0.3, rel=0.02)
    assert float(flat.abs().max()) <= 0.3
    assert float(flat.std()) == pytest.approx(0.3 / math.sqrt(3), rel=0.02)


def test_test_noise_is_a_function_of_the_weights_alone() -> None:
    # The public code seeds one generator and draws from another.
    state = tiny.network(0).state_dict()
    backwards = dict(reversed(list(copy.deepcopy(state).items())))
    assert seed_of(state) == seed_of(backwards)
    first = noise((1, 10, 10), "gaussian", 1.0, rng(seed_of(state)))
    torch.rand(3)
    assert torch.equal(first, noise((1, 10, 10), "gaussian", 1.0, rng(seed_of(backwards))))
    for name in ("head.bias", "trunk.1.running_mean"):
        other = copy.deepcopy(state)
        other[name][0] += 1e-6
        assert seed_of(other) != seed_of(state), name


def test_a_picture_lies_in_one_part_whatever_its_place_its_label_or_its_company() -> None:
    x = tiny.pictures(100, 1).x
    whole = parts(x, 7)
    order = torch.randperm(100, generator=rng())
    assert torch.equal(parts(x[order], 7), whole[order])
    assert torch.equal(parts(x[:10], 7), whole[:10])
    assert set(whole.tolist()) == set(range(7))


# -------------------------------------------------------------------------------------------- certificates


def certificate(shares: list[float], members: int, **settings: Any) -> dict[str, Any]:
    """Of images of which a share of the votes goes to class 1, the rest to class 0; label 1."""
    ballots = torch.zeros(members, len(shares), dtype=torch.int64)
    for image, share in enumerate(shares):
        ballots[:, image] = (torch.arange(members) < round(share * members)).long()
    # Rows in an order in which the votes that choose are like those that bound.
    ballots = ballots[torch.randperm(members, generator=rng())]
    return RAB(members=members, **settings).certificate(ballots, torch.ones(len(shares)).long(), 3)


def test_a_larger_majority_has_a_larger_radius_and_half_has_none() -> None:
    found = certificate([1.0, 0.9, 0.7, 0.5, 0.0], 1000, size=0.5)
    radii = found["radii"]
    assert radii[0] > radii[1] > radii[2] > 0
    assert float(radii[3]) == 0.0
    # Unanimous and wrong: certified, and not right.
    assert float(radii[4]) == pytest.approx(float(radii[0]))
    assert float(radii[0]) == pytest.approx(found["most"])
    table = found["certificate"]["table"]
    assert table[0]["radius"] == 0.0
    assert table[0]["rate"] == pytest.approx(0.8)
    assert table[0]["accuracy"] == pytest.approx(0.6)
    assert all(a["rate"] >= b["rate"] for a, b in itertools.pairwise(table))


def test_the_votes_that_bound_had_no_say_in_the_choice() -> None:
    # The first fifth says class 2, all others class 1: chosen is 2, and nothing is certified of it.
    ballots = torch.cat([torch.full((20, 1), 2), torch.ones(80, 1).long()])
    found = RAB(members=100).certificate(ballots, torch.tensor([1]), 3)
    assert float(found["radii"][0]) == 0.0
    assert float(found["lower_bounds"][0]) == 0.0


def test_radii_grow_with_the_noise_and_shrink_with_the_risk() -> None:
    small, large = (certificate([0.9], 200, size=size)["radius"] for size in (0.25, 0.5))
    assert large == pytest.approx(2 * small)
    assert certificate([0.9], 200, alpha=0.1)["radius"] > certificate([0.9], 200, alpha=0.001)["radius"]


def test_the_words_say_what_is_certified_and_what_is_not() -> None:
    said = certificate([1.0, 0.9], 100)["certificate"]["words"]
    assert "Labels are not covered" in said
    assert "total l2 norm" in said
    assert "relabeled" in certificate([1.0, 0.9], 100, kind="partition")["certificate"]["words"]
    assert "radius" not in certificate([1.0], 100, kind="uniform")


def test_a_partition_vote_counts_flips() -> None:
    found = certificate([1.0, 0.7, 0.5], 10, kind="partition")
    # Ten against none: five flips make a tie, which class 0 wins. Seven against three: two. Five each: class 0 wins.
    assert found["flips"].tolist() == [4, 1, 0]
    assert found["certificate"]["table"][1] == {
        "flips": 1,
        "rate": pytest.approx(2 / 3),
        "accuracy": pytest.approx(2 / 3),
    }


# ------------------------------------------------------------------------------------------- the whole thing


def test_an_honest_set_is_learned_certified_and_not_suspected() -> None:
    found = run(RAB(**QUICK, size=0.1), suspect(clean=tiny.pictures(80, 9)))
    assert found.details["accuracy"] >= 0.9
    assert found.details["certified_on"] == "clean images"
    assert found.score is not None
    assert abs(found.score) <= 0.1
    assert found.sample_scores is not None
    assert float(found.sample_scores.mean()) <= 0.1
    assert found.repaired is not None
    again = copy.deepcopy(tiny.poisoned().model)
    again.load_state_dict(dict(found.repaired))
    hidden = tiny.pictures(200, 11)
    assert float((again.eval()(hidden.x).argmax(1) == hidden.y).double().mean()) >= 0.9


def test_mislabeled_samples_have_the_votes_against_them() -> None:
    images = tiny.pictures(200, 1)
    wrong = torch.arange(200) % 20 == 3
    y = torch.where(wrong, (images.y + 1) % tiny.CLASSES, images.y)
    found = run(RAB(**QUICK, size=0.1, distill=False), suspect(training=Images(images.x, y)))
    scores = found.sample_scores
    assert scores is not None
    assert float(scores[wrong].mean()) > float(scores[~wrong].mean()) + 0.5
    assert found.repaired is None


def test_without_clean_images_the_set_itself_is_certified_and_that_is_said() -> None:
    found = run(RAB(**QUICK, certified=30), suspect())
    assert found.details["certified_on"] == "the training set itself"
    assert len(found.details["radii"]) == 30
    assert found.radius == pytest.approx(float(found.details["radii"].median()))


@pytest.mark.parametrize("kind", ["uniform", "partition"])
def test_the_other_kinds_have_no_radius(kind: str) -> None:
    found = run(RAB(**QUICK | {"members": 5}, kind=kind, distill=False), suspect())  # type: ignore[arg-type]  # a Kind
    assert found.radius is None
    assert found.details["certificate"]["words"]


def test_an_empty_part_votes_without_looking_at_the_others() -> None:
    few = Images(tiny.pictures(3, 1).x, torch.tensor([1, 1, 1]))
    found = run(RAB(members=12, steps=2, kind="partition", distill=False), suspect(training=few))
    assert int(found.details["votes"].sum()) == 12 * 3
    assert int(found.details["votes"][:, 0].min()) >= 12 - 3


def test_every_network_sees_one_draw_of_noise_and_answers_with_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from molehunt.defenses import _ensemble, rab

    seen: list[Tensor] = []
    shifts: list[Tensor | None] = []

    def spy(model: Any, asked: Suspect, x: Tensor, shift: Tensor | None) -> Tensor:
        shifts.append(shift)
        return answers(model, asked, x, shift)

    def caught(asked: Suspect, images: Images, *rest: Any) -> Any:
        seen.append(images.x)
        return made(asked, images, *rest)

    made = _ensemble.member
    monkeypatch.setattr(rab, "answers", spy)
    monkeypatch.setattr(rab, "member", caught)
    asked = suspect()
    run(RAB(members=3, steps=2, distill=False), asked)
    assert asked.training is not None
    residues = [x - asked.training.x for x in seen]
    assert all(float(r.std()) == pytest.approx(0.25, rel=0.05) for r in residues)
    assert not torch.equal(residues[0], residues[1])
    given = [s for s in shifts if s is not None]
    assert len(given) == 6
    assert torch.equal(given[0], given[1])
    assert not torch.equal(given[0], given[2])


def test_the_same_seed_gives_the_same_votes() -> None:
    case = planted(grants=TRAINING)
    defense = RAB(members=4, steps=10, distill=False)
    one, other = (run(defense, case.suspect).details["votes"] for _ in range(2))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"kind": "laplace"}, "kind must be one of gaussian, uniform, partition"),
        ({"members": 1}, "a vote needs 2 members or more, got 1"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"size": 0.0}, "size must be above 0"),
        ({"alpha": 1.0}, "alpha must lie in"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        RAB(**settings)


def test_no_training_set_is_refused() -> None:
    empty = suspect(training=Images(torch.zeros(0, *tiny.SHAPE), torch.zeros(0).long()))
    with pytest.raises(ValueError, match="needs the training set"):
        run(RAB(), empty)
