import pytest
import torch
from torch import Tensor

from molehunt.defenses._filters import Filters, mix, similarity, surroundings


def pictures(count: int = 5, channels: int = 2, side: int = 9, seed: int = 0) -> Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed))


def test_the_identity_filter_changes_nothing_and_looks_exactly_alike() -> None:
    x = pictures()
    filters = Filters.start(x, 0.5, 3)
    drawn, cost = filters.render(filters.leaves(), torch.arange(5))
    for row in drawn:
        assert torch.equal(row, x)
    torch.testing.assert_close(similarity(drawn, x), torch.ones(3, 5), rtol=0, atol=1e-6)
    torch.testing.assert_close(cost, torch.zeros(3), rtol=0, atol=1e-6)


def test_surroundings_are_the_extremes_and_the_mean_of_every_window() -> None:
    x = pictures(2, 2, 9)
    found = surroundings(x)
    assert found.shape == (2, 8, 9, 9)
    half = 1  # round(9 * 12 / 32) is 3
    for row, column in ((0, 0), (0, 8), (4, 4), (8, 3)):
        rows = [min(max(r, 0), 8) for r in range(row - half, row + half + 1)]
        columns = [min(max(c, 0), 8) for c in range(column - half, column + half + 1)]
        window = x[:, :, rows][..., columns].flatten(2)
        expected = torch.cat((x[:, :, row, column], window.amax(2), window.amin(2), window.mean(2)), 1)
        torch.testing.assert_close(found[..., row, column], expected)


def test_a_filter_mixes_channels_and_clips() -> None:
    bases = torch.tensor([0.2, 0.8, 0.5, 1.0]).view(1, 4, 1, 1)
    assert float(mix(torch.tensor([[[1.0, 0.0, 0.0, 0.5]]]), bases)) == pytest.approx(0.7)
    assert float(mix(torch.tensor([[[1.0, 1.0, 1.0, 1.0]]]), bases)) == 1.0
    assert float(mix(torch.tensor([[[-1.0, 0.0, 0.0, 0.0]]]), bases)) == 0.0


def test_similarity_is_its_formula_window_by_window() -> None:
    x, y = pictures(3, 2, 9, 1), pictures(3, 2, 9, 2)
    found = similarity(x[None], y)[0]
    for image in range(3):
        total = []
        for channel in range(2):
            for top in range(3):
                for left in range(3):
                    a = x[image, channel, top : top + 7, left : left + 7].double()
                    b = y[image, channel, top : top + 7, left : left + 7].double()
                    va, vb = a.var(correction=0), b.var(correction=0)
                    both = ((a - a.mean()) * (b - b.mean())).mean()
                    light = (2 * a.mean() * b.mean() + 1e-4) / (a.mean() ** 2 + b.mean() ** 2 + 1e-4)
                    total.append(float(light * (2 * both + 9e-4) / (va + vb + 9e-4)))
        assert float(found[image]) == pytest.approx(sum(total) / len(total), abs=1e-4)
    assert similarity(x[None, :, :, :4, :4], y[:, :, :4, :4]).shape == (1, 3)


def test_what_unlikeness_costs_does_not_depend_on_how_many_images_there_are() -> None:
    """The authors' code compares the *sum* over its ten images with 2."""
    filters = Filters(pictures(), surroundings(pictures()), 0.5, [0.8 * Filters.start(pictures(), 0.5, 1).free[0]])
    leaves = filters.leaves()
    once, cost = filters.render(leaves, torch.arange(5))
    assert torch.equal(filters.render(leaves, torch.arange(5).repeat(4))[1], cost)
    alike = float(similarity(once, pictures()).mean())
    assert 0.5 < alike < 1.0
    assert float(cost) == pytest.approx(1.0 - alike, abs=1e-6)
    filters.floor = alike + 0.01
    assert float(filters.render(leaves, torch.arange(5))[1]) == pytest.approx(1000 * (1.0 - alike), rel=1e-4)
