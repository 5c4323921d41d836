import math
from statistics import NormalDist
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from molehunt.defenses import STRIP
from molehunt.defenses.strip import MIXES, calibration, entropy_bits, partners, quantile_boundary, warnings
from molehunt.engine import Run
from molehunt.findings import Candidate, Finding
from molehunt.runner import inspect
from molehunt.suspect import Access, Suspect
from molehunt.testing import Planted, auc, planted
from molehunt.triggers import Patch

from .trained import trained

STREAM = frozenset({Access.CLEAN, Access.INPUTS})
CANDIDATES = frozenset({Access.CLEAN, Access.CANDIDATES})


def run(defense: STRIP, case: Planted | Suspect, seed: int = 0) -> Finding:
    suspect = case.suspect if isinstance(case, Planted) else case
    return defense(suspect, Run(rng=torch.Generator().manual_seed(seed)))


def scores(defense: STRIP, case: Planted | Suspect) -> Tensor:
    found = run(defense, case).input_scores
    assert found is not None
    return found


def granted(case: Planted, **evidence: Any) -> Suspect:
    """The planted model again, with other evidence."""
    suspect = case.suspect
    given_ = {"clean": suspect.clean, "inputs": suspect.inputs, "candidates": suspect.candidates, **evidence}
    return Suspect.of(suspect.model, suspect.task, dtype=torch.float32, **given_)


def random_logs(seed: int, *shape: int) -> Tensor:
    return torch.log_softmax(3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)), -1)


# ------------------------------------------------------------------------------------------ entropy


@given(seed=st.integers(0, 10**6), classes=st.integers(2, 50))
@settings(max_examples=30, deadline=None)
def test_entropy_lies_between_zero_and_log2_of_the_classes(seed: int, classes: int) -> None:
    bits = entropy_bits(random_logs(seed, 20, classes))
    assert float(bits.min()) >= 0.0
    assert float(bits.max()) <= math.log2(classes) + 1e-5


def test_entropy_of_certainty_is_zero_and_of_ignorance_log2_of_the_classes() -> None:
    certain = torch.full((3, 10), -math.inf)
    certain[:, 4] = 0.0
    assert entropy_bits(certain).tolist() == [0.0, 0.0, 0.0]
    assert float(entropy_bits(torch.full((1, 8), -math.log(8.0)))) == pytest.approx(3.0, abs=1e-6)


def test_entropy_is_over_classes_not_over_overlays() -> None:
    logs = random_logs(1, 6, 10)  # 6 overlays
    mean = entropy_bits(logs).mean()
    for same in (logs[:, torch.randperm(10)], logs.flip(0), logs.repeat(2, 1)):
        torch.testing.assert_close(entropy_bits(same).mean(), mean)


# ----------------------------------------------------------------------------------------- overlays


