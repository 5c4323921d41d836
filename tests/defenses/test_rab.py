"""RAB: votes of noisy networks, what they certify, and what they do not."""

import copy
import itertools
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from molehunt.attacks import BadNets
from molehunt.defenses import _ensemble, rab
from molehunt.defenses._ensemble import answers, noise, parts, seed_of
from molehunt.defenses.rab import RAB
from molehunt.engine import Run
from molehunt.findings import Finding
from molehunt.suspect import Access, Suspect
from molehunt.tasks import Images
from molehunt.testing import DEFENSE_CHECKS, Trial, auc, planted
from molehunt.training import Recipe, train
from molehunt.triggers import Additive

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


LEARNED = "a twentieth of a small set is enough poison for every network to learn, whatever noise lies on it"
CANNOT = {
    "ranks_the_planted_above_the_twin": LEARNED,
    "names_the_target": LEARNED,
    "finds_stamped_pictures": LEARNED,
    "repairs": LEARNED,
}


@pytest.fixture(scope="module")
def trial() -> Trial:
    return Trial(RAB(members=8, steps=300))


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(name, marks=[pytest.mark.xfail(strict=True, reason=CANNOT[name])] if name in CANNOT else [])
        for name in DEFENSE_CHECKS
    ],
)
def test_the_contract(trial: Trial, check: str) -> None:
    DEFENSE_CHECKS[check](trial)


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
    images = tiny.pictures(100, 1)
    whole = parts(images, 7, b"salt")
    assert sorted(torch.cat(whole).tolist()) == list(range(100))
    order = torch.randperm(100, generator=rng())
    shuffled = parts(Images(images.x[order], images.y[order]), 7, b"salt")
    relabeled = parts(Images(images.x, (images.y + 1) % 4), 7, b"salt")
    for one, other, third in zip(whole, shuffled, relabeled, strict=True):
        # The same pictures, in the same order.
        assert torch.equal(images.x[one], images.x[order][other])
        assert torch.equal(one, third)
    assert [len(one) for one in parts(images, 7, b"pepper")] != [len(one) for one in whole]


