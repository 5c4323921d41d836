import pytest
import torch

from molehunt.defenses._regression import deal, fit, nested, predict


def test_a_regression_worked_by_hand() -> None:
    # y = 1 + 2 x, exactly.
    three = torch.tensor([[0.0], [1.0], [2.0]])
    assert fit(three, torch.tensor([1.0, 3.0, 5.0]), 0.0).tolist() == pytest.approx([1, 2])
    # Standardized x is (-1, 1), y is (0, 1): slope .5 without, .5 * 2 / (2 + 2 * 1) = .25 with a penalty of 1; in raw
    # units (deviation 1 around 1) that is 0.25 per unit, and the mean stays .5.
    assert fit(torch.tensor([[0.0], [2.0]]), torch.tensor([0, 1]), 1.0).tolist() == pytest.approx([0.25, 0.25])


def test_units_and_offsets_of_features_do_not_matter() -> None:
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 3, generator=rng).double(), torch.randint(2, (20,), generator=rng)
    there = x * torch.tensor([1.0, 100.0, 0.01]) + torch.tensor([5.0, -7.0, 0.0])
    assert torch.allclose(predict(fit(x, y, 0.3), x), predict(fit(there, y, 0.3), there), atol=1e-9)


def test_what_never_varies_counts_nothing_and_more_features_than_models_are_no_error() -> None:
    x = torch.cat([torch.full((6, 1), 0.1), torch.arange(6.0).reshape(-1, 1)], 1)
    assert fit(x, torch.arange(6.0), 0.0).tolist() == pytest.approx([0, 0, 1], abs=1e-9)
    wide = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    y = torch.tensor([0, 1, 0, 1, 1])
    # In-sample it says everything about noise: the trap that the published figures fell into.
    assert torch.allclose(predict(fit(wide, y, 0.0), wide), y.double(), atol=1e-6)


def population(n: int, noise: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    return y.unsqueeze(1) + noise * torch.randn(n, 15, generator=rng), y


def auc(scores: torch.Tensor, y: torch.Tensor) -> float:
    high, low = scores[y == 1], scores[y == 0]
    return float(((high[:, None] > low).double() + 0.5 * (high[:, None] == low).double()).mean())


def test_a_clear_difference_is_found_held_out() -> None:
    x, y = population(40, 0.05, 0)
    found = nested({"one": x}, y, torch.Generator().manual_seed(0))
    assert auc(found.predictions, y) == 1.0


def test_noise_is_worth_nothing_held_out() -> None:
    found = []
    for seed in range(30):
        x = torch.randn(30, 15, generator=torch.Generator().manual_seed(seed))
        y = torch.arange(30) % 2
        setups = {"one": x, "two": torch.randn(30, 15, generator=torch.Generator().manual_seed(99 + seed))}
        found.append(auc(nested(setups, y, torch.Generator().manual_seed(seed), folds=3).predictions, y))
    mean, error = float(torch.tensor(found).mean()), float(torch.tensor(found).std()) / len(found) ** 0.5
    # Held-out predictions lean against the fold's own labels, so a little below one half is right too.
    assert 0.38 < mean < 0.5 + 2 * error


def test_the_setup_is_chosen_without_the_models_that_judge_it() -> None:
    x, y = population(40, 0.05, 0)
    noise = torch.randn(40, 15, generator=torch.Generator().manual_seed(7))
    found = nested({"noise": noise, "signal": x}, y, torch.Generator().manual_seed(0))
    assert [name for name, _ in found.chosen] == ["signal"] * 5
    # Nor do they have a say in the fit: turned around, they are predicted as badly as they deserve.
    places = deal(y, 5, torch.Generator().manual_seed(0))
    turned = x.clone()
    turned[places == 2] = 1 - turned[places == 2]
    again = nested({"noise": noise, "signal": turned}, y, torch.Generator().manual_seed(0))
    assert again.chosen[2] == found.chosen[2]
    assert auc(again.predictions[places == 2], y[places == 2]) == 0.0


def test_folds_are_even_and_keep_groups_whole() -> None:
    y = torch.tensor([0] * 12 + [1] * 8)
    places = deal(y, 4, torch.Generator().manual_seed(0))
    for fold in range(4):
        assert torch.bincount(y[places == fold]).tolist() == [3, 2]
    groups = torch.arange(20) // 2
    whole = deal(y, 4, torch.Generator().manual_seed(0), groups)
    assert torch.equal(whole[::2], whole[1::2])
    with pytest.raises(ValueError, match="3 groups cannot be dealt into 4 folds"):
        deal(torch.zeros(3), 4, torch.Generator())


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="expected features"):
        fit(torch.zeros(3, 2), torch.zeros(4), 0.1)
    with pytest.raises(ValueError, match="must not be negative"):
        fit(torch.zeros(3, 2), torch.zeros(3), -1.0)