@given(seed=st.integers(0, 2**62), pool=st.integers(8, 40), overlays=st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_partners_are_drawn_without_replacement_by_the_index_alone(seed: int, pool: int, overlays: int) -> None:
    x, p = torch.rand(12, 1, 2, 2), torch.rand(pool, 1, 2, 2)
    rows = partners(x, p, overlays, seed)
    assert rows.shape == (12, overlays)
    assert all(len(set(row)) == overlays and min(row) >= 0 and max(row) < pool for row in rows.tolist())
    assert torch.equal(partners(x[:5], p, overlays, seed), rows[:5])
    assert torch.equal(partners(x, p, max(1, overlays // 2), seed), rows[:, : max(1, overlays // 2)])


def test_images_have_partners_of_their_own() -> None:
    rows = partners(torch.rand(50, 1, 2, 2), torch.rand(40, 1, 2, 2), 8, 3)
    assert len({tuple(row) for row in rows.tolist()}) == 50
    assert not torch.equal(rows, partners(torch.rand(50, 1, 2, 2), torch.rand(40, 1, 2, 2), 8, 4))


def test_an_image_is_never_its_own_partner() -> None:
    pool = torch.rand(9, 1, 3, 3)
    pool[7] = pool[2]  # the same picture twice
    rows = partners(pool, pool, 7, 0)
    for image, row in enumerate(rows.tolist()):
        assert all(not torch.equal(pool[image], pool[partner]) for partner in row)
    with pytest.raises(ValueError, match="image 2 has 7 partners in the pool, 8 overlays are asked for"):
        partners(pool, pool, 8, 0)


@given(count=st.integers(32, 600), pool=st.floats(0.01, 0.9), seed=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_overlays_and_calibration_never_meet(count: int, pool: float, seed: int) -> None:
    defense = STRIP(pool=pool)
    if count - max(16, round(pool * count)) < 16:
        with pytest.raises(ValueError, match="16 overlays need 32 clean images or more"):
            defense.split(count, torch.Generator())
        return
    overlay, rest = defense.split(count, torch.Generator().manual_seed(seed))
    assert sorted([*overlay.tolist(), *rest.tolist()]) == list(range(count))
    assert len(overlay) >= 16


# ---------------------------------------------------------------------------------------- boundary


@given(seed=st.integers(0, 10**6), count=st.integers(10, 900), rejection=st.floats(0.002, 0.5))
@settings(max_examples=50, deadline=None)
def test_the_boundary_flags_the_stated_share_of_the_calibration_images(seed: int, count: int, rejection: float) -> None:
    entropies = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()
    if len(entropies.unique()) < count:  # type: ignore[no-untyped-call]
        return
    flagged = int((entropies <= quantile_boundary(entropies, rejection)).sum())
    assert flagged == max(1, math.floor(rejection * count))


def test_the_normal_fit_is_the_quantile_of_a_normal_distribution() -> None:
    entropies = 1.1 + 0.3 * torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    fit = calibration(entropies, 0.0, 0.01)
    assert fit["normal_boundary"] == pytest.approx(1.1 + 0.3 * NormalDist().inv_cdf(0.01), abs=0.01)
    assert fit["normal_boundary"] == pytest.approx(quantile_boundary(entropies, 0.01), abs=0.01)
    assert fit["images"] == 200_000


def test_manipulated_entropies_are_warned_of() -> None:
    assert warnings(torch.rand(100), 10) == []
    assert "entropy manipulated" in warnings(3.0 + 0.1 * torch.rand(100), 10)[0]
    assert "near 0" in warnings(torch.zeros(100), 10)[0]


# ----------------------------------------------------------------------------------------- mixtures


@pytest.mark.parametrize("mix", MIXES)
def test_each_mix_is_its_formula(mix: str) -> None:
    x, p, mean = torch.tensor(0.7), torch.tensor(0.6), torch.tensor(0.5)
    expected = {"blend": 0.75 * 0.7 + 0.25 * 0.6, "add": 1.3, "add clipped": 1.0, "add normalized": 0.8}[mix]
    assert float(MIXES[mix](x, p, 0.25, mean)) == pytest.approx(expected)


def test_adding_normalized_is_adding_behind_the_normalization() -> None:
    x, p = torch.rand(4, 3, 2, 2), torch.rand(4, 3, 2, 2)
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    mixed = MIXES["add normalized"](x, p, 0.5, mean)
    torch.testing.assert_close((mixed - mean) / std, (x - mean) / std + (p - mean) / std)


def test_without_any_overlay_weight_the_entropy_is_that_of_the_image() -> None:
    case = planted(grants=STREAM)
    assert case.suspect.inputs is not None
    bits = entropy_bits(torch.log_softmax(case.suspect.logits(case.suspect.inputs), 1))
    torch.testing.assert_close(-scores(STRIP(mix="blend", alpha=0.0), case), bits, atol=1e-5, rtol=0)


def test_with_full_overlay_weight_the_image_does_not_matter() -> None:
    case = planted(grants=STREAM)
    assert case.suspect.inputs is not None
    other = granted(case, inputs=torch.rand(case.suspect.inputs.shape, generator=torch.Generator()))
    defense = STRIP(mix="blend", alpha=1.0)
    torch.testing.assert_close(scores(defense, case), scores(defense, other), atol=1e-5, rtol=0)


# --------------------------------------------------------------------------------------- the method


@pytest.mark.parametrize("mix", MIXES)
def test_the_batched_entropies_are_those_of_a_plain_loop(mix: str) -> None:
    case = planted(grants=STREAM, images=120)
    suspect, defense = case.suspect, STRIP(overlays=5, mix=mix, alpha=0.4)
    assert suspect.clean is not None
    assert suspect.inputs is not None
    found = scores(defense, case)
    rng = torch.Generator().manual_seed(0)
    overlay, _ = defense.split(120, rng)
    key = int(torch.randint(2**62, (), generator=rng))
    pool, mean = suspect.clean.x[overlay], suspect.clean.x.mean((0, 2, 3)).view(-1, 1, 1)
    rows = partners(suspect.inputs, pool, 5, key + 1)
    for image in range(0, 120, 7):
        total = 0.0
        for partner in rows[image].tolist():
            z = MIXES[mix](suspect.inputs[image], pool[partner], 0.4, mean).unsqueeze(0)
            y = suspect.model(z)[0].double().softmax(0)
            total -= sum(float(p) * math.log2(float(p)) for p in y if float(p) > 0)
        # float32 logits of some tens, summed in another order: one processor differs by 2e-5.
        assert -float(found[image]) == pytest.approx(total / 5, abs=1e-4)


@pytest.mark.parametrize("batch", [1, 16, 50, 5000])
def test_the_batch_size_does_not_matter(batch: int) -> None:
    case = planted(grants=STREAM, images=100)
    torch.testing.assert_close(scores(STRIP(batch=batch), case), scores(STRIP(), case), atol=1e-5, rtol=0)


def test_what_else_is_in_the_stream_does_not_matter() -> None:
    case = planted(grants=STREAM)
    assert case.suspect.inputs is not None
    alone = scores(STRIP(), granted(case, inputs=case.suspect.inputs[:10]))
    torch.testing.assert_close(alone, scores(STRIP(), case)[:10], atol=1e-5, rtol=0)


def test_every_mixture_is_one_forward_image() -> None:
    case = planted(grants=STREAM | CANDIDATES, images=100)
    outcome = inspect(STRIP(), case.suspect, seed=0)
    assert isinstance(outcome, Finding)
    assert outcome.cost is not None
    assert outcome.cost.forward == 16 * (80 + 100 + 80)  # calibration, stream, one candidate over the calibration
    assert outcome.cost.backward == 0


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("target", [0, 6])
def test_stamped_inputs_of_a_planted_model_stand_out(mix: str, target: int) -> None:
    case = planted(target=target, grants=STREAM)
    found = run(STRIP(mix=mix), case)
    assert found.input_scores is not None
    assert found.class_scores is not None
    assert found.score is not None
    assert auc(found.input_scores, case.inputs) == 1.0
    assert int(found.class_scores.argmax()) == target
    # A quarter of the stream is stamped, and all of it lies below the boundary.
    assert found.score == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("mix", MIXES)
def test_nothing_stands_out_in_the_clean_twin(mix: str) -> None:
    case = planted(backdoored=False, grants=STREAM | CANDIDATES)
    found = run(STRIP(mix=mix), case)
    assert found.score is not None
    assert abs(found.score) <= 0.03


def test_the_class_scores_of_a_stream_split_its_score() -> None:
    found = run(STRIP(), planted(grants=STREAM))
    assert found.class_scores is not None
    assert float(found.class_scores.sum()) == pytest.approx(found.score, abs=1e-6)


def test_the_blend_cannot_see_a_perfect_source_specific_trigger() -> None:
    """The limit that the paper admits: a mixture loses what made the picture one of the source class."""
    case = planted(sources=(5,), grants=STREAM, images=2000)
    source = torch.arange(2000) % 10 == 5
    found = scores(STRIP.paper(), case)
    assert auc(found[source], case.inputs[source]) == pytest.approx(0.5, abs=0.08)


def test_a_candidate_that_works_scores_and_one_that_does_not_does_not() -> None:
    case = planted(target=4, grants=CANDIDATES)
    assert case.suspect.candidates is not None
    elsewhere = Patch.square(case.suspect.task.shape, corner="upper left", color="black")
    good = case.suspect.candidates[0]
    bad = Candidate(trigger=elsewhere, target=1, defense="other")
    found = run(STRIP(), granted(case, candidates=(bad, good)))
    rows = found.details["candidates"]
    assert [(row["defense"], row["target"]) for row in rows] == [("other", 1), ("planted", 4)]
    assert rows[1]["caught"] == rows[1]["auc"] == 1.0
    assert rows[0]["caught"] <= 0.2  # a black square hides a little of the picture
    assert found.score == rows[1]["score"]
    assert found.class_scores is not None
    assert int(found.class_scores.argmax()) == 4
    assert found.input_scores is None
    same_target = Candidate(trigger=elsewhere, target=4, defense="other")
    again = run(STRIP(), granted(case, candidates=(good, same_target)))
    assert again.score == found.score
    assert again.class_scores is not None
    assert float(again.class_scores[4]) == pytest.approx(found.score)
    only_bad = run(STRIP(), granted(case, candidates=(bad,)))
    assert only_bad.score == rows[0]["score"]


def test_no_candidates_is_evidence_and_gives_the_lowest_score() -> None:
    case = planted(grants=CANDIDATES)
    found = run(STRIP(), granted(case, candidates=()))
    assert found.score == -0.01
    assert found.details["candidates"] == []
    assert found.class_scores is not None
    assert found.class_scores.unique().numel() == 1  # type: ignore[no-untyped-call]


def test_presets_are_the_published_settings() -> None:
    assert STRIP.paper() == STRIP(mix="blend", alpha=0.5, overlays=100)
    assert STRIP.notebook() == STRIP(mix="add", overlays=100)


def test_all_stamped_pictures_of_one_class_leave_nothing_to_compare() -> None:
    case = planted(grants=CANDIDATES, classes=2, target=0)
    assert case.suspect.clean is not None
    clean = case.suspect.clean
    only = granted(case, clean=type(clean)(clean.x[clean.y == 0], clean.y[clean.y == 0]))
    assert run(STRIP(), only).details["candidates"][0]["entropy"] is None


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"mix": "stir"}, "unknown mix 'stir'; known: "),
        ({"alpha": 1.5}, r"alpha must lie in \[0, 1\], got 1.5"),
        ({"overlays": 0}, "overlays and batch must be at least 1, got 0"),
        ({"batch": 0}, "overlays and batch must be at least 1"),
        ({"rejection": 0.0}, "rejection must lie in"),
        ({"rejection": math.nan}, "rejection must lie in"),
        ({"pool": 1.0}, "pool must lie in"),
    ],
)
def test_settings_out_of_range_are_refused(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        STRIP(**settings_)


def test_evidence_that_cannot_do_is_refused() -> None:
    case = planted(grants=STREAM)
    assert case.suspect.inputs is not None
    with pytest.raises(ValueError, match="the stream has no images"):
        run(STRIP(), granted(case, inputs=case.suspect.inputs[:0]))
    with pytest.raises(ValueError, match="100 overlays need 200 clean images or more, got 150"):
        run(STRIP.paper(), planted(grants=STREAM, images=150))
    with pytest.raises(ValueError, match="STRIP needs clean images, and a stream"):
        run(STRIP(), planted(grants=[Access.CLEAN]))


@pytest.mark.slow
def test_on_a_trained_mnist_network() -> None:
    """A 5x5 square, 400 calibration images: the AUC was .97 to .99 over four such networks."""
    case = trained()
    stamped = torch.zeros(len(case.hidden.y), dtype=torch.bool)
    stamped[case.target.counts(case.hidden.y).nonzero().squeeze(1)[::4]] = True
    stream = case.hidden.x.clone()
    stream[stamped] = case.trigger(stream[stamped])
    candidate = Candidate(trigger=case.trigger, target=1, defense="truth")
    found = [
        run(STRIP(), Suspect.of(model, case.task, clean=case.clean, inputs=stream, candidates=(candidate,)))
        for model in (case.backdoored, case.twin)
    ]
    assert found[0].input_scores is not None
    assert auc(found[0].input_scores, stamped) >= 0.93
    assert found[0].details["candidates"][0]["score"] >= 0.4
    assert found[1].details["candidates"][0]["score"] <= 0.1