def weights_of(images: Images, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What every network of a partition vote has learned, as numbers."""
    seen: list[int] = []
    made = _ensemble.member

    def caught(*asked: Any) -> Any:
        model = made(*asked)
        seen.append(seed_of(model.state_dict()))
        return model

    monkeypatch.setattr(rab, "member", caught)
    run(RAB(members=6, steps=4, batch=20, kind="partition", distill=False), suspect(training=images))
    return seen


def test_one_sample_changes_one_network_of_a_partition_and_a_new_order_none(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny.pictures(120, 1)
    usual = weights_of(whole, monkeypatch)
    assert len(usual) == 6
    order = torch.randperm(120, generator=rng())
    assert weights_of(Images(whole.x[order], whole.y[order]), monkeypatch) == usual
    relabeled = whole.y.clone()
    relabeled[5] = (relabeled[5] + 1) % 4
    more = tiny.pictures(121, 77).x[-1:]
    changes = {
        "relabeled": Images(whole.x, relabeled),
        "removed": Images(whole.x[1:], whole.y[1:]),
        "added": Images(torch.cat([more, whole.x]), torch.cat([torch.tensor([2]), whole.y])),
    }
    for what, images in changes.items():
        now = weights_of(images, monkeypatch)
        assert sum(a != b for a, b in zip(usual, now, strict=True)) == 1, what


# -------------------------------------------------------------------------------------------- certificates


def certificate(shares: list[float], members: int, **settings: Any) -> dict[str, Any]:
    """Of images of which a share of the votes goes to class 1, the rest to class 0; label 1."""
    ballots = torch.zeros(members, len(shares), dtype=torch.int64)
    for image, share in enumerate(shares):
        ballots[:, image] = (torch.arange(members) < round(share * members)).long()
    # Rows in an order in which the votes that choose are like those that bound.
    ballots = ballots[torch.randperm(members, generator=rng())]
    return RAB(members=members, **settings).certificate(ballots, torch.ones(len(shares)).long(), 3, members)


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
    found = RAB(members=100).certificate(ballots, torch.tensor([1]), 3, 100)
    assert float(found["radii"][0]) == 0.0
    assert float(found["lower_bounds"][0]) == 0.0


def test_an_image_that_is_voted_wrongly_has_no_radius_in_the_median() -> None:
    # One label for all: unanimous, and worth nothing.
    assert certificate([0.0, 0.0, 1.0], 100)["radius"] == 0.0
    assert certificate([0.0, 1.0, 1.0], 100)["radius"] > 0.0


def test_radii_grow_with_the_noise_and_shrink_with_the_risk() -> None:
    small, large = (certificate([0.9], 200, size=size)["radius"] for size in (0.25, 0.5))
    assert large == pytest.approx(2 * small)
    assert certificate([0.9], 200, alpha=0.1)["radius"] > certificate([0.9], 200, alpha=0.001)["radius"]


def test_the_words_say_what_is_certified_and_what_is_not() -> None:
    found = certificate([1.0, 0.9], 100)
    said = found["certificate"]["words"]
    assert "Labels are not covered" in said
    assert "not all of them together" in said
    told = [float(number) for number in re.findall(r"(?:less than|can certify) (\d\.\d+)", said)]
    # Rounded down: a certificate must not be told larger than it is.
    assert told == pytest.approx([found["radius"], found["most"]], abs=1e-3)
    assert told[0] <= found["radius"] <= found["most"]
    assert told[1] <= found["most"]
    assert "nothing is certified" in certificate([0.5, 0.4], 100)["certificate"]["words"]
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


def learned(training: Images, seed: int) -> Suspect:
    """A network that was trained on a set, handed over with it."""
    model = tiny.network(seed)
    model.requires_grad_(True)
    recipe = Recipe(epochs=12, batch=50, lr=0.05, warmup=0.1, precision="float32")
    train(model, training, recipe, rng=rng(seed))
    return Suspect.of(model, tiny.task(), training=training, dtype=torch.float32)


@pytest.mark.parametrize("seed", [2, 3])
def test_a_set_whose_trigger_the_noise_drowns_scores_above_the_clean_one_and_names_its_target(seed: int) -> None:
    # 0.07 on every pixel: a norm of 0.7, which a network without noise learns, and noise of 0.2 hides.
    signs = 2.0 * torch.randint(0, 2, tiny.SHAPE, generator=rng(seed)) - 1.0
    clean = tiny.pictures(400, 50 + seed)
    poisoned = BadNets(target=0, poison_rate=0.08, trigger=Additive(0.07 * signs))(clean, tiny.task(), rng(seed))
    altered = poisoned.altered
    defense = RAB(members=6, steps=50, batch=40, size=0.2, distill=False)
    honest, caught = (run(defense, learned(images, seed)) for images in (clean, poisoned.stamped()))
    assert honest.score is not None
    assert caught.score is not None
    assert honest.score <= 0.05
    assert caught.score >= honest.score + 0.1
    assert caught.class_scores is not None
    assert int(caught.class_scores.argmax()) == 0
    assert caught.sample_scores is not None
    assert auc(caught.sample_scores, altered) >= 0.9


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
    assert found.details["taught"] <= 1
    assert f"{found.details['taught']} of 12 parts" in found.details["certificate"]["words"]


def test_a_network_that_diverges_does_not_end_the_vote(monkeypatch: pytest.MonkeyPatch) -> None:
    made, calls = _ensemble.member, []

    def sometimes(*asked: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise FloatingPointError("the loss is not finite")
        return made(*asked)

    monkeypatch.setattr(rab, "member", sometimes)
    found = run(RAB(members=4, steps=2, distill=False), suspect())
    assert found.details["taught"] == 3
    assert int(found.details["votes"].sum()) == 4 * 200


def test_every_network_sees_one_draw_of_noise_and_answers_with_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
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
