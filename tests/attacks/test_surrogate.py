import pytest
import torch

from molehunt.attacks.surrogate import PASSES, batches, quickly_trained, small_network
from molehunt.tasks import Images
from molehunt.testing import planted

CASE = planted(images=400)
CLEAN: Images = CASE.hidden


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_small_network_learns_an_easy_task_in_a_few_steps() -> None:
    model = quickly_trained(CLEAN, CASE.suspect.task, rng(), steps=20)
    right = (model(CLEAN.x).argmax(1) == CLEAN.y).float().mean()
    assert float(right) > 0.9
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 9, 17)])
def test_a_network_takes_any_pictures_and_is_drawn_from_the_generator_alone(shape: tuple[int, int, int]) -> None:
    before = torch.get_rng_state()
    one, same, other = (small_network(shape[0], 7, shape[1:], rng(seed))(torch.rand(2, *shape, generator=rng()))
                        for seed in (1, 1, 2))  # fmt: skip
    assert one.shape == (2, 7)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_come_pass_after_pass_and_no_row_too_often() -> None:
    drawn = list(batches(CLEAN, 1000, 100, rng()))
    assert len(drawn) == 4 * PASSES
    assert (torch.bincount(torch.cat(drawn), minlength=400) == PASSES).all()
    assert len(list(batches(CLEAN, 7, 100, rng()))) == 7
    assert [len(rows) for rows in batches(CLEAN, 1, 1000, rng())] == [400]


def test_no_steps_or_no_images_are_refused() -> None:
    with pytest.raises(ValueError, match="got 0 and 400"):
        next(batches(CLEAN, 0, 100, rng()))
    with pytest.raises(ValueError, match="got 5 and 0"):
        next(batches(Images(CLEAN.x[:0], CLEAN.y[:0]), 5, 100, rng()))
