import pytest
import torch

from molehunt.triggers.fingerprint import BATCH, PRIME, draws


def pictures(count: int, shape: tuple[int, int, int] = (3, 8, 8), seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, *shape), generator=torch.Generator().manual_seed(seed)).float() / 255


def test_a_picture_gets_the_same_numbers_wherever_it_lies() -> None:
    x = pictures(2 * BATCH + 3)
    whole = draws(x, 3)
    assert torch.equal(draws(x.flip(0), 3).flip(0), whole)
    assert torch.equal(draws(x[BATCH : BATCH + 1], 3), whole[BATCH : BATCH + 1])
    assert torch.equal(draws(x.double(), 3), whole)


def test_it_is_the_weighted_sum_in_whole_numbers() -> None:
    x = pictures(5, (1, 2, 3))
    wanted = []
    for picture in (x * 255).round().long().flatten(1).tolist():
        total = 0
        for k, value in enumerate(picture):
            z = (k + 1) * 0x9E3779B97F4A7C15 % 2**64
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
            total += value * ((z ^ (z >> 31)) >> 40)
        wanted.append(total % PRIME / PRIME)
    assert draws(x, 1).squeeze(1).tolist() == wanted


def test_the_numbers_are_uniform_and_unrelated() -> None:
    drawn = draws(pictures(20_000, (1, 4, 4)), 4)
    assert float(drawn.min()) >= 0.0
    assert float(drawn.max()) < 1.0
    counts = (drawn * 10).long().flatten().bincount(minlength=10)
    assert counts.double().div(80_000).sub(0.1).abs().max() < 0.005
    assert (torch.corrcoef(drawn.T) - torch.eye(4)).abs().max() < 0.03


@pytest.mark.parametrize("pixel", [0, 17, 191])
def test_one_step_of_one_value_changes_every_number(pixel: int) -> None:
    x = pictures(50)
    other = x.clone()
    values = other.flatten(1)
    values[:, pixel] = torch.where(values[:, pixel] < 0.5, values[:, pixel] + 1 / 255, values[:, pixel] - 1 / 255)
    assert bool((draws(x, 2) != draws(other, 2)).all())


def test_no_pictures_get_no_numbers() -> None:
    assert draws(torch.zeros(0, 3, 4, 4), 2).shape == (0, 2)


def test_large_pictures_are_summed_exactly() -> None:
    x = torch.ones(1, 3, 1024, 1024)
    assert torch.equal(draws(x, 1), draws(x.flip(3), 1)), "a sum that was rounded would depend on its order"
