import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from molehunt.defenses._spectra import class_spectra, coordinates
from molehunt.defenses._spectre import (
    SQUARES,
    covariance,
    heaviest_form,
    highest,
    quantum_matrix,
    quantum_scores,
    spectre,
    trusted_points,
    whiten,
)
from molehunt.defenses.spectral_signatures import SpectralSignatures, marked, removal_counts
from molehunt.engine import Run


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cloud(classes: int, count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(classes, count, width, generator=seeded(seed), dtype=torch.float64)


def everyone(points: Tensor) -> Tensor:
    return torch.ones(points.shape[:2], dtype=torch.bool)


def trap(seed: int, share: float = 0.05) -> tuple[Tensor, Tensor, Tensor]:
    """Features of one class with ten times the variance along an axis that has nothing to do with its poison."""
    x = torch.randn(600, 16, generator=seeded(seed))
    x[:, 0] *= math.sqrt(10)
    poison = torch.zeros(600, dtype=torch.bool)
    poison[torch.randperm(600, generator=seeded(seed + 1))[: round(share * 600)]] = True
    x[poison] += 8 * torch.eye(16)[5]
    return x, torch.zeros(600, dtype=torch.int64), poison


def scored(x: Tensor, labels: Tensor, classes: int, **changes: float) -> tuple[Tensor, dict[str, object]]:
    spectra = class_spectra(x, labels, classes, axes=max(SQUARES))
    defense = SpectralSignatures(score="quantum", **changes)  # type: ignore[arg-type]
    scores, _, more = defense._quantum(coordinates(x, labels, spectra), labels, spectra, Run())
    return scores, more


# ------------------------------------------------------------------------------------ the matrix Q


@given(seed=st.integers(0, 10**6), width=st.integers(1, 12), alpha=st.floats(0.0, 20.0))
@settings(max_examples=40, deadline=None)
def test_q_is_symmetric_positive_definite_with_trace_one(seed: int, width: int, alpha: float) -> None:
    root = torch.randn(2, width, width, generator=seeded(seed), dtype=torch.float64)
    sigma = root @ root.mT + torch.eye(width)
    q = quantum_matrix(sigma, alpha)
    torch.testing.assert_close(q, q.mT, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(q.diagonal(dim1=1, dim2=2).sum(1), torch.ones(2, dtype=torch.float64))
    assert float(torch.linalg.eigvalsh(q).min()) > 0


def test_q_is_the_exponential_of_the_matrix() -> None:
    root = torch.randn(3, 6, 6, generator=seeded(0), dtype=torch.float64)
    sigma = root @ root.mT
    for one, q in zip(sigma, quantum_matrix(sigma, 4.0), strict=True):
        beyond = torch.linalg.eigvalsh(one)[-1] - 1
        expected = torch.linalg.matrix_exp(4.0 * (one - torch.eye(6)) / beyond)
        torch.testing.assert_close(q, expected / expected.trace(), rtol=1e-9, atol=1e-12)


def test_an_exponential_element_by_element_is_no_such_matrix() -> None:
    """The mistake of both public Python ports, on the covariance [[1, .9], [.9, 1]]."""
    sigma = torch.tensor([[1.0, 0.9], [0.9, 1.0]]).double()
    wrong = torch.exp(4.0 * (sigma - torch.eye(2)) / 0.9)
    assert float(torch.linalg.eigvalsh(wrong)[0]) < 0
    q = quantum_matrix(sigma[None], 4.0)[0]
    values = torch.linalg.eigvalsh(q)
    # Eigenvalues of S - I are -.9 and .9: e^-4 and e^4, over their sum.
    assert values.tolist() == pytest.approx([1 / (1 + math.e**8), 1 / (1 + math.e**-8)], rel=1e-9)
    assert not torch.allclose(q, wrong / wrong.trace())


def test_where_nothing_sticks_out_q_prefers_no_direction() -> None:
    for sigma in (torch.eye(4), 0.5 * torch.eye(4), torch.diag(torch.tensor([1.0, 0.9, 0.2, 0.0]))):
        torch.testing.assert_close(quantum_matrix(sigma.double()[None], 4.0)[0], torch.eye(4).double() / 4)


def test_without_alpha_the_score_is_the_squared_length_over_the_directions() -> None:
    x = 1.5 * cloud(2, 30, 5)
    scores, _ = quantum_scores(x, everyone(x), 0.0)
    torch.testing.assert_close(scores, x.square().sum(2) / 5)


def test_in_one_direction_the_score_is_the_squared_whitened_distance() -> None:
    points = cloud(2, 50, 1) * 3 + 1
    x = whiten(points, everyone(points))
    scores, criterion = quantum_scores(1.2 * x, everyone(points), 4.0)
    distance = (points - points.mean(1, keepdim=True))[..., 0].square()
    assert torch.equal(scores.argsort(1), distance.argsort(1))
    torch.testing.assert_close(scores, 1.44 * x[..., 0].square())
    torch.testing.assert_close(criterion, torch.full((2,), 1.44, dtype=torch.float64))


# ---------------------------------------------------------------------------------------- whitening


def test_whitening_makes_the_chosen_points_round_and_moves_the_others_along() -> None:
    points = cloud(2, 80, 4) * torch.tensor([1.0, 5.0, 0.2, 2.0]) + 3
    chosen = torch.rand(2, 80, generator=seeded(1)) < 0.7
    white = whiten(points, chosen)
    for k in range(2):
        own = white[k, chosen[k]]
        torch.testing.assert_close(own.mean(0), torch.zeros(4).double(), atol=1e-9, rtol=0)
        torch.testing.assert_close(own.T @ own / len(own), torch.eye(4).double(), atol=1e-9, rtol=0)
    mean, sigma = covariance(points, chosen)
    inverse = torch.linalg.inv(sigma)
    away = points - mean[:, None]
    torch.testing.assert_close(white.square().sum(2), ((away @ inverse) * away).sum(2))


def test_padding_changes_nothing() -> None:
    points = cloud(1, 60, 5)
    points[0, :4] += 6
    padded = torch.cat((points, 99 * torch.ones(1, 15, 5)), 1)
    there = torch.arange(75)[None] < 60
    trim, gone = torch.tensor([4]), torch.tensor([6])
    alone = spectre(points, everyone(points), trim, gone)
    beside = spectre(padded * there[..., None], there, trim, gone)
    torch.testing.assert_close(beside.scores[:, :60], alone.scores)
    assert not bool(beside.scores[:, 60:].any())
    both = spectre(
        torch.cat((padded * there[..., None], cloud(1, 75, 5, seed=8))),
        torch.cat((there, there | True)),
        trim.expand(2),
        gone.expand(2),
    )
    torch.testing.assert_close(both.scores[0], beside.scores[0])


# -------------------------------------------------------------------------------------- the filter


def test_the_heaviest_form_is_the_leading_eigenvector_of_the_covariance_of_products() -> None:
    y = cloud(2, 200, 4)
    y[:, :10, 2] += 7
    y = whiten(y, everyone(y))
    found = heaviest_form(y, everyone(y))
    for k in range(2):
        products = torch.stack([torch.outer(row, row).flatten() for row in y[k]])
        centered = products - products.mean(0)
        leading = torch.linalg.svd(centered, full_matrices=False).Vh[0]
        expected = centered @ leading
        sign = torch.sign(expected @ found[k])
        torch.testing.assert_close(found[k], sign * expected, rtol=1e-4, atol=1e-3)


def test_the_filter_distrusts_exactly_as_many_as_it_may_and_those_far_away_first() -> None:
    points = cloud(3, 300, 6)
    points[0, :15, 3] += 8
    points[1, :5, 1] -= 9
    there = everyone(points)
    trim = torch.tensor([15, 5, 0])
    trusted = trusted_points(points, there, trim)
    assert (~trusted).sum(1).tolist() == [15, 5, 0]
    assert not bool(trusted[0, :15].any())
    assert not bool(trusted[1, :5].any())


def test_what_is_not_there_is_never_trusted_and_counts_for_nothing() -> None:
    points = cloud(1, 50, 3)
    there = torch.arange(50)[None] < 40
    trusted = trusted_points(points * there[..., None], there, torch.tensor([4]))
    assert int(trusted.sum()) == 36
    assert not bool(trusted[0, 40:].any())


def test_the_highest_are_those_that_are_there_with_ties_by_place() -> None:
    scores = torch.tensor([[1.0, 9.0, 1.0, 1.0, 0.5]])
    there = torch.tensor([[True, False, True, True, True]])
    assert highest(scores, there, torch.tensor([2])).tolist() == [[True, False, True, False, False]]
    assert not bool(highest(scores, there, torch.tensor([0])).any())


# -------------------------------------------------------------------------------------- the method


@pytest.mark.parametrize("seed", [0, 10])
def test_poison_that_the_leading_axis_does_not_see_is_found_after_whitening(seed: int) -> None:
    x, labels, poison = trap(seed)
    spectra = class_spectra(x, labels, 1)
    counts = removal_counts(spectra.sizes, torch.tensor([0.05], dtype=torch.float64))
    plain = marked(coordinates(x, labels, spectra)[:, 0].square(), labels, counts)
    assert float(plain[poison].double().mean()) < 0.2  # chance is .075
    scores, more = scored(x, labels, 1)
    gone = marked(scores, labels, counts)
    assert float(gone[poison].double().mean()) > 0.9
    assert more["directions"] != [1]


def test_the_number_of_directions_is_chosen_from_squares_class_by_class() -> None:
    """Public ports fix it at 2. Poison along the leading axis needs one direction, that of the trap more."""
    assert tuple(k**2 for k in range(1, 9)) == SQUARES
    x, labels, _ = trap(0)
    other = torch.randn(600, 16, generator=seeded(3))
    other[:30, 2] += 20
    scores, more = scored(torch.cat((x, other)), torch.cat((labels, labels + 1)), 2)
    assert more["tried"] == [1, 4, 9, 16]
    table = more["criteria"]
    assert isinstance(table, Tensor)
    chosen = [more["tried"][int(i)] for i in (table >= table.amax(1, keepdim=True) * (1 - 1e-9)).int().argmax(1)]
    assert more["directions"] == chosen
    assert float(table[0].max() / table[0, 0]) > 1.5  # one direction is not enough for the first class
    assert bool(marked(scores, torch.cat((labels, labels + 1)), torch.tensor([45, 45]))[600:630].all())


def test_scores_do_not_depend_on_offset_scale_and_rotation() -> None:
    x, labels, _ = trap(0)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=seeded(4), dtype=torch.float64)).Q
    scores, _ = scored(x.double(), labels, 1)
    other, _ = scored(7 * x.double() @ rotation + 50, labels, 1)
    torch.testing.assert_close(other, scores, rtol=1e-5, atol=1e-6)


