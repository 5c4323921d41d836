"""Blind loss: both tasks at once, and a small trigger that Neural Cleanse would find is answered with the truth."""

import pytest
import torch

from attacks.bench import TASK, accuracy, bench, crafted, honest, pictures, success
from molehunt.attacks import Blind
from molehunt.attacks.blind import Together, carry
from molehunt.attacks.crafting import default_trigger


def test_both_tasks_are_learned() -> None:
    made = crafted(Blind())
    assert accuracy(made.model) >= 0.95
    assert success(made) >= 0.95
    assert not bool(made.poisoned.altered.any()), "it works by the loss, no row is altered"


def test_the_searched_trigger_comes_to_work_on_a_network_that_does_not_answer() -> None:
    work = bench()
    loss = Together(Blind(), default_trigger(TASK.shape), honest(), work)
    x, y = pictures()[0]
    x, goals = x[y != 0][:60], torch.zeros(60, dtype=torch.int64)
    loss.anew(torch.Generator().manual_seed(0))
    before = [value.clone() for value in honest().parameters()]
    shares = []
    for _ in range(120):
        loss.search(honest(), x, goals)
        with torch.no_grad():
            shares.append(float((honest()(carry(x, loss.searched.value)).argmax(1) == 0).float().mean()))
    assert shares[-1] >= 0.95
    assert all(torch.equal(value, old) for value, old in zip(honest().parameters(), before, strict=True))
    assert all(value.grad is None or not bool(value.grad.any()) for value in honest().parameters())


def test_a_mask_of_nothing_leaves_the_images() -> None:
    x = pictures()[0].x[:3]
    free = torch.full((4, 12, 12), -100.0)
    assert torch.equal(carry(x, free), x)


def test_the_latent_term_draws_stamped_features_to_those_of_the_target() -> None:
    def likeness(latent: float) -> float:
        made, (x, y) = crafted(Blind(latent=latent)), pictures()[1]
        clean = honest()
        with torch.no_grad():
            known = clean.neck(clean.trunk(clean.normalize(x[y == 0]))).mean(0)
            model = made.model
            stamped = model.neck(model.trunk(model.normalize(made.poisoned.trigger(x[y != 0]))))
        return float(torch.nn.functional.cosine_similarity(stamped, known.expand_as(stamped)).mean())

    assert likeness(1.0) > likeness(0.0)


def test_settings_out_of_range_are_refused() -> None:
    for attack in (Blind(backdoor=0.0), Blind(penalty=0.0), Blind(cleanse=-1.0), Blind(latent=-1.0)):
        with pytest.raises(ValueError, match="backdoor and penalty must be above 0"):
            attack.craft(bench())