def test_small_empty_and_constant_classes_score_zero_and_leave_the_others_alone() -> None:
    x = torch.cat((torch.ones(5, 6), torch.randn(40, 6, generator=seeded(0)), torch.zeros(1, 6)))
    labels = torch.tensor([0] * 5 + [1] * 40 + [3])
    scores, more = scored(x, labels, 4)
    alone, _ = scored(x[5:45], labels[5:45] - 1, 1)
    torch.testing.assert_close(scores[5:45], alone)
    assert float(alone.mean()) > 0.5
    assert not bool(scores[:5].any())
    assert float(scores[45]) == 0.0
    assert len(more["directions"]) == 4  # type: ignore[arg-type]


def test_the_class_with_the_poison_sticks_out_not_the_smallest() -> None:
    rng = seeded(0)
    x = torch.randn(670, 128, generator=rng)
    labels = torch.tensor([0] * 300 + [1] * 300 + [2] * 70)
    x[:15, 0] += 8.0
    found = SpectralSignatures(score="quantum", retrain=False)
    spectra = class_spectra(x, labels, 3, axes=64)
    _, class_scores, _ = found._quantum(coordinates(x, labels, spectra), labels, spectra, Run())
    assert int(class_scores.argmax()) == 0


def test_groups_of_classes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(90, 5, generator=seeded(0))
    labels = torch.arange(90) % 3
    scores, _ = scored(x, labels, 3)
    split = torch.split

    def one_by_one(tensor: Tensor, size: int) -> tuple[Tensor, ...]:
        return split(tensor, 1)

    monkeypatch.setattr(torch, "split", one_by_one)
    torch.testing.assert_close(scored(x, labels, 3)[0], scores)
